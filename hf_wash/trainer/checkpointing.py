"""
[`Checkpointing`]: when a population's Trainer writes a checkpoint, what is in it, and how a run goes on from one.

How it is written so that it appears whole, and read back, is `checkpoint`'s work.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints
from transformers.utils import logging

from .. import __version__
from ..architecture import describe_architecture, first_difference
from ..population import MemberOverrides, copy_member
from ..population.examples import appearance
from ..progress import bar_of
from . import checkpoint as checkpoints
from . import options
from .log import MemberLog
from .part import Part
from .run_folder import FolderInUse, RunFolder, new_run, run_that_left, training_figures
from .served_soup import NonFiniteMemberError


logger = logging.get_logger(__name__)


class Checkpointing(Part):
    """The part of a population's Trainer that writes checkpoints and resumes from them."""

    # ---- One run in a folder ---------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """As the Trainer's, while no other run writes to `output_dir`."""
        with self._alone_in_folder() as folder:
            self._begin_run(folder)
            return super().train(*args, **kwargs)

    @contextlib.contextmanager
    def _alone_in_folder(self) -> Iterator[RunFolder]:
        """*Collective.* Hold the output folder for the length of a block. A `FolderInUse`, everywhere, if another does."""
        folder, problem = RunFolder(self.args.output_dir), None
        try:
            if self.args.should_save:
                try:
                    folder.enter()
                except (FolderInUse, OSError) as error:
                    problem = str(error)
            problem = next((text for text in self.population.gather_processes(problem) if text is not None), None)
            if problem is not None:
                raise FolderInUse(f"Cannot train: {problem}.")
            yield folder
        finally:
            folder.leave()

    def _begin_run(self, folder: RunFolder) -> None:
        """*Collective.* The run's identity; on the main process a word on what else is in its folder."""
        self._run = (
            self._resume["manifest"]["run"] if self._resume is not None else self.population.broadcast(new_run())
        )
        folder.tell(self._run)
        if not self.is_world_process_zero():
            return
        logger.info(f"This is run {self._run}.")
        others = {run: found for run, found in checkpoints.runs_in(self.args.output_dir).items() if run != self._run}
        if others and self.args.save_strategy != SaveStrategy.NO:
            listing = ", ".join(f"run {run[:8]} up to `{found[0].name}`" for run, found in others.items())
            logger.warning(
                f"`{self.args.output_dir}` holds checkpoints of another run ({listing}). They stay, but one of a step at "
                f"which this run, {self._run[:8]}, saves is replaced, and to go on from this folder later the "
                "checkpoint has to be named. An `output_dir` of its own is safer."
            )
            return
        before = run_that_left(self.args.output_dir)
        if before is not None and before != self._run:
            logger.warning(
                f"`{self.args.output_dir}` holds what run {ascii(before)[1:9]} left. What this run, {self._run[:8]}, saves takes its "
                "place. An `output_dir` of its own is safer."
            )

    def _rotate(self, run_dir: str, limit: int | None, keep_newest: bool = True) -> None:
        """Delete this run's oldest checkpoints above a limit, but not the best, and no other run's."""
        if not self.args.should_save or limit is None or limit <= 0:
            return
        own = {str(path) for path in checkpoints.runs_in(run_dir).get(self._run or "", [])}
        found = [path for path in sort_checkpoints(run_dir, use_mtime=True) if path in own]
        kept = {str(Path(self.state.best_model_checkpoint))} if self.state.best_model_checkpoint is not None else set()
        if keep_newest:
            kept |= set(found[-1:])
        removable = [path for path in found if path not in kept]
        for path in removable[: max(0, len(found) - max(limit, len(kept)))]:
            shutil.rmtree(path, ignore_errors=True)

    def _finalize_training(self, *args, **kwargs):
        # With a limit of 1 the Trainer deletes all checkpoints in the folder but the best, whosever they are (5.23).
        limit = self.args.save_total_limit
        best_alone = limit == 1 and self.state.best_model_checkpoint is not None
        if best_alone:
            self.args.save_total_limit = None
        try:
            result = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if best_alone:
            self._rotate(self._get_output_dir(trial=None), limit, keep_newest=False)
        return result

    # ---- Write -----------------------------------------------------------------------------------------------------

    def _node(self) -> int:
        """The machine whose folder this process writes to; one for all without `save_on_each_node`."""
        if not self.args.save_on_each_node:
            return 0
        return self.args.process_index // int(os.environ.get("LOCAL_WORLD_SIZE", str(self.args.world_size)))

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
        """
        *Collective.* A whole population checkpoint, or none.

        Raises:
            NonFiniteMemberError: on every process, if a member holds NaN or infinite values: nothing can go on from it.
        """
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
            if self.soup.left_out:
                raise NonFiniteMemberError(
                    self.soup.left_out,
                    self.state.global_step,
                    "so no checkpoint is written, and those before stay as they are. Resume from the last one "
                    '(`resume_from_checkpoint="auto"`) with a smaller `max_grad_norm`, or begin anew with a lower '
                    "`learning_rate`, which a checkpoint would bring as it was. Without checkpoints "
                    '(`save_strategy="no"`) the other members train on, and the soup leaves out what is not finite.',
                )
            self._write_checkpoint(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        self._rotate(run_dir, self.args.save_total_limit)

    def _write_checkpoint(self, folder: Path) -> None:
        def write_soup(staging: Path) -> dict[str, torch.Tensor]:
            self._save(str(staging))
            self._state_with_callbacks().save_to_json(str(staging / "trainer_state.json"))
            if not self.args.save_only_model:
                checkpoints.write_mixer(staging, self.mixing.mixer_state())
            bar.update()
            return self._shared_frozen(self.population.wholes[0])

        def describe() -> dict[str, Any]:
            bar.update()
            return self._manifest()

        def member_part(slot: int, index: int) -> tuple:
            if slot:  # the one before is written
                bar.update()
            return self._member_part(slot, index)

        with bar_of(f"writing {folder.name}", 1 + len(self.population.indices), self._quiet) as bar:
            checkpoints.write(
                self.population,
                folder,
                node=self._node(),
                leads=self.args.should_save,
                write_soup=write_soup,
                member_part=member_part,
                describe=describe,
            )

    def _member_part(self, slot: int, index: int) -> tuple:
        """What is a member's own: its tensors and, to resume from, its part of the training's state and its streams."""
        whole = self.population.wholes[slot]
        weights = checkpoints.own_tensors(whole, self._shared_frozen(whole))
        if self.args.save_only_model:
            return weights, None, None
        return weights, *self._training_state(slot, index, whole)

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
        training["loss"], training["skipped"] = self._log.losses[slot].item(), list(self._log.skipped[slot])
        if self.accelerator.scaler is not None:
            training["scaler"] = self.accelerator.scaler.state_dict()
        streams = {"streams": self.population.streams.state(index), "loader": self._batches.loaders[slot].state()}
        return training, checkpoints.encode_streams(streams)

    def _manifest(self) -> dict[str, Any]:
        args, moved = self.args, self.mixing.state()
        return {
            "hf_wash_version": __version__,
            "run": self._run,
            "step": self.state.global_step,
            "finite": True,  # or it would not have been written
            "total_steps": self._total_steps,
            "epoch": self._batches.epoch,
            "position": self._batches.position,
            "batches": self._batches_in_an_epoch(),
            "training_data": appearance(self.train_dataset),
            "population_size": self.population.size,
            "seed": args.seed,
            "probability": self.mixing.probability,
            **options.recorded(args),
            "overrides": [overrides.describe() for overrides in self._overrides],
            "values_moved": moved["values_moved"],
            "bytes_exchanged": moved["bytes_exchanged"],
            "log_window": {"since": self._globalstep_last_logged, "moved": moved["moved"]},
            "architecture": describe_architecture(self.population.wholes[0]),
            "made_with": options.made_with(args.device),
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
        main = self.population.rank == 0
        if found is None:
            if main:
                logger.warning(f"There is no complete checkpoint in `{self.args.output_dir}`: a new run begins.")
            return None
        folder, manifest = found
        self._adopt(manifest, folder)
        if main:
            logger.warning(f"Resuming from `{folder}` (step {manifest['step']} of run {manifest['run'][:8]}).")
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
        difference = first_difference(own, theirs, "this run", "the checkpoint")
        if difference is not None:
            raise ValueError(f"Cannot resume: `{folder}` holds another architecture: {difference}.")
        if manifest["seed"] != self.args.seed:
            raise ValueError(
                f"Cannot resume: `{folder}` was shuffled with seed {manifest['seed']}, this run's is {self.args.seed}."
            )
        self._compare_options(manifest, folder)

    def _compare_options(self, manifest: dict[str, Any], folder: str) -> None:
        saved = {**manifest["options"], **manifest.get("arguments", {})}
        frozen = any(not parameter.requires_grad for parameter in self.population.wholes[0].parameters())
        if saved.get("same_init") is False and self.args.same_init and frozen:
            raise ValueError(
                f"Cannot resume: `{folder}` was written with `same_init=False`, so each member has frozen weights of its "
                "own, and with `same_init=True` they would share one member's."
            )
        before, now = saved.get("lr_scheduler_type"), self.args.lr_scheduler_type
        now = str(getattr(now, "value", now))
        if before not in (None, now) and {str(before), now} & set(options.SCHEDULERS_WITH_STATE):
            raise ValueError(
                f"Cannot resume: `{folder}` was written with `lr_scheduler_type={before!r}`, whose state `{now}` cannot take."
            )
        if self._replay is not None:
            return  # it says so itself, of the checkpoint that it makes
        effective, without = options.compare(manifest, self.args, self._overrides)
        if (effective or without) and self.population.rank == 0:
            told = [f"Taking effect from here on: {'; '.join(effective)}."] if effective else []
            if without:
                told.append(f"Without effect, since the checkpoint brings what it was: {'; '.join(without)}.")
            logger.warning(f"Resuming with other options than `{folder}` was written with. {' '.join(told)}")

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

    def _init_training_state(self, max_steps, *args, **kwargs):
        # Trainer (5.23) compares a part of the run (`logging_steps=0.05`) with the steps a checkpoint has made of it,
        # finds that they differ, and warns.
        in_steps, given = TrainerState(), dict(self.args.__dict__)
        in_steps.compute_steps(self.args, max_steps)
        names = ("logging_steps", "eval_steps", "save_steps")
        self.args.__dict__.update({name: getattr(in_steps, name) for name in names if given[name] is not None})
        try:
            return super()._init_training_state(max_steps, *args, **kwargs)
        finally:
            self.args.__dict__.update(given)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        frozen = [path] if (path := folder / checkpoints.FROZEN).is_file() else []
        _ = self.members  # made here, if they are not there yet
        own = [
            (whole, [folder / f"member_{index}" / checkpoints.MEMBER_WEIGHTS, *frozen])
            for index, whole in zip(self.population.indices, self.population.wholes, strict=True)
        ]

        def check() -> None:
            for whole, files in own:
                checkpoints.check_weights(whole, files)

        def read() -> None:
            for whole, files in own:
                checkpoints.read_weights(whole, *files)

        # No member takes anything before all of all processes can.
        checkpoints.checked(self.population, check)
        checkpoints.checked(self.population, read)
        self.soup.forget()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        resume, indices = self._resuming, self.population.indices

        def read() -> None:
            folders = [Path(checkpoint) / f"member_{index}" for index in indices]
            found = [checkpoints.read_training(folder, self.population.streams) for folder in folders]
            resume["parts"] = {index: training for index, (training, _) in zip(indices, found, strict=True)}
            resume["streams"] = [streams for _, streams in found]
            wholes = dict(zip(indices, self.population.wholes, strict=True))
            checkpoints.put_together(self.optimizer, self.lr_scheduler, wholes, resume["parts"])

        checkpoints.checked(self.population, read)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.accelerator.scaler is None:
            return
        state = self._resuming["parts"][self.population.indices[0]].get("scaler")
        if state is not None:
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The members' streams are restored where their batches are drawn.
        return

    def _continue_from(self, resume: dict[str, Any], epoch: int, placeholders: int) -> None:
        manifest, now = resume["manifest"], self._batches_in_an_epoch()
        if manifest.get("batches", now) != now and self.population.rank == 0:  # older versions did not say
            logger.warning(
                f"An epoch has {now} batches and had {manifest['batches']} when `{resume['folder']}` was written: the run "
                "goes on with other data."
            )
        self._batches.resume_at(epoch, placeholders, manifest, resume["streams"])
        self._count_on(resume)

    def _batches_in_an_epoch(self) -> int | None:
        return len(self._batches) if self._batches.sized else None

    def _count_on(self, resume: dict[str, Any]) -> None:
        manifest, parts = resume["manifest"], resume["parts"]
        window = manifest["log_window"]
        self.mixing.resume(manifest["values_moved"], manifest["bytes_exchanged"], window["moved"])
        self._globalstep_last_logged = window["since"]
        own = [parts[index] for index in self.population.indices]
        skipped = [part.get("skipped", (0, 0)) for part in own]  # older versions did not say
        self._log = MemberLog(self.population, [part["loss"] for part in own], skipped)

    def _stops_because_finished(self) -> bool:
        """Stop if the checkpoint that this run goes on from is its last: the loop would take one more step (5.23)."""
        finished = self._resume is not None and self.state.global_step >= self.state.max_steps
        if finished:
            self.control.should_training_stop = True
        return finished

    def _finish_without_training(self) -> None:
        """What a run that had nothing left to do hands out is its last checkpoint's."""
        resume, self._resume = self._resume, None
        if resume is None:
            return
        self._count_on(resume)
        figures = training_figures(self.args.output_dir, self._run) if self.is_world_process_zero() else {}
        self._figures_of_before = self.population.broadcast(figures)
        if self.is_world_process_zero():
            logger.warning(
                f"The run of `{resume['folder']}` is finished ({self.state.global_step} of {self.state.max_steps} steps): "
                "nothing is left to train"
                + (", and the figures of its training stay as they were." if self._figures_of_before else ".")
            )

    def _load_best_model(self) -> None:
        """*Collective.* Members and soup of the best checkpoint."""
        folder = self.state.best_model_checkpoint
        logger.info(f"Loading the best population from {folder} (score: {self.state.best_metric}).")
        self._load_from_checkpoint(folder)
        self._serve_soup()
