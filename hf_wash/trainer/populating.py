"""
[`Populating`]: how the members of this process are made from the Trainer's one model or its `model_init`, and what each
of them gets of the Trainer's arguments and data.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import set_seed
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import enable_full_determinism

from ..population import Population, check_can_be_copied, share_frozen
from ..population.agreement import check_same_architecture
from ..population.consensus import ConsensusSample
from .member import Member, MemberAccelerator, arguments_of_member, around_another, find_around, whole_of
from .part import Part
from .served_soup import ServedSoup


class Populating(Part):
    """The part of a population's Trainer that makes its members."""

    def _empty_population(self, size: int) -> Population:
        return Population(size, self.args.device, self.args.process_index, self.args.world_size)

    def call_model_init(self, trial=None) -> nn.Module:
        """A new population from `model_init`, called for each member with its own seed. Returns the first local one."""
        self.population = self._empty_population(self.population.size)
        self._members = None
        make = super().call_model_init
        self._populate(lambda index: make(trial))
        if hasattr(self, "place_model_on_device"):
            self._place_members()
        return self.population.members[0]

    def _populate(self, make: Callable[[int], nn.Module]) -> None:
        population = self.population
        outside = population.streams.capture()
        for index in population.indices:
            # A plain run's streams begin with the seed, and go through its `model_init`.
            seed = self.args.seed + index
            enable_full_determinism(seed) if self.args.full_determinism else set_seed(seed)
            member = make(index)
            if any(member is other for other in population.members):
                raise ValueError(
                    "`model_init` must make a new model for each member, and returned the same model again."
                )
            population.add(member, population.streams.capture())
        population.streams.restore(outside)
        check_same_architecture(population)
        check_can_be_copied(population.members[0])
        if self.args.same_init:
            self._start_from_member_0()
        for member in population.members[1:]:
            share_frozen(member, population.members[0])
        self._members = None
        self.soup = ServedSoup()

    @torch.no_grad()
    def _start_from_member_0(self) -> None:
        first = self.population.members[0]
        # Buffers too: a model may draw them at random.
        start = [*first.parameters(), *first.buffers()]
        self.population.broadcast_tensors([tensor.data for tensor in start], source=0)
        for member in self.population.members[1:]:
            for tensor, value in zip([*member.parameters(), *member.buffers()], start, strict=True):
                if tensor is not value:
                    tensor.copy_(value)

    def _place_members(self) -> None:
        if self.place_model_on_device:
            for member in self.population.members:
                self._move_model_to_device(member, self.args.device)

    @property
    def members(self) -> list[Member]:
        """What belongs to each member of this process, made when it is first needed."""
        if self._members is None:
            population = self.population
            first = population.members[0]
            around = find_around(self, first)
            self._members = []
            for index, model in population:
                own = around if model is first else around_another(around, first, model)
                data_seed = self.args.data_seed + index if self.args.data_seed is not None else None
                accelerator = MemberAccelerator(self.accelerator, data_seed)
                self._members.append(Member(index, model, self.args, accelerator, whole_of(model, own), around=own))
            if around:
                population.wholes = [member.whole for member in self._members]
            self._consensus_sample = ConsensusSample(population.wholes[0])
            self._bring_members_up_to_date()
        return self._members

    def _bring_members_up_to_date(self) -> None:
        """What members take over from the Trainer's arguments and data, which a user may have changed meanwhile."""
        for member in self.members:
            overrides = self._overrides[member.index]
            own = {"seed": self.args.seed + member.index}
            if self.args.data_seed is not None:
                own["data_seed"] = self.args.data_seed + member.index
            for name in ("learning_rate", "weight_decay"):
                if getattr(overrides, name) is not None:
                    own[name] = getattr(overrides, name)
            member.args = arguments_of_member(self.args, **own)
            member.train_dataset = self._data_of(member.index)
            member.data_collator = overrides.data_collator or self.data_collator
            factor = overrides.label_smoothing_factor
            member.label_smoother = self.label_smoother
            if factor is not None:
                member.label_smoother = LabelSmoother(epsilon=factor) if factor else None

    def _freeze_alike(self) -> None:
        """What was frozen through `trainer.model`, the first member, holds for all."""
        first = self.population.members[0]
        for member in self.population.members[1:]:
            for ours, theirs in zip(first.parameters(), member.parameters(), strict=True):
                theirs.requires_grad_(ours.requires_grad)

    def _become(self, model: nn.Module, member: Member | None = None) -> None:
        """Serve a model: a member, or the soup."""
        self.model = self.model_wrapped = model
        if member is not None:
            self.__dict__.update(member.around)
        if hasattr(self, "callback_handler"):
            self.callback_handler.model = model
