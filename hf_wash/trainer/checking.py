"""
[`Checking`]: a run that is tried out before it begins, and leaves no trace.

What is found is put together in `dry_run`.
"""

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_utils import unwrap_model
from transformers.trainer_utils import has_length

from ..hub.traffic import size_of
from . import dry_run
from .checkpoint import encode_streams
from .dry_run import DryRun, Tried, stage
from .member import Member, as_member
from .mixing_run import expected_exchange, too_few_shuffles
from .part import Part
from .run_folder import leaves_no_empty_folder
from .served_soup import copy_unprepared


class Checking(Part):
    """The part of a population's Trainer that tries a run out."""

    if TYPE_CHECKING:
        # Where they are: in the mixin, `agreeing`, `populating`, `serving` and `checkpointing`.
        def _freeze_alike(self) -> None: ...
        def _check_data(self) -> None: ...
        def _check_before_training(self, resume_from_checkpoint: Any) -> None: ...
        def _check_export_folder(self) -> None: ...
        def _check_output_folder(self) -> None: ...
        def _members_loader(self) -> Any: ...
        def _in_a_members_place(self, whole: nn.Module) -> Member: ...
        def _enable_activation_checkpointing(self, member: nn.Module) -> None: ...
        def _recalibrates(self, model: nn.Module) -> bool: ...
        def _recalibrate(self, model: nn.Module, batches: Any) -> None: ...

    @leaves_no_empty_folder
    def check(self) -> DryRun:
        """
        *Collective: call on every process.* Try the run out, without beginning it: the data and the labels, a forward
        and a backward pass and an optimizer step of a copy of each member, saving the untrained model and loading it
        back, the disk space for checkpoints, and whether all processes agree. It says what the run will cost.

        A run after `check` is bit for bit what it would be without, if the data sets themselves remember nothing. The
        memory of one more member is needed, with its gradients and its optimizer's state.

        Returns:
            [`DryRun`]: What was found, the same on every process. `print` shows a table.

        Raises:
            ValueError: on every process, for what is wrong on any.
        """
        if self.is_in_train:
            raise ValueError("`check` tries out a run that has not begun: call it before `train`.")
        members, population = self.members, self.population
        self._bring_members_up_to_date()
        self._freeze_alike()
        owners = [None, *population.indices]
        own = [part.__dict__ for part in (self, self.state, self.control, self.accelerator)]
        data = (self.train_dataset, self.eval_dataset)
        try:
            with dry_run.as_it_was(*own, streams=population.streams, owners=owners, apart_from=data):
                for member in members:
                    member.data_collator = dry_run.copy_of_collator(member.data_collator, member.model)
                with self._told_to_all():
                    found = self._try_out_together()
        finally:
            self._bring_members_up_to_date()
        report = self._report(found)
        if report.problem is not None:
            raise ValueError(report.problem)
        return report

    def _try_out_together(self) -> list[Tried]:
        """*Collective.* What each process found."""
        loader: Any = None

        def try_out() -> Tried:
            nonlocal loader
            loader = self._make_members_loader()
            return self._try_out(loader)

        outcomes, _ = self.population.try_together(try_out, dry_run.in_a_line)
        problems = [(rank, text) for rank, (_, text) in enumerate(outcomes) if text is not None]
        if problems:
            alone = self.population.world_size == 1
            raise ValueError("; ".join(text if alone else f"process {rank}: {text}" for rank, text in problems))
        self._check_before_training(None)
        self._check_export_folder()
        with self._without_new_folders(), stage("Writing to `output_dir`"):
            self._check_output_folder()
        # As in `train`: what all processes must agree on of steps and initial weights.
        self._trainings, self._resume = self._trainings + 1, None
        self.set_initial_training_values(self.args, loader)
        return [tried for tried, _ in outcomes]

    def _make_members_loader(self) -> Any:
        self._check_data()
        self.get_train_dataloader = self._members_loader
        return self.get_train_dataloader()

    @contextlib.contextmanager
    def _without_new_folders(self) -> Iterator[None]:
        folder = Path(self.args.output_dir).absolute()
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            yield
        finally:
            if self.args.should_save:
                with contextlib.suppress(OSError):  # somebody else uses it now, or it is gone
                    for path in missing:
                        path.rmdir()

    def _try_out(self, loader: Any) -> Tried:
        """This process's members, one after the other, each a copy."""
        values = super().set_initial_training_values(self.args, loader)
        # The mean of one batch, however many make a step.
        self.current_gradient_accumulation_steps = 1
        tried = Tried(steps=values[-1], steps_per_epoch=values[1])
        for member in self.members:
            probe = self._probe(member)
            example = None
            with self.population.streams.use(member.index), as_member(self, probe, training=True):
                # A step of an optimizer that a run before has left would be one of its members.
                given, self.optimizer = self.optimizer, None
                if probe.train_dataset is not None or member.train_dataset is None:
                    example, loss = self._try_step(probe)
                    tried.losses.append(loss)
                if member is self.members[0]:
                    if example is not None and self._recalibrates(probe.model):
                        with stage("The pass that recalibrates the soup's BatchNorm statistics"):
                            self._recalibrate(probe.model, [copy.copy(example)])
                    if self.args.should_save:
                        tried.saved = self._try_saving(probe, example)
                        tried.free = dry_run.free_bytes(Path(self.args.output_dir))
                    tried.state = self._try_optimizer(given)
                self.optimizer = given
        return tried

    def _probe(self, member: Member) -> Member:
        """A copy of a member that may be trained and thrown away."""
        with stage(f"Copying member {member.index}"):
            probe = self._in_a_members_place(copy_unprepared(member.whole, True))
        self._enable_activation_checkpointing(probe.model)
        probe.place, probe.args, probe.accelerator = member.place, member.args, member.accelerator
        probe.data_collator, probe.label_smoother = member.data_collator, member.label_smoother
        probe.train_dataset = dry_run.copy_of_stream(member.train_dataset)
        return probe

    def _try_step(self, probe: Member) -> tuple[Any, float]:
        with stage(f"Reading a batch of member {probe.index}"):
            batch = dry_run.first_batch(self.get_train_dataloader())
            items = self._get_num_items_in_batch([batch], self.args.device)
        with stage(f"The forward and backward pass of member {probe.index}"):
            # The Trainer takes what it uses out of a batch.
            inputs = copy.copy(batch)
            loss = super().training_step(probe.prepared, inputs, items)
        dry_run.check_loss(float(loss), probe.index, probe.whole, self.accelerator.scaler is not None)
        return batch, float(loss)

    def _try_saving(self, probe: Member, example: Any) -> tuple[int, str]:
        # Where the run will be written, which tells of permissions, too.
        place = dry_run.existing(Path(self.args.output_dir))
        with contextlib.ExitStack() as until_loaded:
            with stage("Saving the untrained model"):
                temporary = tempfile.TemporaryDirectory(prefix=".check-", dir=place)
                folder = until_loaded.enter_context(temporary)
                self._save(folder)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            model = unwrap_model(probe.model)
            tensors = None
            if hasattr(example, "items"):
                tensors = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
            return size, dry_run.load_back(Path(folder), model, self.processing_class, tensors)

    def _try_optimizer(self, given: Any) -> tuple[int, float, float]:
        with stage("The optimizer's step"):
            if self._given_optimizer:
                # It was made for the member itself: a copy of both steps.
                optimizer = copy.deepcopy(getattr(given, "optimizer", given))
            else:
                super().create_optimizer()
                optimizer = self.optimizer
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            return dry_run.measure_state(optimizer)

    def _report(self, found: list[Tried]) -> DryRun:
        args, population = self.args, self.population
        whole, first = population.wholes[0], found[0]
        trained = [p for p in whole.parameters() if p.requires_grad]
        probability = args.probability_for(first.steps)
        values, exchanged = expected_exchange(
            args, whole, population.size, first.steps, first.steps_per_epoch, first.state[1:]
        )
        written, kept = dry_run.count_checkpoints(args, first.steps, first.steps_per_epoch)
        saved_bytes, saved = first.saved or (0, "")
        state_bytes = 0 if args.save_only_model else first.state[0]
        mixer_bytes = 0 if args.save_only_model else dry_run.mixer_bytes(args, whole, population.size)
        shared = size_of(p for p in whole.parameters() if not p.requires_grad) if args.same_init else 0
        member_bytes = size_of([*whole.parameters(), *whole.buffers()]) - shared + state_bytes
        if not args.save_only_model:
            # As they stand, as they stood when the epoch began, and before the batch that waits.
            member_bytes += 3 * len(json.dumps(encode_streams(population.streams.capture())))
        here = population.size
        if args.save_on_each_node:
            here = population.per_process * int(os.environ.get("LOCAL_WORLD_SIZE", population.world_size))
        data = self.members[0].train_dataset
        return DryRun(
            members=population.size,
            processes=population.world_size,
            steps=first.steps,
            batch_size=self.get_total_train_batch_size(args),
            samples=len(data) if has_length(data) else None,
            losses=[loss for tried in found for loss in tried.losses],
            parameters=sum(p.numel() for p in whole.parameters()),
            trained_parameters=sum(p.numel() for p in trained),
            trained_bytes=size_of(trained),
            saved_bytes=saved_bytes,
            saved=saved,
            shuffle_probability=probability,
            expected_shuffles=args.expected_shuffles(first.steps),
            too_few_shuffles=too_few_shuffles(args, first.steps, probability) if args.mixing == "wash" else None,
            values_moved=values,
            bytes_exchanged=exchanged,
            checkpoint_bytes=saved_bytes + shared + here * member_bytes + mixer_bytes,
            checkpoints_written=written,
            checkpoints_kept=kept,
            mixing=args.mixing,
            disk_free=min(tried.free for tried in found if tried.free is not None),
            output_dir=str(args.output_dir),
        )
