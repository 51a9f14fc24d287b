"""
[`PopulationMixin`]: a population in the place of a Trainer's one model, in the order of a run.

Each seam of the [`~transformers.Trainer`] is a few lines here and calls `super()` for each member, or for the soup.
What takes more is a service that holds no trainer: `member`, `data`, `mixing_run`, `log`, `served_soup`, `evaluation`,
`checkpoint`, `dry_run`, `refusals`. The seams by which members are made (`populating`), a run is tried out
(`checking`), the soup is served (`serving`), and those of evaluation, checkpoints and publishing have files of their
own; what they share is said in `part`.
"""

import atexit
import functools
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer
from transformers.modeling_utils import unwrap_model
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..hub.export import writing_here
from ..hub.push import LOCAL_MEMBERS
from ..population import MemberOverrides, copy_member
from ..population.agreement import check_agreement
from ..population.failures import known_to_all
from ..progress import bar_of
from . import refusals
from .agreeing import Agreeing
from .checking import Checking
from .checkpointing import Checkpointing
from .data import MemberBatches, MemberLoader, MembersLoader, hold_out, shard_for_member
from .evaluating import Evaluating
from .exchanging import Exchanging
from .log import MemberLog
from .member import LocalMembers, as_member
from .populating import Populating
from .publishing import Publishing
from .replaying import Replaying
from .reporting import Reporting
from .requests import Requests
from .run_folder import MadeFolders, leaves_no_empty_folder
from .served_soup import NonFiniteMemberError, ServedSoup, not_finite, what_becomes_of
from .serving import Serving


logger = logging.get_logger(__name__)

DEFAULT_POPULATION_SIZE = 4


@functools.cache
def _end_process_group_at_exit() -> None:
    # gloo aborts a process whose group is still alive when the interpreter ends, after everything has been saved.
    def end() -> None:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(end)


class PopulationMixin(
    Checking, Replaying, Populating, Agreeing, Exchanging, Serving, Evaluating, Checkpointing, Reporting, Publishing
):
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

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        for base in order[1 : order.index(PopulationMixin)]:
            if issubclass(base, Trainer) and not issubclass(base, PopulationMixin):
                # What it overrides would be called for the population, not for each member.
                raise ValueError(
                    f"`PopulationMixin` must be the first base of `{cls.__name__}`, found it behind `{base.__name__}`."
                )

    def __init__(self, *args, members: list[MemberOverrides] | None = None, **kwargs):
        given = self._arguments_by_name(args, kwargs)
        config: Any = given.get("args")
        refusals.refuse_trainer(type(self))
        refusals.refuse_args(config)
        self.args = config
        self._made_folders = MadeFolders(config.output_dir)
        with self._made_folders.none_stays_empty(), self._told_to_all():
            self._build_population(given, members, lambda: super(PopulationMixin, self).__init__(*args, **kwargs))

    def _build_population(
        self, given: dict[str, Any], members: list[MemberOverrides] | None, make_trainer: Callable
    ) -> None:
        config, model = self.args, given.get("model")
        refusals.refuse_settings(config, model)
        size = config.population_size or (config.world_size if config.world_size > 1 else DEFAULT_POPULATION_SIZE)
        refusals.refuse_for_several(config, size, model, given.get("optimizers") or (None, None))
        if members is not None and len(members) != size:
            raise ValueError(f"`members` lists {len(members)} members, but the population has {size}.")
        _end_process_group_at_exit()
        self.population = self._empty_population(size)
        self._overrides = members if members is not None else [MemberOverrides() for _ in range(size)]
        self._members = None
        self._given_optimizer = (given.get("optimizers") or (None, None))[0] is not None
        self.soup = ServedSoup()
        self._mixing = self._member_log = None
        self._line: tuple[dict[str, float], float] | None = None
        self._beside = None
        self._trainings = self._total_steps = self._steps_per_epoch = 0
        self._evaluating = False
        self._resume = None

        # Trainer's own just-in-time checkpointing saves at different steps on different processes.
        jit_checkpoint, config.enable_jit_checkpoint = config.enable_jit_checkpoint, False
        try:
            make_trainer()
        finally:
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
        parameters = dict(inspect.signature(super().__init__).parameters)
        if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
            parameters = dict(inspect.signature(Trainer.__init__).parameters)
            del parameters["self"]
        return {**dict(zip(parameters, args, strict=False)), **kwargs}

    def hyperparameter_search(self, *args, **kwargs):
        """
        As the Trainer's: each trial trains and scores a whole population.

        Raises:
            ValueError: without `model_init`; and if there are several processes, since a trial that is pruned ends on
                process 0 alone and the others would wait for it.
        """
        if self.model_init is None:
            raise ValueError("`hyperparameter_search` needs `model_init`: each trial starts with a new population.")
        if self.population.world_size > 1:
            raise ValueError(
                "`hyperparameter_search` needs one process that hosts the whole population, found "
                f"{self.population.world_size}: a trial that is pruned would end on one of them alone."
            )
        return super().hyperparameter_search(*args, **kwargs)

    def _hp_search_setup(self, trial) -> None:
        super()._hp_search_setup(trial)
        if trial is None:
            return
        # What a trial sets is set after the members have been made.
        self.args._check_population_options()
        if self.args.population_size not in (None, self.population.size):
            raise ValueError(
                f"A trial cannot set `population_size` (here {self.args.population_size}, the population has "
                f"{self.population.size} members): start one search for each."
            )

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
        del self.__dict__["get_train_dataloader"]
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

    # ---- Begin a run -----------------------------------------------------------------------------------------------

    @leaves_no_empty_folder
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
        with self._told_to_all():
            _ = self.members  # made here, while the Trainer's model is still the first member
            self._bring_members_up_to_date()
            self._check_before_training(resume_from_checkpoint)
            self._check_export_folder()
            resume_from_checkpoint = self._resolve_checkpoint(resume_from_checkpoint)
            self._check_output_folder()
            self._trainings += 1
            self.soup.served = False
            self._freeze_alike()
            self._become(self.population.members[0], self.members[0])
            return self._train_population(resume_from_checkpoint, trial, ignore_keys_for_eval, **kwargs)

    def _train_population(self, resume_from_checkpoint, trial, ignore_keys_for_eval, **kwargs):
        args = self.args
        requests = Requests(self.callback_handler, args.world_size, args.ddp_timeout, args.enable_jit_checkpoint)
        try:
            with requests as self._requests:
                return super().train(
                    resume_from_checkpoint=resume_from_checkpoint,
                    trial=trial,
                    ignore_keys_for_eval=ignore_keys_for_eval,
                    **kwargs,
                )
        finally:
            self.__dict__.pop("get_train_dataloader", None)
            self.population.streams.activate(None)

    def _inner_training_loop(self, *args, **kwargs):
        _ = self.members  # `model_init` may have made new ones
        self._bring_members_up_to_date()
        for member in self.population.members[1:]:
            self._enable_activation_checkpointing(member)  # Trainer has enabled it on the model it knows
        self._attach_diagnostics()
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
        self._steps_per_epoch, self._total_steps = values[1], values[-1]
        batches = [
            len(loader.dataloader) if has_length(loader.dataloader) else None for loader in self._batches.loaders
        ]
        batches = self.population.gather(batches)
        if len(set(batches)) > 1:
            listing = ", ".join(f"member {index}: {count}" for index, count in enumerate(batches))
            told = (
                "Members must take the same number of steps, or the others would wait for one that has finished, but "
                f"they have different numbers of batches an epoch ({listing})."
            )
            raise known_to_all(ValueError(told))
        check_agreement(self.population, self._what_must_agree_about_steps(self._steps_per_epoch))
        self._check_times()
        return values

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
        self._note_base_rates()
        return self.optimizer

    def _wrap_model(self, model, training: bool = True, dataloader=None):
        # Trainer prepares what is not wrapped, which means DDP; so autocast and compilation are prepared here.
        if training:
            return LocalMembers([member.prepare(self.accelerator) for member in self.members])
        known = [*self.members, *([self.soup.member] if self.soup.is_built else [])]
        return next((m.prepare(self.accelerator) for m in known if m.model is model), model)

    def _prepare_for_training(self, *args, **kwargs):
        self._end_exchanges()  # of a run before
        model, _ = super()._prepare_for_training(*args, **kwargs)
        self._log = MemberLog(self.population)
        self._begin_exchanges(model)
        loader = self._batches.as_dataloader()
        self.callback_handler.train_dataloader = loader
        return model, loader

    def _run_epoch(self, *args, **kwargs):
        if self._stops_because_finished():
            return None
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
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._line = self._collect_line()
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def _collect_line(self) -> tuple[dict[str, float], float]:
        """*Collective.* What a log line says of the members, and the sum of this call's losses after it."""
        steps = self.state.global_step - self._globalstep_last_logged
        line, added = self._log.line(
            self.state.global_step, steps, [self._learning_rate_of(index) for index in self.population.indices]
        )
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
        rates = self._log.rates if not plateau and hasattr(self.lr_scheduler, "get_last_lr") else None
        rate = rates[position] if rates is not None else groups[position]["lr"]
        return float(rate) if rate is not None else None

    def _get_learning_rate(self):
        # Called after the optimizer's step and before the scheduler's: remember all groups' rates, not the first's.
        if self._member_log is not None:
            rates = getattr(self.lr_scheduler, "get_last_lr", lambda: None)()
            self._log.rates = list(rates) if rates is not None else None
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log a dictionary; a line about training is completed with what is known of each member."""
        line = self._line if "loss" in logs else None
        if line is not None:
            self._line = None
            members, total = line
            logs.update(members)
            # Trainer has added its own mean, whose rounding depends on the number of processes.
            self._total_loss_scalar = total
        if "train_loss" in logs:
            logs.update(self._figures_of_before or {})
        if "train_loss" in logs and self.soup.served:
            logs.update({f"member_{index}_left_out": 1 for index in self.soup.left_out})
        if self._evaluating and any(key.endswith("_runtime") for key in logs):
            # What depends on the clock, on a GPU's last bit or on chance is process 0's, for the best model is to be one.
            logs.update(self.population.broadcast(dict(logs)))
        super().log(logs, *args, **kwargs)
        if line is not None:
            self._requests.agree("on_log", self.state, self.control)

    def _finalize_training(self, trial, num_train_samples, *args, **kwargs):
        self._finish_without_training()
        # What has not been logged yet.
        step = self.state.global_step
        added = self._log.collect(step, step - self._globalstep_last_logged)[-1]
        self._tr_loss = torch.tensor(added, dtype=torch.float64)
        if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None):
            self._serve_soup()  # else the best checkpoint's, whatever has become of the members since
        # Of all members, as the time is.
        result = super()._finalize_training(trial, num_train_samples * self.population.size, *args, **kwargs)
        if self._figures_of_before:
            result = result._replace(training_loss=self._figures_of_before.get("train_loss", result.training_loss))
            self._figures_of_before = None
        if self.args.push_members:
            self.save_members()
        self._report_at_the_end()
        return result

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
        if not self.args.should_save:
            return  # not every Trainer asks by itself (sentence-transformers 6.2)
        with writing_here(unwrap_model(self.model)):
            super()._save(output_dir, state_dict)

    def save_members(self, output_dir: str | None = None) -> None:
        """
        *Collective: call on every process.* Save each member, loadable by itself, under `_members/member_<i>/`.

        Members that hold NaN or infinite values are left out, with a warning.

        Args:
            output_dir (`str`, *optional*): Defaults to the configuration's.

        Raises:
            NonFiniteMemberError: on every process, if no member is finite.
        """
        folder = os.path.join(output_dir if output_dir is not None else self.args.output_dir, LOCAL_MEMBERS)
        with self._told_to_all(), self.population.streams.use(None):
            left_out, step = not_finite(self.population), self.state.global_step
            if len(left_out) == self.population.size:
                raise known_to_all(NonFiniteMemberError(left_out, step, "so none of them is saved."))
            if left_out and self.is_world_process_zero():
                logger.warning(what_becomes_of(left_out, step, "not saved among the members."))
            kept = {f"member_{index}" for index in range(self.population.size) if index not in left_out}
            for path in Path(folder).glob("member_*") if self.args.should_save else ():
                # An earlier run's would be taken for members of this one.
                if path.name not in kept:
                    logger.warning(f"`{path}` is removed: it is not of this population.")
                    shutil.rmtree(path)
            own = [member for member in self.members if member.index not in left_out]
            with bar_of("saving the members", len(own), self._quiet) as bar:
                for member in own:
                    place = os.path.join(folder, f"member_{member.index}")
                    with as_member(self, member):
                        self._save(place)
                    # What is said once, at the root.
                    Path(place, "training_args.bin").unlink(missing_ok=True)
                    bar.update()
            self.population.gather_processes(None)

    def _check_export_folder(self) -> None:
        """*Collective.* Find out before training, not at its end, that the soup cannot be written where it should go."""
