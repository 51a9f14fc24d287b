"""
[`PopulationMixin`]: a population in the place of a Trainer's one model, in the order of a run.

Each seam of the [`~transformers.Trainer`] is a few lines here and calls `super()` for each member, or for the soup.
What takes more is a service that holds no trainer: `member`, `data`, `mixing_run`, `log`, `served_soup`, `evaluation`,
`checkpoint`, `refusals`. The seams of evaluating, of checkpoints and of publishing have files of their own.
"""

import atexit
import contextlib
import functools
import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, set_seed
from transformers.modeling_utils import unwrap_model
from transformers.trainer_pt_utils import LabelSmoother, find_batch_size
from transformers.trainer_utils import (
    enable_full_determinism,
    has_length,
)
from transformers.utils import logging

from ..config import ENOUGH_SHUFFLES, LARGEST_FITTED_PROBABILITY
from ..hub.export import writing_here
from ..hub.push import LOCAL_MEMBERS
from ..population import MemberOverrides, Population, copy_member, share_frozen
from ..population.agreement import (
    check_agreement,
    check_same_architecture,
    describe_architecture,
    weights_digest,
)
from ..population.consensus import ConsensusSample
from ..soup import has_batch_norm, recalibrate_batch_norm
from . import evaluation, refusals
from .checkpointing import Checkpointing
from .data import MemberBatches, MemberLoader, MembersLoader, has_labels, hold_out, shard_for_member
from .evaluating import Evaluating
from .log import MemberLog
from .member import (
    LocalMembers,
    Member,
    MemberAccelerator,
    arguments_of_member,
    around_another,
    as_member,
    find_around,
    whole_of,
)
from .mixing_run import MixingRun
from .publishing import Publishing
from .served_soup import ServedSoup


logger = logging.get_logger(__name__)

DEFAULT_POPULATION_SIZE = 4
# Seeds of what is drawn outside of the members' streams: far from those of members, `seed + k`.
RECALIBRATION_SEED_OFFSET, HOLDOUT_SEED_OFFSET = 1_000_003, 1_000_033


@functools.cache
def _end_process_group_at_exit() -> None:
    # gloo aborts a process whose group is still alive when the interpreter ends, after everything has been saved.
    def end() -> None:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(end)


class PopulationMixin(Evaluating, Checkpointing, Publishing):
    """
    Makes a population of any [`~transformers.Trainer`]: put it in front of the Trainer, and [`PopulationArguments`] in
    front of its arguments.

    Member k is a plain one-process run of that Trainer with the seed `seed + k` and, unless `same_init=False`, member
    0's initial weights; without mixing it is that run bit for bit. Members are dealt to the processes that `accelerate
    launch` or `torchrun` start, several to a process where there are more members than processes; the result does not
    depend on how (on a CPU with the same number of threads, bit for bit).

    While training, `trainer.model` is this process's first member. In `evaluate`, `predict` and when saving, and after
    `train`, it is the soup, on every process. The members are `trainer.population.members` and stay as they are.

    Args:
        members (`list[MemberOverrides]`, *optional*):
            For each of the N members, what it does differently.
        *args, **kwargs:
            The Trainer's own. `optimizers` is refused for more than one member, whose parameters an optimizer made
            before them cannot hold: use `optim` or `optimizer_cls_and_kwargs`.

    Raises:
        ValueError: before anything has happened, for what cannot work: a population that does not divide among the
            processes, members that differ, DeepSpeed, FSDP or tensor parallelism (not supported yet), ...

    Example:

    ```python
    >>> from dataclasses import dataclass

    >>> from hf_wash import PopulationArguments, PopulationMixin
    >>> from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments


    >>> class WashSeq2SeqTrainer(PopulationMixin, Seq2SeqTrainer): ...


    >>> @dataclass
    ... class WashSeq2SeqConfig(PopulationArguments, Seq2SeqTrainingArguments): ...
    ```
    """

    # Ways of computing a loss that leave it to the model.
    _losses_of_models: tuple = (Trainer.compute_loss,)

    # ---- Build -----------------------------------------------------------------------------------------------------

    def __init__(self, *args, members: list[MemberOverrides] | None = None, **kwargs):
        given = self._arguments_by_name(args, kwargs)
        config, model = given.get("args"), given.get("model")
        refusals.refuse_trainer(type(self))
        refusals.refuse_args(config)
        refusals.refuse_settings(config, model)
        size = config.population_size or (config.world_size if config.world_size > 1 else DEFAULT_POPULATION_SIZE)
        refusals.refuse_for_several(config, size, model, given.get("optimizers") or (None, None))
        if members is not None and len(members) != size:
            raise ValueError(f"`members` lists {len(members)} members, but the population has {size}.")
        _end_process_group_at_exit()
        self.args = config
        self.population = self._empty_population(size)
        self._overrides = members if members is not None else [MemberOverrides() for _ in range(size)]
        self._members: list[Member] | None = None
        self._given_optimizer = (given.get("optimizers") or (None, None))[0] is not None
        self.soup = ServedSoup()
        self.mixing: MixingRun | None = None
        self._log: MemberLog | None = None
        self._line: tuple[dict[str, float], float] | None = None
        self._beside: evaluation.BesideTheSoup | None = None
        self._trainings = self._total_steps = 0
        self._evaluating = False
        self._resume: dict[str, Any] | None = None

        # Trainer's own just-in-time checkpointing saves at different steps on different processes.
        jit_checkpoint, config.enable_jit_checkpoint = config.enable_jit_checkpoint, False
        super().__init__(*args, **kwargs)
        config.enable_jit_checkpoint = jit_checkpoint
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            which = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
            raise ValueError(
                f"{which} is not supported yet: start a plain `accelerate launch --multi_gpu` or `torchrun`."
            )
        if not self.population.members:
            first = self.population.indices[0]
            self._populate(lambda index: self.model if index == first else copy_member(self.model))
            self._become(self.population.members[0])
        self._place_members()

    def _arguments_by_name(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        parameters = inspect.signature(super().__init__).parameters
        if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
            parameters = inspect.signature(Trainer.__init__).parameters
            parameters = {name: p for name, p in parameters.items() if name != "self"}
        return {**dict(zip(parameters, args, strict=False)), **kwargs}

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
            population.add(member, population.streams.capture())
        population.streams.restore(outside)
        check_same_architecture(population)
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
                self._members.append(
                    Member(index, model, self.args, accelerator, around=own, whole=whole_of(model, own))
                )
            if around:
                population.wholes = [member.whole for member in self._members]
            self._consensus_sample = ConsensusSample(population.wholes[0])
            self._bring_members_up_to_date()
        return self._members

    def _bring_members_up_to_date(self) -> None:
        """What members take over from the Trainer's arguments and data, which a user may have changed meanwhile."""
        for member in self._members:
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

    def _become(self, model: nn.Module, member: Member | None = None) -> None:
        """Serve a model: a member, or the soup."""
        self.model = self.model_wrapped = model
        if member is not None:
            vars(self).update(member.around)
        if hasattr(self, "callback_handler"):
            self.callback_handler.model = model

    def hyperparameter_search(self, *args, **kwargs):
        """Not supported: a trial would have to rebuild the population on all processes alike."""
        raise ValueError("`hyperparameter_search` is not supported for a population: start one run for each setting.")

    # ---- Data ------------------------------------------------------------------------------------------------------

    @property
    def _holds_out(self) -> bool:
        return self.args.soup == "greedy" and self.population.size > 1

    def _data_of(self, index: int) -> Any:
        """What member `index` trains on: its own set or a part of the common one, without what is held out."""
        own = self._overrides[index].train_dataset
        data = own if own is not None else self.train_dataset
        if data is not None and self._holds_out:
            data = hold_out(data, self.args.soup_holdout, self.args.seed)[0]
        if data is not None and own is None and self.args.member_data == "shard":
            data = shard_for_member(data, index, self.population.size)
        return data

    def _members_loader(self) -> MembersLoader:
        """In the place of `get_train_dataloader`, once: each member's own loader, made as the Trainer makes it."""
        del self.get_train_dataloader
        loaders = []
        for member in self.members:
            with self.population.streams.use(member.index), as_member(self, member, training=True):
                loaders.append(
                    MemberLoader(
                        self.get_train_dataloader(),
                        member.index,
                        self.population,
                        self.args.accelerator_config.non_blocking or False,
                    )
                )
        self._batches = MemberBatches(loaders, self.population)
        return self._batches.as_dataloader()

    def num_examples(self, dataloader) -> int:
        """Examples in the training set of the first local member, or in the loader's data set."""
        if isinstance(dataloader, MembersLoader):
            dataloader = dataloader.dataset.loaders[0].dataloader
        return super().num_examples(dataloader)

    def get_total_train_batch_size(self, args) -> int:
        """Examples in one optimizer step of one member."""
        return self._train_batch_size * args.gradient_accumulation_steps

    def _check_data(self) -> None:
        if self._holds_out:
            data = [overrides.train_dataset for overrides in self._overrides] + [self.train_dataset]
            lengths = {len(own) if has_length(own) else None for own in data if own is not None}
            if len(lengths) > 1:
                raise ValueError(
                    "`soup='greedy'` holds out the same examples of every member's training set, by their position, "
                    f"so those must be views of one set; they have {len(lengths)} different lengths."
                )
        for index in self.population.indices:
            data = self._data_of(index)
            if data is None and self._makes_its_own_loader():
                continue
            if data is None:
                raise ValueError("Training needs a `train_dataset`.")
            if has_length(data) and len(data) == 0:
                raise ValueError(f"The training set of member {index} is empty.")
        self._check_labels()

    def _makes_its_own_loader(self) -> bool:
        return type(self).get_train_dataloader is not Trainer.get_train_dataloader

    def _check_labels(self) -> None:
        """Find out before training that there are no labels, where the loss is the model's own and needs them."""
        if (
            type(self).compute_loss not in self._losses_of_models
            or self._makes_its_own_loader()
            or self.compute_loss_func is not None
        ):
            return
        if self.can_return_loss or not self.label_names:
            return
        streams = self.population.streams
        for member in self.members:
            if not has_length(member.train_dataset):
                continue
            before = streams.capture()
            try:
                with as_member(self, member):
                    loader = self.get_train_dataloader()
                    batch = loader.collate_fn([loader.dataset[0]])
            finally:
                streams.restore(before)
            if not has_labels(batch, self.label_names):
                raise ValueError(
                    f"The training set of member {member.index} has no labels: a batch has none of "
                    f"{', '.join(self.label_names)}."
                )

    # ---- Begin a run -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None, **kwargs):
        """
        Train the population. Afterwards `trainer.model` is the soup.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder; `True` for the newest complete one in `output_dir`; `"auto"` for the newest
                complete one if there is any, else a fresh start. It may have been written by another number of
                processes. Training continues bit for bit.
            trial, ignore_keys_for_eval (*optional*): As in [`~transformers.Trainer.train`].

        Raises:
            ValueError: for data that cannot be trained on, and for a checkpoint that is damaged or belongs to another
                population.
        """
        self.members  # noqa: B018 # made here, while the Trainer's model is still the first member
        self._bring_members_up_to_date()
        self._check_data()
        self._check_export_folder()
        resume_from_checkpoint = self._resolve_checkpoint(resume_from_checkpoint)
        self._check_output_folder()
        self._trainings += 1
        self.soup.served = False
        first = self.population.members[0]
        for member in self.population.members[1:]:
            # What was frozen through `trainer.model` holds for all.
            for ours, theirs in zip(first.parameters(), member.parameters(), strict=True):
                theirs.requires_grad_(ours.requires_grad)
        self._become(first, self.members[0])
        try:
            return super().train(
                resume_from_checkpoint=resume_from_checkpoint,
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
                **kwargs,
            )
        finally:
            vars(self).pop("get_train_dataloader", None)
            if self.mixing is not None:
                self.mixing.release()
            self.population.streams.activate(None)

    def _inner_training_loop(self, *args, **kwargs):
        self.members  # noqa: B018 # `model_init` may have made new ones
        self._bring_members_up_to_date()
        for member in self.population.members[1:]:
            self._enable_activation_checkpointing(member)  # Trainer has enabled it on the model it knows
        # For the loop's one call: whoever else asks for a loader gets the Trainer's own, and changes nothing.
        self.get_train_dataloader = self._members_loader
        return super()._inner_training_loop(*args, **kwargs)

    def _enable_activation_checkpointing(self, member: nn.Module) -> None:
        # transformers renamed this after 5.17; the old names mirror the new ones where both exist.
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if hasattr(self.args, name) and hasattr(member, f"{name}_enable"):
                if getattr(self.args, name):
                    options = dict(getattr(self.args, f"{name}_kwargs") or {})
                    every_n_layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
                    getattr(member, f"{name}_enable")(
                        **{f"{name}_kwargs": options or None}, every_n_layers=every_n_layers, offload=offload
                    )
                return

    def set_initial_training_values(self, args, dataloader):
        """The run's lengths, as in Trainer; the first place they are known, so where processes compare notes."""
        values = super().set_initial_training_values(args, dataloader)
        steps_per_epoch, self._total_steps = values[1], values[-1]
        batches = [
            len(loader.dataloader) if has_length(loader.dataloader) else None for loader in self._batches.loaders
        ]
        batches = self.population.gather(batches)
        if len(set(batches)) > 1:
            listing = ", ".join(f"member {index}: {count}" for index, count in enumerate(batches))
            raise ValueError(
                "Members must take the same number of steps, or the others would wait for one that has finished, but "
                f"they have different numbers of batches an epoch ({listing})."
            )
        check_agreement(self.population, self._what_must_agree(steps_per_epoch))
        return values

    def _what_must_agree(self, steps_per_epoch: int) -> dict[str, Any]:
        # Where a run is written and reported may differ between machines; what is computed may not.
        local = ("output_dir", "logging_dir", "local_rank", "run_name", "report_to", "hub_token", "disable_tqdm")
        options = {name: str(value) for name, value in self.args.to_dict().items() if name not in local}
        facts = {f"option {name}": value for name, value in options.items()}
        facts["steps per epoch"], facts["steps"] = steps_per_epoch, self._total_steps
        facts["architecture"] = describe_architecture(self.population.wholes[0])
        facts["overrides"] = [overrides.describe() for overrides in self._overrides]
        facts["torch"] = torch.__version__
        if self.args.same_init and self._trainings == 1 and self._resume is None:
            facts["initial weights"] = weights_digest(self.population.members[0])
        return facts

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """
        One optimizer for this process's members. Its parameter groups carry the member's index as `member`, so that
        each has its own learning rate and weight decay and its state can be told from the others'.
        """
        if self.optimizer is not None:
            if self.population.size == 1:
                for group in self.optimizer.param_groups:
                    group["member"] = 0
            return self.optimizer
        combined = None
        for member in self.members:
            with as_member(self, member):
                self.optimizer = None
                super().create_optimizer()
            if not isinstance(self.optimizer, torch.optim.Optimizer):
                raise ValueError(
                    f"`{type(self.optimizer).__name__}` has no parameter groups to tell members apart by."
                )
            learning_rate = self._overrides[member.index].learning_rate
            for group in self.optimizer.param_groups:
                group["member"] = member.index
                if learning_rate is not None:
                    # `optimizer_cls_and_kwargs` may have brought a learning rate of its own.
                    group["lr"] = learning_rate
                if combined is not None:
                    combined.add_param_group(group)
            if combined is not None:
                # Some make their state when they are made (APOLLO).
                combined.state.update(self.optimizer.state)
            combined = combined if combined is not None else self.optimizer
        self.optimizer = combined
        return combined

    def _wrap_model(self, model, training: bool = True, dataloader=None):
        # Trainer prepares what is not wrapped, which means DDP; so autocast and compilation are prepared here.
        if training:
            return LocalMembers([member.prepare(self.accelerator) for member in self.members])
        known = [*self.members, *([self.soup.member] if self.soup.member is not None else [])]
        return next((m.prepare(self.accelerator) for m in known if m.model is model), model)

    def _prepare_for_training(self, *args, **kwargs):
        if self.optimizer is not None:
            vars(self.optimizer).pop("step", None)  # of a run before
        model, _ = super()._prepare_for_training(*args, **kwargs)
        self._log = MemberLog(self.population)
        resumed = self._resume["manifest"] if self._resume is not None else {}
        probability = resumed.get("probability")
        if probability is None or self.args.shuffle_probability is not None:
            probability = self.args.probability_for(self._total_steps)
        self.mixing = MixingRun(
            self.args,
            self.population,
            self.population.wholes,
            self.optimizer,
            self._total_steps,
            probability,
            self.args.seed,
        )
        self._say_what_is_shuffled()
        if self.args.enable_jit_checkpoint:
            self.mixing.listen()
        # The exchange is a part of the step, whatever callbacks there are, and happens when fp16's scaler skips it, too.
        own_step = self.optimizer.step

        @functools.wraps(own_step)  # with the mark by which a scheduler knows that it counts the steps
        def step_and_mix(*args, **kwargs):
            result = own_step(*args, **kwargs)
            self.mixing.mix(self.state.global_step + 1)
            return result

        self.optimizer.step = step_and_mix
        loader = self._batches.as_dataloader()
        self.callback_handler.train_dataloader = loader
        return model, loader

    def _say_what_is_shuffled(self) -> None:
        if self.args.mixing != "wash" or self.population.size == 1 or not self.is_world_process_zero():
            return
        probability = self.mixing.probability
        logger.info(f"Shuffling with p = {probability:g}.")
        mixing_steps = self.args.mixing_steps(self._total_steps)
        expected = probability * mixing_steps
        if not probability or expected >= ENOUGH_SHUFFLES:
            return
        needed = ENOUGH_SHUFFLES / mixing_steps if mixing_steps else math.inf
        advice = (
            f"`shuffle_probability={needed:.2g}` would reach it"
            if needed <= LARGEST_FITTED_PROBABILITY
            else f"this run is too short for it, even at {LARGEST_FITTED_PROBABILITY}; train longer"
        )
        logger.warning(
            f"A first-layer weight will be shuffled about {expected:.1f} times in this run of {self._total_steps} "
            f"steps (p = {probability:g}). Below about {ENOUGH_SHUFFLES} the members are disturbed without being "
            f"brought together: {advice}."
        )

    def _run_epoch(self, *args, **kwargs):
        if self._resume is not None:
            self._continue_from(self._resume, kwargs["epoch"], kwargs["steps_trained_in_current_epoch"])
            self._resume = None
        self._batches.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    # ---- Step ------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        if not (batch_samples and isinstance(batch_samples[0], list)):
            return super()._get_num_items_in_batch(batch_samples, device)
        counts = []
        for member, own in zip(self.members, zip(*batch_samples, strict=True), strict=True):
            with as_member(self, member, training=True):
                counts.append(self._get_num_items_in_batch(list(own), device))
        return counts

    def training_step(self, model: nn.Module, inputs: list, num_items_in_batch: list | None = None, **kwargs):
        """
        Forward and backward of each local member on its own batch.

        Args:
            model (`nn.Module`): This process's members, prepared.
            inputs (`list[dict]`): A batch for each.
            num_items_in_batch (`list`, *optional*): The Trainer's normalizer for each.

        Returns:
            `torch.Tensor`: The mean of their losses, a scalar.
        """
        losses = []
        for slot, member in enumerate(self.members):
            # The streams stay in: a process with one member pays nothing for them.
            self.population.streams.activate(member.index)
            items = num_items_in_batch[slot] if num_items_in_batch is not None else None
            with as_member(self, member, training=True):
                losses.append(super().training_step(member.prepared, inputs[slot], items, **kwargs))
        since = self.state.global_step - self._globalstep_last_logged
        return self._log.add(losses, since, self.args.logging_nan_inf_filter)

    def _clip_grad_norm(self, model: nn.Module):
        return self._norms(super()._clip_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        return grad_norm if grad_norm is not None else self._norms(super()._get_grad_norm)

    def _norms(self, norm_of: Callable) -> torch.Tensor:
        """Each member's own gradient norm, clipped by itself; returns their mean."""
        self.accelerator.unscale_gradients()
        norms = []
        for member in self.members:
            with as_member(self, member, training=True):
                norms.append(norm_of(member.prepared))
        self._log.norms = [torch.as_tensor(norm) for norm in norms]
        return torch.stack(self._log.norms).mean()

    def floating_point_ops(self, inputs) -> int:
        """Floating-point operations of the members' forward and backward passes, as the Trainer counts them."""
        if isinstance(inputs, list):
            return sum(super(PopulationMixin, self).floating_point_ops(batch) for batch in inputs)
        return super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs) -> None:
        # Of one member, as all options and counts are.
        with as_member(self, self.members[0]):
            super()._track_num_input_tokens(inputs[0] if isinstance(inputs, list) else inputs)

    # ---- Log -------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.mixing.stop_agreed:
            self.control.should_save = self.control.should_training_stop = True
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._line = self._collect_line()
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def _collect_line(self) -> tuple[dict[str, float], float]:
        """*Collective.* What a log line says of the members, and the sum of this call's losses after it."""
        steps = self.state.global_step - self._globalstep_last_logged
        line, added = self._log.line(steps, [self._learning_rate_of(index) for index in self.population.indices])
        sample = torch.stack([self._consensus_sample.values(whole) for whole in self.population.wholes])
        if self.population.world_size > 1:
            sample = sample.to(self.args.device)
        distance = self._consensus_sample.estimate(self.population.gather_tensors(sample).cpu())
        return line | self.mixing.log() | {"consensus_distance": distance}, self._total_loss_scalar + added

    def _learning_rate_of(self, index: int) -> float | None:
        # As Trainer does for its one group: the scheduler's value is that of the step just taken.
        groups = self.optimizer.param_groups
        position = next((i for i, group in enumerate(groups) if group.get("member", index) == index), 0)
        plateau = isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        known = not plateau and hasattr(self.lr_scheduler, "get_last_lr") and self._log.rates is not None
        rate = self._log.rates[position] if known else groups[position]["lr"]
        return float(rate) if rate is not None else None

    def _get_learning_rate(self):
        # Called after the optimizer's step and before the scheduler's: remember all groups' rates, not the first's.
        if self._log is not None:
            rates = getattr(self.lr_scheduler, "get_last_lr", lambda: None)()
            self._log.rates = list(rates) if rates is not None else None
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log a dictionary; a line about training is completed with what is known of each member."""
        if self._line is not None and "loss" in logs:
            line, total = self._line
            self._line = None
            logs.update(line)
            # Trainer has added its own mean, whose rounding depends on the number of processes.
            self._total_loss_scalar = total
        if self._evaluating:
            timed = {key: value for key, value in logs.items() if key.endswith(("_runtime", "_per_second"))}
            logs.update(self.population.broadcast(timed))
        super().log(logs, *args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        # What has not been logged yet.
        self._tr_loss = torch.tensor(self._log.collect()[1], dtype=torch.float64)
        self._serve_soup()
        result = super()._finalize_training(*args, **kwargs)
        if self.args.push_members:
            self.save_members()
        return result

    # ---- Soup ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _as_soup(self) -> Iterator[None]:
        """*Collective unless the soup is served already.* Make the Trainer's model the soup for the length of a block."""
        soup = self.soup.member if self.soup.served else self._build_soup()
        shown = getattr(self.callback_handler, "model", None)
        self.callback_handler.model = soup.model
        try:
            with self.population.streams.use(None), as_member(self, soup):
                yield
        finally:
            self.callback_handler.model = shown

    def _serve_soup(self) -> None:
        """*Collective.* Build the soup from the members as they are and make it the Trainer's model."""
        soup = self._build_soup()
        self._become(soup.model, soup)
        self.soup.served = True

    def _build_soup(self) -> Member:
        if self.mixing is not None:
            self.mixing.synchronize()
        self.members  # noqa: B018 # made while the Trainer's model is still the first member
        key = (self._trainings, self.state.global_step) if self.is_in_train else None
        with self.population.streams.use(None):
            return self.soup.build(
                self.population,
                key,
                share_frozen=self.args.same_init,
                make=self._in_a_members_place,
                finish=self._finish_soup,
                score=self._held_out_score if self._holds_out and self._data_in_common() is not None else None,
            )

    def _in_a_members_place(self, whole: nn.Module) -> Member:
        first = self.members[0]
        model = whole.model if first.around else whole
        around = {
            name: whole.around[name] if isinstance(value, nn.Module) else {k: whole.around[k] for k in value}
            for name, value in first.around.items()
        }
        soup = Member(None, model, self.args, MemberAccelerator(self.accelerator), around=around, whole=whole)
        soup.prepare(self.accelerator)
        return soup

    def _data_in_common(self) -> Any:
        return self.train_dataset if self.train_dataset is not None else self._overrides[0].train_dataset

    def _finish_soup(self, soup: Member) -> None:
        """*Collective.* The soup's arguments and data, and its BatchNorm statistics, from a stream of their own."""
        soup.args, soup.label_smoother = self.args, self.label_smoother
        common = self.train_dataset is not None
        soup.train_dataset = self.train_dataset if common else self._data_of(0)
        soup.data_collator = self.data_collator
        if not common and self._overrides[0].data_collator is not None:
            soup.data_collator = self._overrides[0].data_collator
        if (
            self.args.soup_batch_norm != "recalibrate"
            or self.population.size == 1
            or soup.train_dataset is None
            or not has_batch_norm(soup.model)
        ):
            return
        streams = self.population.streams
        before = streams.capture()
        try:
            set_seed(self.args.seed + RECALIBRATION_SEED_OFFSET)
            with as_member(self, soup):
                loader = self.get_train_dataloader()
                recalibrate_batch_norm(
                    soup.model,
                    iter(getattr(loader, "base_dataloader", loader)),
                    forward=self._forward_without_labels,
                    max_batches=self.args.soup_batch_norm_batches,
                )
        finally:
            streams.restore(before)
        # The same batches everywhere, but a GPU's sums may differ in the last bit.
        self.population.broadcast_tensors(list(soup.model.buffers()), source=0)

    def _forward_without_labels(self, model: nn.Module, batch) -> None:
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            self.model_wrapped(**{name: value for name, value in inputs.items() if name not in self.label_names})

    def _held_out_score(self, soup: Member) -> float:
        """*Collective.* A soup's score on held-out training data; augmentation draws the same for every soup."""
        held_out = hold_out(self._data_in_common(), self.args.soup_holdout, self.args.seed)[1]
        predictions = evaluation.Predictions()
        streams = self.population.streams
        before = streams.capture()
        soup.prepared.eval()
        try:
            set_seed(self.args.seed + HOLDOUT_SEED_OFFSET)
            with as_member(self, soup):
                for index, inputs in enumerate(self.get_test_dataloader(held_out)):
                    result = super().prediction_step(soup.prepared, inputs, False)
                    predictions.add(index, find_batch_size(inputs) or 1, *result)
        finally:
            streams.restore(before)
        score = evaluation.held_out_score(
            predictions,
            evaluation.ensemble_kind(soup.model),
            self.args.metric_for_best_model,
            self.args.greater_is_better,
            self.compute_metrics,
        )
        # A GPU's last bit must not make processes choose differently.
        return self.population.broadcast(score)

    # ---- Save ------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the soup, as the Trainer saves its model.

        While training, call it on every process, since the soup is built first. After training it is served already
        and no process waits for another, so that scripts may call it on the main one alone.
        """
        with self._as_soup():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with writing_here(unwrap_model(self.model)):
            super()._save(output_dir, state_dict)

    def save_members(self, output_dir: str | None = None) -> None:
        """
        *Collective: call on every process.* Save each member, loadable by itself, under `_members/member_<i>/`.

        Args:
            output_dir (`str`, *optional*): Defaults to the configuration's.
        """
        folder = os.path.join(output_dir if output_dir is not None else self.args.output_dir, LOCAL_MEMBERS)
        if self.args.should_save:
            # An earlier run's would be taken for members of this one.
            for path in Path(folder).glob("member_*"):
                if path.name not in {f"member_{index}" for index in range(self.population.size)}:
                    logger.warning(f"`{path}` is removed: it is not of this population.")
                    shutil.rmtree(path)
        with self.population.streams.use(None):
            for member in self.members:
                place = os.path.join(folder, f"member_{member.index}")
                with as_member(self, member):
                    self._save(place)
                # What is said once, at the root.
                Path(place, "training_args.bin").unlink(missing_ok=True)
        self.population.gather_processes(None)

    def _check_export_folder(self) -> None:
        """*Collective.* Find out before training, not at its end, that the soup cannot be written where it should go."""

    # ---- What has been exchanged -----------------------------------------------------------------------------------

    @property
    def mixer(self):
        """The run's [`WashMixer`]; `None` before training and for one member."""
        return self.mixing.mixer if self.mixing is not None else None

    @property
    def greedy_record(self):
        """How a greedy soup was chosen, a [`GreedySoupRecord`]."""
        return self.soup.greedy

    @property
    def values_moved(self) -> int:
        """Values that changed owner since the run began, of all members."""
        return self.mixing.values_moved if self.mixing is not None else 0

    @property
    def bytes_exchanged(self) -> int:
        """Bytes of these values."""
        return self.mixing.bytes_exchanged if self.mixing is not None else 0
