"""
[`PopulationMixin`]: a population in the place of a Trainer's one model, in the order of a run; [`WashTrainer`].

Each seam of the [`~transformers.Trainer`] is a few lines here and calls `super()` for each member, or for the soup.
What takes more is a service that holds no trainer: `member`, `data`, `mixing_run`, `log`, `served_soup`, `evaluation`,
`checkpoint`, `refusals`; cards and uploads are in `publishing`.
"""

import atexit
import contextlib
import copy
import functools
import inspect
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, set_seed
from transformers.modeling_utils import unwrap_model
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LabelSmoother, find_batch_size
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    SaveStrategy,
    enable_full_determinism,
    has_length,
    rotate_checkpoints,
)
from transformers.utils import logging

from .. import __version__
from ..config import ENOUGH_SHUFFLES, LARGEST_FITTED_PROBABILITY, WashConfig
from ..hub.export import check_export, export_model, folder_problem, is_image_classifier, writing_here
from ..hub.push import LOCAL_MEMBERS
from ..population import MemberOverrides, Population, copy_member, share_frozen
from ..population.agreement import (
    check_agreement,
    check_same_architecture,
    describe_architecture,
    first_difference,
    weights_digest,
)
from ..population.consensus import ConsensusSample
from ..soup import has_batch_norm, recalibrate_batch_norm
from . import checkpoint as checkpoints
from . import evaluation, refusals
from .data import MemberBatches, MemberLoader, MembersLoader, has_labels, hold_out, shard_for_member
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


class PopulationMixin(Publishing):
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
        plain = type(self).compute_loss in (Trainer.compute_loss, WashTrainer.compute_loss)
        if not plain or self._makes_its_own_loader() or self.compute_loss_func is not None:
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

    # ---- Evaluate --------------------------------------------------------------------------------------------------

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """
        Metrics of the soup and, with `evaluate_members`, of each member and of the ensemble. Call on every process;
        every process gets the same dictionary.

        Args:
            *args, **kwargs: As in the Trainer's own `evaluate`.

        Returns:
            `dict[str, float]`: `eval_<metric>` of the soup, `eval_ensemble_<metric>` (mean of probabilities),
            `eval_member_<i>_<metric>`, and `eval_members_<metric>_mean`, `_min`, `_max`; `<metric>` includes `loss`.
        """
        with self._as_soup():
            before, self._evaluating = self._evaluating, True
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                self._evaluating = before

    def predict(self, *args, **kwargs):
        """The soup's predictions. Call on every process."""
        with self._as_soup():
            return super().predict(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """*Collective.* The Trainer's own loop over the soup, the members and their ensemble beside it batch by batch."""
        self._advance_streams()
        options = (description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._beside is not None or not self.args.evaluate_members or description != "Evaluation":
            return super().evaluation_loop(dataloader, *options)
        loss_only = prediction_loss_only if prediction_loss_only is not None else self.args.prediction_loss_only
        compute_metrics = None if loss_only else self.compute_metrics
        beside = evaluation.BesideTheSoup(
            self.population,
            self._ensemble_kind(),
            self._ensemble_loss,
            keep=compute_metrics is not None,
            preprocess=self.preprocess_logits_for_metrics,
        )
        models = self._members_for_evaluation()
        self._beside, self._beside_models = beside, models
        try:
            output = super().evaluation_loop(dataloader, *options)
        finally:
            self._beside = self._beside_models = None

        def summarize(of: evaluation.Predictions) -> dict[str, float]:
            return evaluation.summarize(
                of,
                compute_metrics,
                metric_key_prefix,
                include=self.args.include_for_metrics,
                by_batch=self.args.batch_eval_metrics,
                concatenate=self.args.eval_do_concat_batches,
                skip_non_finite_losses=self.args.logging_nan_inf_filter,
            )

        members = self.population.gather([summarize(own) for own in beside.members])
        ensemble = summarize(beside.ensemble) if beside.ensemble.batches else None
        metrics = evaluation.population_metrics(members, ensemble)
        metrics["consensus_distance"] = self.soup.consensus_distance
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        # Rank 0's for all: a user's `compute_metrics` may be anything.
        return output._replace(metrics=self.population.broadcast(output.metrics))

    def prediction_step(self, model: nn.Module, inputs, prediction_loss_only: bool, *args, **kwargs):
        """The soup's prediction for a batch and, in an evaluation, each member's beside it."""
        beside = self._beside
        if beside is None:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        result = super().prediction_step(model, copy.copy(inputs), prediction_loss_only, *args, **kwargs)
        results = []
        for member, prepared in zip(self.members, self._beside_models, strict=True):
            with self.population.streams.use(member.index), as_member(self, member):
                self.data_collator = self.soup.member.data_collator
                own = super().prediction_step(prepared, copy.copy(inputs), not beside.needs_logits, *args, **kwargs)
            results.append(own)
        kept = None
        if "inputs" in self.args.include_for_metrics:
            kept = inputs[getattr(self.model, "main_input_name", "input_ids")]
        labels = inputs.get(self.label_names[0]) if len(self.label_names) == 1 and hasattr(inputs, "get") else None
        # As often as the Trainer's loop counts the loss of a batch, whose last may be shorter.
        count = self.args.eval_batch_size or find_batch_size(inputs) or 1
        weight = len(self.gather_function(torch.zeros(count)))
        beside.add(results, weight, kept, labels)
        return result

    def _advance_streams(self) -> None:
        # Iterating over a data loader draws its base seed from the global generator (torch 2.15), so a plain run's
        # stream moves on by one draw with each evaluation; so must the members'.
        if self.is_in_train:
            for index in self.population.indices:
                with self.population.streams.use(index):
                    torch.empty((), dtype=torch.int64).random_()

    def _members_for_evaluation(self) -> list[nn.Module]:
        models = [member.prepare(self.accelerator) for member in self.members]
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            dtype = torch.float16 if self.args.fp16_full_eval else torch.bfloat16
            # Copies: the members stay as they are, since training can go on.
            models = [copy.deepcopy(model).to(dtype=dtype, device=self.args.device) for model in models]
        for model in models:
            model.eval()
        return models

    def _ensemble_kind(self) -> str | None:
        kind = evaluation.ensemble_kind(unwrap_model(self.model))
        if kind is None and not getattr(self, "_told_of_no_ensemble", False):
            self._told_of_no_ensemble = True
            logger.info(f"An ensemble of `{type(self.model).__name__}` is not defined: it is left out.")
        return kind

    def _ensemble_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of the ensemble's prediction, as a member's would be computed from its logits. A scalar."""
        labels = labels.cpu()
        if self.compute_loss_func is not None:
            return self.compute_loss_func({"logits": logits}, labels, num_items_in_batch=None)
        if self.label_smoother is not None and not labels.is_floating_point():
            return self.label_smoother({"logits": logits}, labels)
        kind = evaluation.ensemble_kind(unwrap_model(self.model))
        if kind == "regression":
            return nn.functional.mse_loss(logits.squeeze(), labels.float().squeeze())
        if kind == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        return nn.functional.cross_entropy(logits, labels)

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

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def _node(self) -> int:
        """The machine whose folder this process writes to; one for all without `save_on_each_node`."""
        if not self.args.save_on_each_node:
            return 0
        return self.args.process_index // int(os.environ.get("LOCAL_WORLD_SIZE", self.args.world_size))

    def _check_export_folder(self) -> None:
        """*Collective.* Find out before training, not at its end, that the soup cannot be written where it should go."""

    def _check_output_folder(self) -> None:
        """*Collective.* Find out before training, not at the first save, whether all processes see the folder."""
        if self.population.world_size == 1 or self.args.save_strategy == SaveStrategy.NO:
            return
        probe = f"_visible-{uuid.uuid4().hex}" if self.args.should_save else None
        probes = self.population.gather_processes((self._node(), probe))
        name = next(name for node, name in probes if node == self._node() and name is not None)
        path = Path(self.args.output_dir) / name

        def write():
            if probe is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

        self.population.do_together(f"Writing to `{self.args.output_dir}`", write)
        blind = [rank for rank, seen in enumerate(self.population.gather_processes(path.exists())) if not seen]
        if probe is not None:
            path.unlink(missing_ok=True)
        if blind:
            raise ValueError(
                f"`output_dir` ({self.args.output_dir}) of process 0 is not visible to process(es) "
                f"{', '.join(map(str, blind))}, so a checkpoint could not be put together. Use a shared folder, or "
                "`save_on_each_node=True` to keep each machine's members on that machine."
            )

    def _save_checkpoint(self, model, trial) -> None:
        """*Collective.* A whole population checkpoint, or none."""
        self.store_flos()
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_global_step
        if best and self.args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST):
            best_folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{best}")
            exists = self.population.broadcast(os.path.exists(best_folder))
            if best == self.state.global_step or exists:
                self.state.best_model_checkpoint = best_folder
        with self._as_soup():
            self._write_checkpoint(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _write_checkpoint(self, folder: Path) -> None:
        def write_soup(staging: Path) -> dict[str, torch.Tensor]:
            self._save(str(staging))
            self._state_with_callbacks().save_to_json(str(staging / "trainer_state.json"))
            return self._shared_frozen(self.population.wholes[0])

        def member_part(slot: int, index: int) -> tuple:
            whole = self.population.wholes[slot]
            weights = checkpoints.own_tensors(whole, self._shared_frozen(whole))
            if self.args.save_only_model:
                return weights, None, None
            return weights, *self._training_state(slot, index, whole)

        checkpoints.write(
            self.population,
            folder,
            node=self._node(),
            leads=self.args.should_save,
            write_soup=write_soup,
            member_part=member_part,
            describe=self._manifest,
        )

    def _shared_frozen(self, whole: nn.Module) -> dict[str, torch.Tensor]:
        """What all members share, written once: the frozen parameters, where all members started alike."""
        if not self.args.same_init:
            return {}
        return {name: p.detach().contiguous().cpu() for name, p in whole.named_parameters() if not p.requires_grad}

    def _state_with_callbacks(self):
        # As Trainer's `_save_checkpoint` does.
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks.get(name), list):
                    self.state.stateful_callbacks[name].append(state)
                else:
                    self.state.stateful_callbacks[name] = state
        return self.state

    def _training_state(self, slot: int, index: int, whole: nn.Module) -> tuple[dict, Any]:
        training = checkpoints.cut_out(self.optimizer, self.lr_scheduler, whole, index)
        training["loss"] = self._log.losses[slot].item()
        if self.accelerator.scaler is not None:
            training["scaler"] = self.accelerator.scaler.state_dict()
        streams = {"streams": self.population.streams.state(index), "loader": self._batches.loaders[slot].state()}
        return training, checkpoints.encode_streams(streams)

    def _manifest(self) -> dict[str, Any]:
        args, moved = self.args, self.mixing.state()
        names = ("mixing", "shuffle_probability", "shuffle_schedule", "shuffle_optimizer_state", "shuffle_interval")
        names += ("shuffle_start", "shuffle_stop", "same_init", "member_data", "data_seed", "soup")
        return {
            "hf_wash_version": __version__,
            "step": self.state.global_step,
            "total_steps": self._total_steps,
            "epoch": self._batches.epoch,
            "position": self._batches.position,
            "population_size": self.population.size,
            "seed": args.seed,
            "probability": self.mixing.probability,
            "options": {name: getattr(args, name) for name in names},
            "overrides": [overrides.describe() for overrides in self._overrides],
            "values_moved": moved["values_moved"],
            "bytes_exchanged": moved["bytes_exchanged"],
            "log_window": {"since": self._globalstep_last_logged, "moved": moved["moved"]},
            "architecture": describe_architecture(self.population.wholes[0]),
        }

    # ---- Resume ----------------------------------------------------------------------------------------------------

    def _resolve_checkpoint(self, requested) -> str | None:
        """*Collective.* The folder to resume from, checked, the same on every process; `None` for a fresh start."""
        self._resume = None
        if str(requested).lower() in ("true", "false") and not os.path.isdir(str(requested)):
            requested = str(requested).lower() == "true"  # as a command line gives it
        if not requested:
            return None
        found = checkpoints.resolve(self.population, self.args.output_dir, requested, leads=self.args.should_save)
        if found is None:
            return None
        folder, manifest = found
        self._adopt(manifest, folder)
        logger.info(f"Resuming from `{folder}`.")
        self._resume = {"folder": folder, "manifest": manifest, "streams": []}
        return folder

    def _adopt(self, manifest: dict[str, Any], folder: str) -> None:
        """Check that a checkpoint belongs to this run; take over its population size where none was asked for."""
        if manifest["population_size"] != self.population.size:
            self._adopt_size(manifest["population_size"], folder)
        theirs = checkpoints.as_architecture(manifest["architecture"])
        buffers = {name for name, _ in self.population.wholes[0].named_buffers()}
        # A buffer may have grown while training.
        own, theirs = (
            [(name, None if name in buffers else shape, *rest) for name, shape, *rest in entries]
            for entries in (describe_architecture(self.population.wholes[0]), theirs)
        )
        difference = first_difference(own, theirs)
        if difference is not None:
            raise ValueError(f"Cannot resume: `{folder}` holds another architecture, {difference}.")
        if manifest["seed"] != self.args.seed:
            raise ValueError(
                f"Cannot resume: `{folder}` was shuffled with seed {manifest['seed']}, this run's is {self.args.seed}."
            )
        changed = [
            f"{name} was {value!r} and is {getattr(self.args, name)!r}"
            for name, value in manifest["options"].items()
            if getattr(self.args, name) != value
        ]
        if changed:
            logger.warning(f"Resuming with other options than `{folder}` was written with: {'; '.join(changed)}.")

    def _adopt_size(self, size: int, folder: str) -> None:
        if self.args.population_size is not None or self._trainings:
            raise ValueError(
                f"Cannot resume: `{folder}` holds a population of {size}, this run's is {self.population.size}."
            )
        if any(any(overrides.describe().values()) for overrides in self._overrides):
            raise ValueError(f"`members` lists {len(self._overrides)} members, but `{folder}` holds {size}.")
        self._overrides = [MemberOverrides() for _ in range(size)]
        start, first = self.population.members[0], size // self.population.world_size * self.population.rank
        self.population = self._empty_population(size)
        if self.model_init is None:
            self._populate(lambda index: start if index == first else copy_member(start))
            self._place_members()
        else:
            self.call_model_init()
        self._become(self.population.members[0])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        frozen = folder / checkpoints.FROZEN
        self.members  # noqa: B018
        for index, whole in zip(self.population.indices, self.population.wholes, strict=True):
            checkpoints.read_weights(whole, folder / f"member_{index}" / checkpoints.MEMBER_WEIGHTS)
            if frozen.is_file():
                checkpoints.read_weights(whole, frozen)
        self.soup.forget()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        parts = {}
        for index in self.population.indices:
            training, streams = checkpoints.read_training(Path(checkpoint) / f"member_{index}")
            parts[index] = training
            self._resume["streams"].append(checkpoints.decode_streams(streams))
        self._resume["parts"] = parts
        wholes = dict(zip(self.population.indices, self.population.wholes, strict=True))
        checkpoints.put_together(self.optimizer, self.lr_scheduler, wholes, parts)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.accelerator.scaler is None:
            return
        state = self._resume["parts"][self.population.indices[0]].get("scaler")
        if state is not None:
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The members' streams are restored where their batches are drawn.
        return

    def _continue_from(self, resume: dict[str, Any], epoch: int, placeholders: int) -> None:
        manifest, parts = resume["manifest"], resume["parts"]
        self._batches.resume_at(epoch, placeholders, manifest, resume["streams"])
        window = manifest["log_window"]
        self.mixing.resume(manifest["values_moved"], manifest["bytes_exchanged"], window["moved"])
        self._globalstep_last_logged = window["since"]
        self._log = MemberLog(self.population, [parts[index]["loss"] for index in self.population.indices])

    def _load_best_model(self) -> None:
        """*Collective.* Members and soup of the best checkpoint."""
        folder = self.state.best_model_checkpoint
        logger.info(f"Loading the best population from {folder} (score: {self.state.best_metric}).")
        self._load_from_checkpoint(folder)
        self._serve_soup()

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


class WashTrainer(PopulationMixin, Trainer):
    """
    Trains a population of models that exchange a small random part of their weights after every optimizer step, as in
    [WASH](https://hf.co/papers/2405.17517), and averages them into one *soup*. See [`PopulationMixin`] for what a
    member is, and what the Trainer's model is when.

    For image classifiers it knows more than for other models: soft labels of shape `(batch, num_labels)`, where the
    collator says by an attribute `soft_labels` that it makes them, get the soft cross-entropy; and what it saves is
    loadable by transformers and, for a timm model, by timm.

    Args:
        model ([`~transformers.PreTrainedModel`] or `torch.nn.Module`, *optional*):
            The model all members start as. Pass this or `model_init`. A timm model goes in as
            [`~transformers.TimmWrapperForImageClassification`].
        args ([`WashConfig`], *optional*):
            The options. Batch size, learning rate, epochs and so on are those of one member.
        members (`list[MemberOverrides]`, *optional*):
            For each of the N members, what it does differently.
        *further, **named:
            As in [`~transformers.Trainer`], in its order.

    Example:

    ```python
    >>> from hf_wash import WashConfig, WashTrainer

    >>> args = WashConfig("soup", population_size=4, num_train_epochs=20)
    >>> trainer = WashTrainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    >>> trainer.train()
    >>> trainer.save_model()  # the soup; AutoModelForImageClassification.from_pretrained("soup") loads it
    ```
    """

    def __init__(self, model=None, args: WashConfig | None = None, *further, **named):
        super().__init__(model, args if args is not None else WashConfig(output_dir="tmp_trainer"), *further, **named)

    _example: dict[str, Any] | None = None

    def training_step(self, model: nn.Module, inputs: list, *args, **kwargs):
        """As [`PopulationMixin`]'s; two examples are remembered, to compare what is saved on."""
        if self._example is None and hasattr(inputs[0], "items"):
            self._example = {name: value[:2] for name, value in inputs[0].items() if isinstance(value, torch.Tensor)}
        return super().training_step(model, inputs, *args, **kwargs)

    def _has_soft_labels(self, inputs) -> bool:
        labels = inputs.get("labels") if hasattr(inputs, "get") else None
        makes_them = getattr(self.data_collator, "soft_labels", False)
        return makes_them and isinstance(labels, torch.Tensor) and labels.is_floating_point()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        # An example with soft labels is one item, not one for each class.
        counted = [
            {**batch, "labels": batch["labels"].new_zeros(len(batch["labels"]), dtype=torch.long)}
            if self._has_soft_labels(batch)
            else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """
        The Trainer's loss; the soft labels of a collator that says so get the soft cross-entropy.

        transformers (5.23) would take floating-point labels for a multi-label task, use another loss and write that
        `problem_type` into the model's configuration.
        """
        if self.compute_loss_func is not None or not self._has_soft_labels(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        smoothing = self.label_smoother.epsilon if self.label_smoother is not None else 0.0
        losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        items = (
            num_items_in_batch if self.model_accepts_loss_kwargs and num_items_in_batch is not None else len(labels)
        )
        loss = losses.sum() / items
        return (loss, outputs) if return_outputs else loss

    def _check_export_folder(self) -> None:
        member, folder = unwrap_model(self.population.members[0]), self.args.output_dir
        problem = folder_problem(member, folder) if self.args.should_save and is_image_classifier(member) else None
        for found in self.population.gather_processes(problem):
            if found is not None:
                raise ValueError(found)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = unwrap_model(self.model)
        if not is_image_classifier(model):
            super()._save(output_dir, state_dict)
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        if self.args.should_save:
            export_model(model, folder, processing_class=self.processing_class, state_dict=state_dict, check=False)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the soup; the final one, of an image classifier, is loaded back with every loader and compared, once."""
        super().save_model(output_dir, _internal_call)
        model = unwrap_model(self.model)
        if not (self.args.should_save and self.soup.served and is_image_classifier(model)) or self.soup.is_checked:
            return
        self.soup.is_checked = True
        folder = output_dir if output_dir is not None else self.args.output_dir
        try:
            check_export(folder, model, processing_class=self.processing_class, example=self._example)
        except (RuntimeError, ValueError) as problem:
            logger.warning(f"The soup is saved, but its folder could not be shown to load everywhere: {problem}")
