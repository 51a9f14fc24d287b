"""
[`WashTrainer`]: a population in the place of one model. Thin overrides of the [`~transformers.Trainer`]'s seams, and
the only file that knows them.

What happens in a step, and which room does it: a batch for each member (`data`), each member's own forward, backward
and clipping (here), one optimizer step, the exchange (`mixing`). What the user calls between steps is the soup
(`soup`), evaluated beside its members (`evaluation`) and saved for the Hub (`hub`).
"""

import contextlib
import copy
import math
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.modeling_utils import unwrap_model
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    HubStrategy,
    SaveStrategy,
    enable_full_determinism,
    has_length,
    rotate_checkpoints,
)
from transformers.utils import PushInProgress, logging

from .. import __version__
from ..config import ENOUGH_SHUFFLES, WashConfig
from ..hub import export_model
from ..hub.card import WashCard
from ..hub.describe import describe_run
from ..hub.export import folder_problem
from ..hub.push import (
    PushError,
    create_repository,
    explain,
    push_folder,
    push_in_background,
    remove_snapshots,
    root_files,
)
from ..hub.record import last_evaluation, write_record
from ..mixing import WashMixer
from ..population import MemberOverrides, Population, copy_member, share_frozen
from ..population.agreement import (
    check_agreement,
    check_same_architecture,
    describe_architecture,
    first_difference,
    weights_digest,
)
from ..population.consensus import ConsensusSample, squared_distance
from ..soup import GreedySoupRecord, greedy_soup, has_batch_norm, recalibrate_batch_norm, uniform_soup
from . import checkpoint as checkpoints
from . import evaluation
from .data import (
    MemberBatches,
    MemberLoader,
    OneProcessLoaders,
    deal_batches,
    has_labels,
    hold_out,
    shard_for_member,
)


logger = logging.get_logger(__name__)

MEMBERS_FOLDER = "_members"
DEFAULT_POPULATION_SIZE = 4
# Above it members are hardly members any more: half of a first layer would change hands at each step.
LARGEST_SENSIBLE_PROBABILITY = 0.5
# Seeds of what is drawn outside of the members' streams: far from those of members, `seed + k`.
RECALIBRATION_SEED_OFFSET, HOLDOUT_SEED_OFFSET = 1_000_003, 1_000_033


class _LocalMembers(nn.Module):
    """What the Trainer's loop takes for the model: this process's members. It is never called."""

    def __init__(self, members: list[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)


class _MixAfterOptimizerStep(TrainerCallback):
    """The exchange: after every optimizer step, before the step is logged, evaluated or saved."""

    def __init__(self, trainer: "WashTrainer"):
        self._trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._trainer._mix(state.global_step + 1)

    def on_train_begin(self, args, state, control, **kwargs):
        if args.enable_jit_checkpoint:
            self._trainer._stop_signal = _StopSignal()

    def on_step_end(self, args, state, control, **kwargs):
        if self._trainer._stop_agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self._trainer._stop_signal is not None:
            self._trainer._stop_signal.release()
            self._trainer._stop_signal = None


class _StopSignal:
    """
    SIGTERM as a request to stop at the next step. Trainer's own just-in-time checkpointing (5.23) saves wherever the
    signal finds each process, at different steps; here the request travels with the exchange, and all processes save
    at the step they agree on.
    """

    # As Trainer's: a SIGKILL that follows at once leaves no time for a checkpoint, so do not begin one.
    WAIT_SECONDS = 3

    def __init__(self):
        self.requested = False
        self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        logger.info(f"SIGTERM received: a checkpoint is written in {self.WAIT_SECONDS} s, and training stops.")
        timer = threading.Timer(self.WAIT_SECONDS, self._request)
        timer.daemon = True
        timer.start()

    def _request(self) -> None:
        self.requested = True

    def release(self) -> None:
        """Give the signal back."""
        signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)


class WashTrainer(Trainer):
    """
    Trains a population of models that exchange a small random part of their weights after every optimizer step, as in
    [WASH](https://hf.co/papers/2405.17517), and averages them into one *soup*.

    It takes the Trainer's arguments. Member k is a plain one-process Trainer run with the seed `seed + k` and, unless
    `same_init=False`, member 0's initial weights; without mixing it is that run bit for bit. Members are dealt to the
    processes that `accelerate launch` or `torchrun` start, several to a process where there are more members than
    processes; the result does not depend on how (on a CPU with the same number of threads, bit for bit).

    While training, `trainer.model` is this process's first member. In `evaluate`, `predict` and when saving, and after
    `train`, it is the soup, on every process. The members are `trainer.population.members` and stay as they are.

    Args:
        model ([`~transformers.PreTrainedModel`] or `torch.nn.Module`, *optional*):
            The model all members start as. Pass this or `model_init`. A timm model goes in as
            [`~transformers.TimmWrapperForImageClassification`].
        args ([`WashConfig`], *optional*):
            The options. Batch size, learning rate, epochs and so on are those of one member.
        members (`list[MemberOverrides]`, *optional*):
            For each of the N members, what it does differently.
        data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func, compute_metrics, \
        callbacks, optimizer_cls_and_kwargs, preprocess_logits_for_metrics:
            As in [`~transformers.Trainer`].
        optimizers (*optional*):
            Refused for more than one member, whose parameters an optimizer made before them cannot hold: use
            `optim` or `optimizer_cls_and_kwargs`.

    Raises:
        ValueError: before anything has happened, for what cannot work: a population that does not divide among the
            processes, members that differ, DeepSpeed, FSDP or tensor parallelism (not supported yet), ...

    Example:

    ```python
    >>> from hf_wash import WashConfig, WashTrainer

    >>> args = WashConfig("soup", population_size=4, shuffle_probability=0.05, num_train_epochs=20)
    >>> trainer = WashTrainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    >>> trainer.train()
    >>> trainer.save_model()  # the soup; AutoModelForImageClassification.from_pretrained("soup") loads it
    ```
    """

    def __init__(
        self,
        model=None,
        args: WashConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        members: list[MemberOverrides] | None = None,
    ):
        if args is None:
            args = WashConfig(output_dir="tmp_trainer")
        self._refuse_what_cannot_work(args, model, model_init, optimizers, members)
        self.args = args
        size = args.population_size or (args.world_size if args.world_size > 1 else DEFAULT_POPULATION_SIZE)
        self.population = Population(size, args.device, args.process_index, args.world_size)
        if members is not None and len(members) != size:
            raise ValueError(f"`members` lists {len(members)} members, but the population has {size}.")
        self._overrides = members if members is not None else [MemberOverrides() for _ in range(size)]
        if size > 1 and any(part is not None for part in optimizers):
            raise ValueError(
                f"`optimizers` cannot serve a population of {size}: it was made before the members. Use `optim` or "
                "`optimizer_cls_and_kwargs`."
            )

        self.mixer: WashMixer | None = None
        self._soup: nn.Module | None = None
        self._soup_key: tuple | None = None
        self.greedy_record: GreedySoupRecord | None = None
        self._is_soup = False
        self._prepared: dict[int, nn.Module] = {}
        self._trainings = 0
        self._total_steps = 0
        self._evaluating = False
        self._member_logs: dict[str, float] | None = None
        self._last_rates: list[float] | None = None
        self._stop_signal: _StopSignal | None = None
        self._stop_agreed = False
        self._resume: dict[str, Any] | None = None
        # Of all members since the run began; the seconds are this process's, those spent in the collective beside.
        self.values_moved = self.bytes_exchanged = 0
        self.mixing_seconds = self.mixing_wait_seconds = 0.0

        # Trainer's own just-in-time checkpointing saves at different steps on different processes.
        jit_checkpoint, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        args.enable_jit_checkpoint = jit_checkpoint
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            which = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
            raise ValueError(
                f"{which} is not supported yet: start a plain `accelerate launch --multi_gpu` or `torchrun`."
            )
        if model_init is None:
            self._populate(
                lambda index: self.model if index == self.population.indices[0] else copy_member(self.model)
            )
            self._set_model(self.population.members[0])
        self._place_members()
        self._smoothers = [self._smoother_of(overrides) for overrides in self._overrides]
        # First, so that other callbacks see the population as it is after the exchange.
        self.callback_handler.callbacks.insert(0, _MixAfterOptimizerStep(self))

    # ---- What cannot work ----------------------------------------------------------------------------------------

    @staticmethod
    def _refuse_what_cannot_work(args, model, model_init, optimizers, members) -> None:
        if not isinstance(args, WashConfig):
            found = "`TrainingArguments`" if isinstance(args, TrainingArguments) else f"`{type(args).__name__}`"
            raise ValueError(f"`args` must be a `WashConfig`, found {found}.")
        problem = _folder_problem(Path(args.output_dir)) if args.should_save else None
        if problem is not None:
            raise ValueError(f"`output_dir` ({args.output_dir}) {problem}.")
        if args.deepspeed:
            raise ValueError("DeepSpeed is not supported yet: remove `deepspeed`.")
        if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                "FSDP is not supported yet: remove `fsdp`, or the FSDP section of the launch configuration."
            )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise ValueError("DeepSpeed is not supported yet: remove it from the launch configuration.")
        if args.parallelism_config is not None or (getattr(model, "tp_size", None) or 1) > 1:
            raise ValueError(
                "Tensor, context and sequence parallelism are not supported yet: one device must hold a member."
            )
        if args.auto_find_batch_size and args.world_size > 1:
            raise ValueError(
                "`auto_find_batch_size` works on one process only: each process would settle on a batch size of its own."
            )
        if not args.same_init and model is not None:
            raise ValueError(
                "`same_init=False` needs `model_init`, a function that makes a model: a given `model` is one start only."
            )
        if args.neftune_noise_alpha is not None or args.use_liger_kernel:
            raise ValueError(
                "`neftune_noise_alpha` and `use_liger_kernel` patch one model and cannot serve a population."
            )
        if str(args.optim).rsplit(".", 1)[-1].lower() in ("lomo", "adalomo") or "layerwise" in str(args.optim):
            raise ValueError(
                f"`optim={args.optim}` steps inside the backward pass, where members cannot be told apart."
            )
        if args.world_size > 1 and args.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "`train_sampling_strategy='batch_rebalance'` deals one data set to all processes; members see all of it."
            )
        if args.world_size > 1 and (args.accelerator_config.split_batches or args.accelerator_config.dispatch_batches):
            raise ValueError(
                "`split_batches` and `dispatch_batches` deal one batch to all processes; each member draws its own batches."
            )
        if model is not None and args.world_size > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            raise ValueError("`SyncBatchNorm` would mix the statistics of members: use plain BatchNorm layers.")

    def hyperparameter_search(self, *args, **kwargs):
        """Not supported: a trial would have to rebuild the population on all processes alike."""
        raise ValueError("`hyperparameter_search` is not supported for a population: start one run for each setting.")

    # ---- The population ------------------------------------------------------------------------------------------

    def call_model_init(self, trial=None) -> nn.Module:
        """A new population from `model_init`, called for each member with its own seed. Returns the first local one."""
        self.population = Population(
            self.population.size, self.args.device, self.args.process_index, self.args.world_size
        )
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
        self._prepared = {}
        self._soup = self._soup_key = None
        self._consensus_sample = ConsensusSample(population.members[0])
        self._data_seeds = [
            self.args.data_seed + index if self.args.data_seed is not None else None
            for index in range(population.size)
        ]

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

    def _set_model(self, model: nn.Module) -> None:
        self.model = self.model_wrapped = model
        if hasattr(self, "callback_handler"):
            self.callback_handler.model = model

    def _smoother_of(self, overrides: MemberOverrides) -> LabelSmoother | None:
        factor = overrides.label_smoothing_factor
        if factor is None:
            return self.label_smoother
        return LabelSmoother(epsilon=factor) if factor else None

    @contextlib.contextmanager
    def _acting_as(self, index: int) -> Iterator[None]:
        """Let the Trainer's own methods see member `index`'s data, collator and options."""
        overrides = self._overrides[index]
        before = (
            self.train_dataset,
            self.data_collator,
            self.args.learning_rate,
            self.args.weight_decay,
            self.label_smoother,
        )
        if overrides.train_dataset is not None:
            self.train_dataset = overrides.train_dataset
        if self.train_dataset is not None and self._holds_out():
            self.train_dataset = hold_out(self.train_dataset, self.args.soup_holdout, self.args.seed)[0]
        if self.args.member_data == "shard" and self.train_dataset is not None and overrides.train_dataset is None:
            self.train_dataset = shard_for_member(self.train_dataset, index, self.population.size)
        if overrides.data_collator is not None:
            self.data_collator = overrides.data_collator
        if overrides.learning_rate is not None:
            self.args.learning_rate = overrides.learning_rate
        if overrides.weight_decay is not None:
            self.args.weight_decay = overrides.weight_decay
        self.label_smoother = self._smoothers[index]
        try:
            yield
        finally:
            (
                self.train_dataset,
                self.data_collator,
                self.args.learning_rate,
                self.args.weight_decay,
                self.label_smoother,
            ) = before

    # ---- Data ----------------------------------------------------------------------------------------------------

    def _holds_out(self) -> bool:
        return self.args.soup == "greedy" and self.population.size > 1

    def _get_dataloader(self, *args, **kwargs):
        return self._one_process_dataloader(None, *args, **kwargs)

    def _one_process_dataloader(self, data_seed: int | None, *args, **kwargs):
        accelerator = self.accelerator
        self.accelerator = cast(Any, OneProcessLoaders(accelerator, data_seed))
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.accelerator = accelerator

    def _member_dataloader(self, index: int):
        """The training loader a plain one-process run of member `index` would have."""
        with self._acting_as(index):
            if self.train_dataset is None:
                raise ValueError("Training needs a `train_dataset`.")
            return self._one_process_dataloader(
                self._data_seeds[index],
                dataset=self.train_dataset,
                description="Training",
                batch_size=self._train_batch_size,
                sampler_fn=self._get_train_sampler,
                is_training=True,
            )

    def get_train_dataloader(self):
        """A loader whose batches are lists, one batch for each member of this process."""
        loaders = []
        for index in self.population.indices:
            with self.population.streams.use(index):
                dataloader = self._member_dataloader(index)
            loaders.append(
                MemberLoader(dataloader, index, self.population, self.args.accelerator_config.non_blocking or False)
            )
        self._batches = MemberBatches(loaders, self.population)
        return self._batches.as_dataloader()

    def num_examples(self, dataloader) -> int:
        """Examples in the training set of the first local member, or in the loader's data set."""
        if isinstance(getattr(dataloader, "dataset", None), MemberBatches):
            return super().num_examples(dataloader.dataset.loaders[0].dataloader)
        return super().num_examples(dataloader)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Examples in one optimizer step of one member."""
        return self._train_batch_size * args.gradient_accumulation_steps

    def _check_holdout(self) -> None:
        data = [overrides.train_dataset for overrides in self._overrides] + [self.train_dataset]
        lengths = {len(own) if has_length(own) else None for own in data if own is not None}
        if len(lengths) > 1:
            raise ValueError(
                "`soup='greedy'` holds out the same examples of every member's training set, by their position, so "
                f"those must be views of one set; they have {len(lengths)} different lengths."
            )

    def _check_data(self) -> None:
        if self._holds_out():
            self._check_holdout()
        for index in self.population.indices:
            with self._acting_as(index):
                data = self.train_dataset
                if data is None:
                    raise ValueError("Training needs a `train_dataset`.")
                if not has_length(data):
                    continue
                if len(data) == 0:
                    raise ValueError(f"The training set of member {index} is empty.")
                if self.compute_loss_func is not None or self.can_return_loss or not self.label_names:
                    continue
                if type(self).compute_loss is not WashTrainer.compute_loss:
                    continue
                streams = self.population.streams
                before = streams.capture()
                try:
                    loader = self._member_dataloader(index)
                    if not has_labels(loader.dataset, loader.collate_fn, self.label_names):
                        raise ValueError(
                            f"The training set of member {index} has no labels: a batch has none of "
                            f"{', '.join(self.label_names)}."
                        )
                finally:
                    streams.restore(before)

    # ---- Training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
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
        self._check_data()
        self._check_export_folder()
        resume_from_checkpoint = self._resolve_checkpoint(resume_from_checkpoint)
        self._check_output_folder()
        self._trainings += 1
        self._is_soup = False
        self._stop_agreed = False
        self._set_model(self.population.members[0])
        try:
            return super().train(
                resume_from_checkpoint=resume_from_checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
            )
        finally:
            self.population.streams.activate(None)

    def _inner_training_loop(self, *args, **kwargs):
        # Trainer has enabled it on the model it knows.
        for member in self.population.members[1:]:
            self._enable_activation_checkpointing(member)
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
        self._warn_about_few_shuffles()
        return values

    def _what_must_agree(self, steps_per_epoch: int) -> dict[str, Any]:
        # Where a run is written and reported may differ between machines; what is computed may not.
        local = ("output_dir", "logging_dir", "local_rank", "run_name", "report_to", "hub_token", "disable_tqdm")
        options = {name: str(value) for name, value in self.args.to_dict().items() if name not in local}
        facts = {f"option {name}": value for name, value in options.items()}
        facts["steps per epoch"], facts["steps"] = steps_per_epoch, self._total_steps
        facts["architecture"] = describe_architecture(self.population.members[0])
        facts["overrides"] = [overrides.describe() for overrides in self._overrides]
        facts["torch"] = torch.__version__
        if self.args.same_init and self._trainings == 1 and self._resume is None:
            facts["initial weights"] = weights_digest(self.population.members[0])
        return facts

    def _warn_about_few_shuffles(self) -> None:
        args, steps = self.args, self._total_steps
        if args.mixing != "wash" or self.population.size == 1 or args.shuffle_probability == 0:
            return
        if not self.is_world_process_zero():
            return
        expected = args.expected_shuffles(steps)
        if expected < ENOUGH_SHUFFLES:
            mixing_steps = args.mixing_steps(steps)
            needed = ENOUGH_SHUFFLES / mixing_steps if mixing_steps else math.inf
            advice = (
                f"`shuffle_probability={needed:.2g}` would reach it"
                if needed <= LARGEST_SENSIBLE_PROBABILITY
                else f"this run is too short for it, even at {LARGEST_SENSIBLE_PROBABILITY}; train longer"
            )
            logger.warning(
                f"A first-layer weight will be shuffled about {expected:.1f} times in this run of {steps} steps "
                f"(p = {args.probability_for(steps):g}). Below about {ENOUGH_SHUFFLES} the members are disturbed without "
                f"being brought together: {advice}."
            )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """
        One optimizer for this process's members. Its parameter groups carry the member's index as `member`, so that
        each has its own learning rate and weight decay and its state can be told from the others'.
        """
        if self.optimizer is not None:
            return self.optimizer
        combined = None
        for index, member in self.population:
            with self._acting_as(index):
                self.optimizer = None
                super().create_optimizer(member)
            if not isinstance(self.optimizer, torch.optim.Optimizer):
                raise ValueError(
                    f"`{type(self.optimizer).__name__}` has no parameter groups to tell members apart by."
                )
            learning_rate = self._overrides[index].learning_rate
            for group in self.optimizer.param_groups:
                group["member"] = index
                if learning_rate is not None:
                    # `optimizer_cls_and_kwargs` may have brought a learning rate of its own.
                    group["lr"] = learning_rate
                if combined is not None:
                    combined.add_param_group(group)
            combined = combined if combined is not None else self.optimizer
        self.optimizer = combined
        return combined

    def _wrap_model(self, model, training: bool = True, dataloader=None):
        # Trainer prepares what is not wrapped, which means DDP; so autocast and compilation are prepared here.
        if not training:
            return model
        for index, member in self.population:
            if index not in self._prepared:
                self._prepared[index] = self.accelerator.prepare_model(member, evaluation_mode=True)
        return _LocalMembers([self._prepared[index] for index in self.population.indices])

    def _prepare_for_training(self, *args, **kwargs):
        result = super()._prepare_for_training(*args, **kwargs)
        count = len(self.population.members)
        self._losses = torch.zeros(count, device=self.args.device)
        self._grad_norms: list[torch.Tensor] = []
        self._moved_since_log = [0, 0, 0]
        self._last_rates = None
        self.mixer = None
        if self.population.size > 1:
            self.mixer = WashMixer(
                self.population.members,
                [self.optimizer],
                probability=self.args.probability_for(self._total_steps) if self.args.mixing == "wash" else 0.0,
                schedule=self.args.shuffle_schedule,
                seed=self.args.seed,
                shuffle_optimizer_state=self.args.shuffle_optimizer_state,
            )
        return result

    def _run_epoch(self, *args, **kwargs):
        if self._resume is not None:
            self._continue_from(self._resume, kwargs["epoch"], kwargs["steps_trained_in_current_epoch"])
            self._resume = None
        self._batches.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        if batch_samples and isinstance(batch_samples[0], list):
            return [self._get_num_items_in_batch(list(own), device) for own in zip(*batch_samples, strict=True)]
        # An example with soft labels is one item, not one for each class.
        counted = [
            {**batch, "labels": batch["labels"].new_zeros(len(batch["labels"]), dtype=torch.long)}
            if self._has_soft_labels(batch)
            else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def training_step(self, model: nn.Module, inputs: list, num_items_in_batch: list | None = None) -> torch.Tensor:
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
        smoother = self.label_smoother
        try:
            for slot, index in enumerate(self.population.indices):
                self.population.streams.activate(index)
                self.label_smoother = self._smoothers[index]
                items = num_items_in_batch[slot] if num_items_in_batch is not None else None
                losses.append(super().training_step(model.members[slot], inputs[slot], items))
        finally:
            self.label_smoother = smoother
        loss = torch.stack(losses)
        step = loss.detach().to(self._losses.dtype)
        if self.args.logging_nan_inf_filter:
            # As Trainer does for its one loss.
            average = self._losses / (1 + self.state.global_step - self._globalstep_last_logged)
            step = torch.where(torch.isfinite(step), step, average)
        self._losses += step
        return loss.mean()

    def _has_soft_labels(self, inputs) -> bool:
        labels = inputs.get("labels") if hasattr(inputs, "get") else None
        if not isinstance(labels, torch.Tensor) or not labels.is_floating_point() or labels.ndim != 2:
            return False
        config = getattr(self.model, "config", None)
        return getattr(config, "problem_type", None) in (None, "single_label_classification") and labels.shape[
            1
        ] == getattr(config, "num_labels", None)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """
        The Trainer's loss; soft labels of shape `(batch, num_labels)` get the soft cross-entropy.

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

    def _clip_grad_norm(self, model: nn.Module):
        return self._norms(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        return grad_norm if grad_norm is not None else self._norms(model, math.inf)

    def _norms(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        """Each member's own gradient norm, clipped by itself; returns their mean."""
        # Once for the optimizer: accelerate's own clipping unscales each time, which fp16's scaler refuses.
        self.accelerator.unscale_gradients()
        self._grad_norms = [torch.nn.utils.clip_grad_norm_(member.parameters(), max_norm) for member in model.members]
        return torch.stack(self._grad_norms).mean()

    def _mix(self, step: int) -> None:
        stop = self._stop_signal is not None and self._stop_signal.requested
        if self.mixer is None:
            self._stop_agreed = self._stop_agreed or stop
            return
        began = time.perf_counter()
        stats = self.mixer.mix(step, shuffle=self.args.shuffles(step, self._total_steps), stop_requested=stop)
        self.mixing_seconds += time.perf_counter() - began
        self.mixing_wait_seconds += stats.wait_seconds
        self.values_moved += stats.population_values_moved
        self.bytes_exchanged += stats.population_bytes_exchanged
        self._moved_since_log[0] += 1
        self._moved_since_log[1] += stats.population_values_moved
        self._moved_since_log[2] += stats.population_bytes_exchanged
        self._stop_agreed = self._stop_agreed or stats.stop_requested

    def floating_point_ops(self, inputs) -> int:
        """Floating-point operations of the members' forward and backward passes, as Trainer counts them."""
        if isinstance(inputs, list):
            return sum(super(WashTrainer, self).floating_point_ops(batch) for batch in inputs)
        return super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs) -> None:
        for batch in inputs if isinstance(inputs, list) else [inputs]:
            super()._track_num_input_tokens(batch)

    # ---- Logging -------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._member_logs = self._collect_logs()
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def _mean_loss(self) -> tuple[list[float], float]:
        """*Collective.* Each member's accumulated loss, and their mean, summed in member order."""
        losses = self.population.gather_tensors(self._losses).tolist()
        return losses, sum(losses) / len(losses)

    def _collect_logs(self) -> dict[str, float]:
        """*Collective.* What a log line says of the members, the same on every process and layout."""
        steps = self.state.global_step - self._globalstep_last_logged
        losses, mean = self._mean_loss()
        self._losses.zero_()
        self._loss_before_log = self._total_loss_scalar + mean
        logs = {"loss": mean / steps}
        rates = [self._learning_rate_of(index) for index in self.population.indices]
        norms = [norm.item() for norm in self._grad_norms] or [None] * len(rates)
        rates, norms = zip(*self.population.gather(list(zip(rates, norms, strict=True))), strict=True)
        for name, values in (("grad_norm", norms), ("learning_rate", rates)):
            if None not in values:
                logs[name] = sum(values) / len(values) if len(set(values)) > 1 else values[0]
                if len(set(values)) > 1:
                    logs |= {f"member_{index}_{name}": value for index, value in enumerate(values)}
        logs |= {f"member_{index}_loss": loss / steps for index, loss in enumerate(losses)}
        mixes, values, exchanged = self._moved_since_log
        self._moved_since_log = [0, 0, 0]
        logs["values_moved"] = values / mixes if mixes else 0
        logs["bytes_exchanged"] = exchanged / mixes if mixes else 0
        sample = torch.stack([self._consensus_sample.values(member) for member in self.population.members])
        sample = self.population.gather_tensors(
            sample.to(self.args.device) if self.population.world_size > 1 else sample
        )
        logs["consensus_distance"] = self._consensus_sample.estimate(sample.cpu())
        return logs

    def _learning_rate_of(self, index: int) -> float:
        # As Trainer does for its one group: the scheduler's value is that of the step just taken.
        groups = self.optimizer.param_groups
        position = next((i for i, group in enumerate(groups) if group.get("member", index) == index), 0)
        if hasattr(self.lr_scheduler, "get_last_lr") and not isinstance(
            self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau
        ):
            rate = self._last_rates[position] if self._last_rates is not None else groups[position]["lr"]
        else:
            rate = groups[position]["lr"]
        return float(rate)

    def _get_learning_rate(self):
        # Called after the optimizer's step and before the scheduler's: remember all groups' rates, not the first's.
        rates = getattr(self.lr_scheduler, "get_last_lr", lambda: None)()
        self._last_rates = [float(rate) for rate in rates] if rates is not None else None
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a dictionary; a line about training is completed with what is known of each member."""
        if self._member_logs is not None and "loss" in logs:
            logs.update(self._member_logs)
            self._member_logs = None
            # Trainer has added its own mean, whose rounding depends on the number of processes.
            self._total_loss_scalar = self._loss_before_log
        if self._evaluating:
            timed = {key: value for key, value in logs.items() if key.endswith(("_runtime", "_per_second"))}
            logs.update(self.population.broadcast(timed))
        super().log(logs, start_time)

    def _finalize_training(self, *args, **kwargs):
        # What has not been logged yet.
        self._tr_loss = torch.tensor(self._mean_loss()[1], dtype=torch.float64)
        self._losses.zero_()
        self._serve_soup()
        result = super()._finalize_training(*args, **kwargs)
        if self.args.push_members:
            self.save_members()
        return result

    # ---- The soup ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _as_soup(self) -> Iterator[None]:
        """*Collective unless the soup is served already.* Make `self.model` the soup for the length of a block."""
        if self._is_soup:
            with self.population.streams.use(None):
                yield
            return
        member, wrapped = self.model, self.model_wrapped
        self._serve_soup()
        try:
            with self.population.streams.use(None):
                yield
        finally:
            self._is_soup = False
            self._set_model(member)
            self.model_wrapped = wrapped

    def _serve_soup(self) -> None:
        """*Collective.* Build the soup from the members as they are and make it `self.model`."""
        if self.mixer is not None:
            # On a GPU a shuffle's verdict is read one call later, which may never come.
            self.mixer.synchronize()
        with self.population.streams.use(None):
            self._build_soup()
        self._set_model(self._soup)
        self._is_soup = True

    def _build_soup(self) -> None:
        key = (self._trainings, self.state.global_step)
        if self._soup_key == key and self.is_in_train:
            return
        first = self.population.members[0]
        if self._soup is None:
            self._soup = copy_member(first) if self.args.same_init else copy.deepcopy(first)
            # The copy brings along the autocast that was wrapped around the member's forward (accelerate 1.15), which
            # may still call the member.
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                vars(self._soup).pop(name, None)
            self._soup_prepared = self.accelerator.prepare_model(self._soup, evaluation_mode=True)
        shared = (
            {name for name, p in self._soup.named_parameters() if not p.requires_grad} if self.args.same_init else ()
        )
        if self._holds_out() and self._holdout_loader() is not None:
            members = [self.population.weights_of(index, shared) for index in range(self.population.size)]
            weights, self.greedy_record = greedy_soup(members, self._held_out_score)
        else:
            weights = uniform_soup(self.population.state_dicts(exclude=shared))
        self._load_soup(weights)
        distances = self.population.gather([squared_distance(m, self._soup) for m in self.population.members])
        self.consensus_distance = math.sqrt(sum(distances) / len(distances))
        self._soup_key = key

    def _load_soup(self, weights: dict[str, torch.Tensor]) -> None:
        self._soup.load_state_dict(weights, strict=False)
        self._recalibrate()

    def _holdout_loader(self):
        """The examples held out for the greedy soup, in order; `None` where there is no training set."""
        dataset = self.train_dataset if self.train_dataset is not None else self._overrides[0].train_dataset
        if dataset is None:
            return None
        held_out = hold_out(dataset, self.args.soup_holdout, self.args.seed)[1]
        return self._one_process_dataloader(
            None,
            dataset=held_out,
            description="Held-out",
            batch_size=self.args.eval_batch_size,
            sampler_fn=torch.utils.data.SequentialSampler,
        )

    def _held_out_score(self, weights: dict[str, torch.Tensor]) -> float:
        """
        *Collective.* The accuracy of a soup on held-out training data; minus its loss where there is no accuracy.
        Augmentation draws the same for every soup.
        """
        self._load_soup(weights)
        self._soup_prepared.eval()
        streams = self.population.streams
        before = streams.capture()
        try:
            set_seed(self.args.seed + HOLDOUT_SEED_OFFSET)
            right, loss, count = 0, 0.0, 0
            for inputs in self._holdout_loader():
                batch_loss, logits, labels = self.prediction_step(self._soup_prepared, inputs, False)
                if isinstance(logits, torch.Tensor) and logits.ndim == 2 and labels is not None and labels.ndim == 1:
                    right += int((logits.argmax(-1) == labels).sum())
                else:
                    right = math.nan
                count += len(logits) if isinstance(logits, torch.Tensor) else 1
                loss += float(batch_loss) * (len(logits) if isinstance(logits, torch.Tensor) else 1)
        finally:
            streams.restore(before)
        # A GPU's last bit must not make processes choose differently.
        return self.population.broadcast(-loss / count if math.isnan(right) else right / count)

    def _recalibrate(self) -> None:
        """*Collective.* The soup's BatchNorm statistics, from training batches of a stream of their own."""
        if (
            self.args.soup_batch_norm != "recalibrate"
            or self.population.size == 1
            or not has_batch_norm(self._soup)
            or (self.train_dataset is None and self._overrides[0].train_dataset is None)
        ):
            return
        streams = self.population.streams
        before = streams.capture()
        try:
            set_seed(self.args.seed + RECALIBRATION_SEED_OFFSET)
            recalibrate_batch_norm(
                self._soup,
                iter(self._recalibration_loader().base_dataloader),
                forward=self._forward_without_labels,
                max_batches=self.args.soup_batch_norm_batches,
            )
        finally:
            streams.restore(before)
        # The same batches everywhere, but a GPU's sums may differ in the last bit.
        self.population.broadcast_tensors(list(self._soup.buffers()), source=0)

    def _recalibration_loader(self):
        """The training set as no member in particular sees it; member 0's, where there is none in common."""
        if self.train_dataset is None:
            return self._member_dataloader(0)
        return self._one_process_dataloader(
            None,
            dataset=self.train_dataset,
            description="Recalibration",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _forward_without_labels(self, model: nn.Module, batch) -> None:
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            self._soup_prepared(**{name: value for name, value in inputs.items() if name not in self.label_names})

    # ---- Evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Metrics of the soup and, with `evaluate_members`, of each member and of the ensemble. Call on every process;
        every process gets the same dictionary.

        Returns:
            `dict[str, float]`: `eval_<metric>` of the soup, `eval_ensemble_<metric>` (mean of probabilities),
            `eval_member_<i>_<metric>`, and `eval_members_<metric>_mean`, `_min`, `_max`; `<metric>` includes `loss`.
        """
        with self._as_soup():
            before, self._evaluating = self._evaluating, True
            try:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            finally:
                self._evaluating = before

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """The soup's predictions. Call on every process."""
        with self._as_soup():
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """*Collective.* The soup on batches dealt to the processes; members and ensemble on all batches."""
        args = self.args
        loss_only = prediction_loss_only if prediction_loss_only is not None else args.prediction_loss_only
        self._advance_streams()
        population = self.population
        with_members = args.evaluate_members and description == "Evaluation"
        soup, members = self._models_for_evaluation()
        shared_pass = population.world_size == 1 and population.size > 1 and with_members

        dealt = deal_batches(dataloader, population.rank, population.world_size)
        steps = _Progress(dataloader, population, second_pass=with_members and population.world_size > 1)
        self.callback_handler.eval_dataloader = steps
        logger.info(f"\n***** Running {description} *****")
        logger.info(f"  Batch size = {args.eval_batch_size}")

        def on_batch():
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)

        main_input = (
            getattr(self.model, "main_input_name", "input_ids") if "inputs" in args.include_for_metrics else None
        )
        options = {
            "main_input": main_input,
            "preprocess_logits": self.preprocess_logits_for_metrics,
            "on_batch": on_batch,
        }

        def step(model, inputs):
            # Members need their logits, for the ensemble.
            only = loss_only and (model is soup and not (with_members and population.size == 1))
            return self.prediction_step(model, inputs, only, ignore_keys=ignore_keys)

        ensemble = evaluation.Predictions()

        def together(index, size, logits, labels, inputs):
            own = logits[1:] if shared_pass else logits
            if any(not isinstance(value, torch.Tensor) or value.ndim != 2 for value in own):
                return
            gathered = population.gather_tensors(torch.stack([value.contiguous() for value in own]))
            mean = evaluation.ensemble_logits(gathered, self._problem_type())
            loss = self._ensemble_loss(mean, labels) if labels is not None else None
            if self.preprocess_logits_for_metrics is not None:
                mean = self.preprocess_logits_for_metrics(mean, labels)
            ensemble.add(index, size, loss, mean, labels, inputs)

        single = population.size == 1 and with_members
        results = evaluation.predict_batches(
            [soup, *members] if shared_pass else [soup],
            dealt,
            step,
            together=together if shared_pass or (single and population.world_size == 1) else None,
            **options,
        )
        predictions = evaluation.Predictions.merge(population.gather_processes(results[0]))
        if shared_pass:
            member_predictions = results[1:]
        elif single:
            member_predictions = results
        elif with_members:
            member_predictions = evaluation.predict_batches(
                members, enumerate(dataloader), step, together=together, **options
            )

        def summarize(of: evaluation.Predictions) -> dict[str, float]:
            return evaluation.summarize(
                of,
                None if loss_only else self.compute_metrics,
                metric_key_prefix,
                include=args.include_for_metrics,
                by_batch=args.batch_eval_metrics,
                concatenate=args.eval_do_concat_batches,
                skip_non_finite_losses=args.logging_nan_inf_filter,
            )

        metrics = summarize(predictions)
        if with_members:
            each = population.gather([summarize(own) for own in member_predictions])
            together_metrics = summarize(ensemble) if ensemble.batches else None
            metrics |= evaluation.population_metrics(each, together_metrics)
            metrics["consensus_distance"] = self.consensus_distance
        # Rank 0's for all: a user's `compute_metrics` may be anything.
        metrics = population.broadcast({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})

        num_samples = len(dataloader.dataset) if has_length(dataloader.dataset) else predictions.num_samples
        return EvalLoopOutput(
            predictions=None if loss_only else predictions.arrays("logits", args.eval_do_concat_batches),
            label_ids=None if loss_only else predictions.arrays("labels", args.eval_do_concat_batches),
            metrics=metrics,
            num_samples=num_samples,
        )

    def _advance_streams(self) -> None:
        # Iterating over a data loader draws its base seed from the global generator (torch 2.15), so a plain run's
        # stream moves on by one draw with each evaluation; so must the members'.
        if self.is_in_train:
            for index in self.population.indices:
                with self.population.streams.use(index):
                    torch.empty((), dtype=torch.int64).random_()

    def _models_for_evaluation(self) -> tuple[nn.Module, list[nn.Module]]:
        soup = self._soup_prepared if self.model is self._soup else self.model
        members = [self._prepared.get(index, member) for index, member in self.population]
        if not self._prepared:
            members = [self.accelerator.prepare_model(member, evaluation_mode=True) for member in members]
            self._prepared = dict(zip(self.population.indices, members, strict=True))
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            dtype = torch.float16 if self.args.fp16_full_eval else torch.bfloat16
            soup = soup.to(dtype=dtype, device=self.args.device)
            # Copies: the members stay as they are, since training can go on.
            members = [copy.deepcopy(member).to(dtype=dtype, device=self.args.device) for member in members]
        for model in (soup, *members):
            model.eval()
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):
            self.optimizer.eval()
        return soup, members

    def _problem_type(self) -> str | None:
        config = getattr(self.model, "config", None)
        if getattr(config, "problem_type", None) is None and getattr(config, "num_labels", None) == 1:
            return "regression"
        return getattr(config, "problem_type", None)

    def _ensemble_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of the ensemble's prediction, as a member's would be computed from its logits. A scalar."""
        labels = labels.cpu()
        if self.compute_loss_func is not None:
            return self.compute_loss_func({"logits": logits}, labels, num_items_in_batch=None)
        if self.label_smoother is not None and not labels.is_floating_point():
            return self.label_smoother({"logits": logits}, labels)
        problem = self._problem_type()
        if problem == "regression":
            return nn.functional.mse_loss(logits.squeeze(), labels.float().squeeze())
        if problem == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        return nn.functional.cross_entropy(logits, labels)

    # ---- Saving --------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the soup, loadable by transformers (and by timm, for a timm model).

        While training, call it on every process, since the soup is built first. After training it is served already
        and no process waits for another, so that scripts may call it on the main one alone.
        """
        with self._as_soup():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if self.args.should_save:
            self._export(self.model, output_dir, state_dict)
            torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _export(self, model: nn.Module, folder: str, state_dict: dict | None = None) -> None:
        export_model(unwrap_model(model), folder, processing_class=self.processing_class, state_dict=state_dict)

    def save_members(self, output_dir: str | None = None) -> None:
        """
        *Collective: call on every process.* Save each member, loadable by itself, under `_members/member_<i>/`.

        Args:
            output_dir (`str`, *optional*): Defaults to the configuration's.
        """
        folder = os.path.join(output_dir if output_dir is not None else self.args.output_dir, MEMBERS_FOLDER)
        if self.args.should_save:
            # An earlier run's would be taken for members of this one.
            for path in Path(folder).glob("member_*"):
                if path.name not in {f"member_{index}" for index in range(self.population.size)}:
                    logger.warning(f"`{path}` is removed: it is not of this population.")
                    shutil.rmtree(path)
        with self.population.streams.use(None):
            for index, member in self.population:
                self._export(member, os.path.join(folder, f"member_{index}"))
        self.population.gather_processes(None)

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def _node(self) -> int:
        """The machine whose folder this process writes to; one for all without `save_on_each_node`."""
        if not self.args.save_on_each_node:
            return 0
        return self.args.process_index // int(os.environ.get("LOCAL_WORLD_SIZE", self.args.world_size))

    def _check_export_folder(self) -> None:
        """*Collective.* Find out before training, not at its end, that the soup cannot be written where it should go."""
        member, folder = unwrap_model(self.population.members[0]), self.args.output_dir
        problem = folder_problem(member, folder) if self.args.should_save else None
        for found in self.population.gather_processes(problem):
            if found is not None:
                raise ValueError(found)

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
            return self._shared_frozen(self.population.members[0])

        def member_part(slot: int, index: int, member: nn.Module) -> tuple:
            weights = checkpoints.own_tensors(member, self._shared_frozen(member))
            if self.args.save_only_model:
                return weights, None, None
            return weights, *self._training_state(slot, index, member)

        checkpoints.write(
            self.population,
            folder,
            node=self._node(),
            leads=self.args.should_save,
            write_soup=write_soup,
            member_part=member_part,
            describe=self._manifest,
        )

    def _shared_frozen(self, member: nn.Module) -> dict[str, torch.Tensor]:
        """What all members share, written once: the frozen parameters, where all members started alike."""
        if not self.args.same_init:
            return {}
        return {name: p.detach().contiguous().cpu() for name, p in member.named_parameters() if not p.requires_grad}

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

    def _training_state(self, slot: int, index: int, member: nn.Module) -> tuple[dict, Any]:
        training = checkpoints.cut_out(self.optimizer, self.lr_scheduler, member, index)
        training["loss"] = self._losses[slot].item()
        if self.accelerator.scaler is not None:
            training["scaler"] = self.accelerator.scaler.state_dict()
        streams = {"streams": self.population.streams.state(index), "loader": self._batches.loaders[slot].state()}
        return training, checkpoints.encode_streams(streams)

    def _manifest(self) -> dict[str, Any]:
        args = self.args
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
            "options": {name: getattr(args, name) for name in names},
            "overrides": [overrides.describe() for overrides in self._overrides],
            "values_moved": self.values_moved,
            "bytes_exchanged": self.bytes_exchanged,
            "log_window": {"since": self._globalstep_last_logged, "moved": self._moved_since_log},
            "architecture": describe_architecture(self.population.members[0]),
        }

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
        size = manifest["population_size"]
        if size != self.population.size:
            if self.args.population_size is not None or self._trainings:
                raise ValueError(
                    f"Cannot resume: `{folder}` holds a population of {size}, this run's is {self.population.size}."
                )
            if len(self._overrides) != size and any(any(o.describe().values()) for o in self._overrides):
                raise ValueError(f"`members` lists {len(self._overrides)} members, but `{folder}` holds {size}.")
            self._overrides = [MemberOverrides() for _ in range(size)]
            self._smoothers = [self.label_smoother] * size
            start = self.population.members[0]
            self.population = Population(size, self.args.device, self.args.process_index, self.args.world_size)
            if self.model_init is None:
                first = self.population.indices[0]
                self._populate(lambda index: start if index == first else copy_member(start))
                self._place_members()
        own = describe_architecture(self.population.members[0])
        difference = first_difference([tuple(entry) for entry in own], _as_architecture(manifest["architecture"]))
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        frozen = folder / checkpoints.FROZEN
        for index, member in self.population:
            checkpoints.read_weights(member, folder / f"member_{index}" / checkpoints.MEMBER_WEIGHTS)
        if frozen.is_file():
            for member in self.population.members:
                checkpoints.read_weights(member, frozen)
        self._soup_key = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        parts = {}
        for index in self.population.indices:
            training, streams = checkpoints.read_training(Path(checkpoint) / f"member_{index}")
            parts[index] = training
            self._resume["streams"].append(checkpoints.decode_streams(streams))
        self._resume["parts"] = parts
        checkpoints.put_together(self.optimizer, self.lr_scheduler, dict(self.population), parts)

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
        self.values_moved, self.bytes_exchanged = manifest["values_moved"], manifest["bytes_exchanged"]
        window = manifest["log_window"]
        self._globalstep_last_logged, self._moved_since_log = window["since"], list(window["moved"])
        self._losses = torch.tensor(
            [parts[index]["loss"] for index in self.population.indices], device=self.args.device
        )
        # The next log line covers steps from before the interruption; the loss of this call's steps does not.
        self._total_loss_scalar = -self._mean_loss()[1]

    def _load_best_model(self) -> None:
        """*Collective.* Members and soup of the best checkpoint."""
        folder = self.state.best_model_checkpoint
        logger.info(f"Loading the best population from {folder} (score: {self.state.best_metric}).")
        self._load_from_checkpoint(folder)
        self._serve_soup()

    # ---- Hub -----------------------------------------------------------------------------------------------------

    # The message with which Trainer's `save_model` pushes by itself (5.23).
    _PUSH_OF_SAVE_MODEL = "Model save"

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Make the repository and the branch to push to, on the main process.

        Raises:
            ValueError: if that is not possible, before anything has been trained.
        """
        if not self.is_world_process_zero():
            return
        args, repo_id = self.args, self._repository_name()
        remove_snapshots(Path(args.output_dir))
        try:
            self.hub_model_id = create_repository(
                repo_id,
                private=private if private is not None else args.hub_private_repo,
                revision=args.hub_revision,
                token=token if token is not None else args.hub_token,
            )
        except Exception as error:  # whatever it was: the network, the token, the name
            raise ValueError(
                f"`push_to_hub` is set, but `{repo_id}` cannot be written to: {explain(error)} Without `push_to_hub` "
                f"the run stays here, and `hf-wash push {args.output_dir} {repo_id}` pushes it later."
            ) from error
        self.push_in_progress = None

    def _repository_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card, `README.md`, and what programs can read of it, `wash_run.json`. No process waits for
        another. What somebody else wrote in a card that is there already is kept.

        Args:
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset (*optional*):
                As in [`~transformers.Trainer.create_model_card`]. What is not given is taken from the call before,
                else from the model and the data, as far as they tell; the license from the model this one was
                fine-tuned from.
            dataset_args (*optional*):
                Not used.
        """
        if not self.is_world_process_zero():
            return
        given = {
            "language": language,
            "license": license,
            "tags": tags,
            "model_name": model_name,
            "finetuned_from": finetuned_from,
            "tasks": tasks,
            "dataset_tags": dataset_tags,
            "dataset": dataset,
        }
        self._card_options = {**self._given_for_card(), **{name: v for name, v in given.items() if v is not None}}
        write_record(self.args.output_dir, self._run_record())
        self._write_card(self.args.output_dir)

    def _given_for_card(self) -> dict[str, Any]:
        return getattr(self, "_card_options", {})

    def _write_card(self, model_folder: str, **options: Any) -> None:
        config = getattr(unwrap_model(self.model), "config", None)
        known = {
            "repo_id": self.hub_model_id,
            "revision": self.args.hub_revision,
            "members": self.args.push_members if self.hub_model_id is not None else None,
            "record": self._run_record(),
            "config": config.to_dict() if hasattr(config, "to_dict") else config,
            "metrics": last_evaluation(self.state.log_history) or None,
            "log_history": self.state.log_history or None,
        }
        card = WashCard.from_folder(model_folder, **{**known, **options})
        for problem in card.write(self.args.output_dir):
            logger.warning(problem)

    def save_state(self) -> None:
        """Save `trainer_state.json` and, for programs, how the run was made: `wash_run.json`. No process waits."""
        super().save_state()
        if self.is_world_process_zero():
            write_record(self.args.output_dir, self._run_record())

    def _run_record(self) -> dict[str, Any]:
        """What `wash_run.json` says, from this process's knowledge alone."""
        return describe_run(
            args=self.args,
            state=self.state,
            model=unwrap_model(self.model),
            population=self.population,
            overrides=self._overrides,
            exchanged=(self.values_moved, self.bytes_exchanged),
            greedy=self.greedy_record,
            batch_size=self.get_total_train_batch_size(self.args),
            datasets=(self.train_dataset, self.eval_dataset),
            card=self._given_for_card(),
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Upload the soup with its card and, with `push_members`, the members under `members/member_<i>/`, in one commit.

        After training no process waits for another, so that scripts may call it on the main one alone. While
        training, call it on every process.

        Args:
            commit_message, blocking, token, revision, private (*optional*):
                As in [`~transformers.Trainer.push_to_hub`]. A branch that is not there is made.
            kwargs (*optional*):
                Passed to [`~WashTrainer.create_model_card`].

        Returns:
            [`~huggingface_hub.CommitInfo`] or a `Future` of it, on the main process.

        Raises:
            PushError: if the upload fails. What is in `output_dir` is whole; the message says how to push it later.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # Before the files that are being uploaded are written anew.
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault(
            "model_name", self._given_for_card().get("model_name", self._repository_name().split("/")[-1])
        )
        self.create_model_card(**kwargs)

        def with_full_name(repo_id: str) -> None:
            self.hub_model_id = repo_id
            self.create_model_card()

        try:
            return push_folder(
                args.output_dir,
                self._repository_name(),
                members=args.push_members,
                private=private if private is not None else args.hub_private_repo,
                revision=revision if revision is not None else args.hub_revision,
                token=token if token is not None else args.hub_token,
                commit_message=commit_message or "End of training",
                prepare=with_full_name,
                blocking=blocking,
            )
        except PushError as error:
            # What comes after `save_model` in a script, the members and the metrics, must not be lost for that.
            if commit_message != self._PUSH_OF_SAVE_MODEL:
                raise
            logger.error(str(error))
            return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Upload a checkpoint's soup in the background and, as `hub_strategy` says, the checkpoint.

        Trainer's own copies the model to `output_dir` first, with a processor's file beside a timm model that must not
        have one, uploads from a folder that the next save or the rotation of checkpoints may change meanwhile, and
        does not tell when an upload has failed (5.23).
        """
        args, folder = self.args, Path(checkpoint_folder)
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        try:
            self._write_card(checkpoint_folder, pictures=False, members=False)
            output_dir = Path(args.output_dir)
            files = {name: path for name, path in root_files(output_dir).items() if path.suffix != ".safetensors"}
            files |= {name: path for name, path in root_files(folder).items() if not self._is_for_resuming(name)}
            replaced = []
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
                files |= {f"{place}/{name}": path for name, path in root_files(folder).items()}
                replaced.append(f"{place}/")
            steps = args.save_strategy == SaveStrategy.STEPS
            at = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch)}"
            job = push_in_background(
                self.hub_model_id,
                files,
                output_dir,
                replaced=replaced,
                revision=args.hub_revision,
                token=args.hub_token,
                commit_message=f"Training in progress, {at}",
            )
        except Exception as error:  # training is worth more than an upload that the next one makes up for
            logger.warning(f"`{folder}` is not pushed to {self.hub_model_id}: {explain(error)} Training goes on.")
            return
        job.add_done_callback(lambda done: self._report_push(folder, done))
        jobs = self.push_in_progress.jobs if busy else []
        self.push_in_progress = PushInProgress([*jobs, job])

    def _report_push(self, folder: Path, job) -> None:
        error = None if job.cancelled() else job.exception()
        if error is not None:
            logger.warning(
                f"Pushing `{folder}` to {self.hub_model_id} failed: {explain(error)} It is whole here, and the next "
                "save is pushed again."
            )

    @staticmethod
    def _is_for_resuming(name: str) -> bool:
        """Whether a file of a checkpoint serves to resume from it, not to use its model."""
        return name.startswith("member_") or name in (checkpoints.MANIFEST, checkpoints.FROZEN, "trainer_state.json")


def _folder_problem(folder: Path) -> str | None:
    """Why nothing could be written to a folder, as the rest of a sentence. Makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        return "is a file" if there == folder else f"cannot be made: `{there}` is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return "cannot be written to" if there == folder else f"cannot be made: `{there}` cannot be written to"
    return None


def _as_architecture(listing: list) -> list[tuple]:
    """An architecture that has been through JSON."""
    return [(name, tuple(shape), dtype, trained) for name, shape, dtype, trained in listing]


class _Progress:
    """What progress bars take for the evaluation's loader: its data set, and the length of all that will be done."""

    def __init__(self, dataloader, population: Population, second_pass: bool):
        self._dataloader = dataloader
        self._rank, self._world_size, self._second_pass = population.rank, population.world_size, second_pass

    def __len__(self) -> int:
        batches = len(self._dataloader)
        return len(range(self._rank, batches, self._world_size)) + (batches if self._second_pass else 0)

    def __getattr__(self, name: str):
        return getattr(self._dataloader, name)
