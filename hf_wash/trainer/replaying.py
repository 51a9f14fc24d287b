"""
[`Replaying`]: a part of a run that is done once more, to see whether a checkpoint is what it makes; it leaves no trace.

Where a replay begins and how it is compared is `replay`'s work.
"""

import contextlib
import copy
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..population.examples import appearance, difference_of_appearance
from . import checkpoint as checkpoints
from . import dry_run, options
from . import replay as replays
from .part import Part
from .replay import Difference, Replay, ReplayOver, Until
from .run_folder import leaves_no_empty_folder
from .served_soup import ServedSoup


logger = logging.get_logger(__name__)


class Replaying(Part):
    """The part of a population's Trainer that verifies checkpoints."""

    if TYPE_CHECKING:
        # Where they are: in `checkpointing`.
        def _adopt(self, manifest: dict[str, Any], folder: str) -> None: ...
        def _manifest(self) -> dict[str, Any]: ...
        def _shared_frozen(self, whole: Any) -> dict[str, Any]: ...
        def _member_part(self, slot: int, index: int) -> tuple: ...

    @leaves_no_empty_folder
    def verify_checkpoint(self, folder: str | Path) -> Replay:
        """
        *Collective: call on every process.* Replay the run from the complete checkpoint before this one in the same
        folder, of the same run (from its beginning, where there is none), up to the checkpoint's step, and compare all
        members' weights, optimizer states, learning rates and random streams, and the soup, bit by bit.

        It proves what a run, its data and its machine make: with another kind of hardware, number of threads or
        version of torch a difference may be theirs. The number of processes may be another than the run's.

        The run's folder stays as it is, and so do this trainer, its members and its random streams, if the data sets
        themselves remember nothing. Nothing is saved, pushed or reported; evaluations take place where the run made
        them, since members' streams know of them. Callbacks of your own take part, for training may depend on them. It
        takes as long as the run took between the two checkpoints, and the memory of one more copy of the members.

        Args:
            folder (`str` or `Path`): The checkpoint, `run/checkpoint-200` say.

        Returns:
            [`Replay`]: What was found, the same on every process; `identical` is the verdict, `print` says it.

        Raises:
            ValueError: on every process, for a folder that is no complete checkpoint, one of another population,
                architecture, seed, options or data (as far as they can be told), and a run that would have to begin from
                members that have been trained since.
        """
        if self.is_in_train:
            raise ValueError("`verify_checkpoint` replays a run of its own: call it before or after `train`.")
        _ = self.members
        trained, given = self._trainings > 0, self._given_optimizer and self.population.size == 1
        with self._told_to_all(), self._in_a_fresh_run(given):
            resolved = replays.reworded(
                lambda: checkpoints.resolve(
                    self.population, self.args.output_dir, str(folder), leads=self.args.should_save
                )
            )
            where, manifest = resolved
            start = self._start_of_replay(Path(where), manifest)
            if start is None and trained and self.model_init is None:
                raise ValueError(
                    f"Cannot replay: there is no complete checkpoint before `{where}`, so the replay begins with the run, "
                    "but this trainer's members have been trained: make the trainer anew (or give it `model_init`)."
                )
            replays.reworded(lambda: self._adopt(manifest, where))
            effective, changed = options.compare(manifest, self.args, self._overrides)
            if start is None:
                effective, changed = [*effective, *changed], []  # no checkpoint brings what they were
            if effective:
                raise ValueError(f"Cannot replay: `{where}` was written with other options: {'; '.join(effective)}.")
            self._refuse_other_data(where, manifest)
            if changed and self.population.rank == 0:
                logger.warning(
                    f"Replaying with other options than `{where}` was written with, without effect, since the checkpoint "
                    f"before it brings what they were: {'; '.join(changed)}."
                )
            difference = self._replay_to(Path(where), manifest, start)
            found = self._replay
            assert found is not None
            return Replay(
                folder=where,
                step=manifest["step"],
                start=found["start"],
                members=self.population.size,
                weights_only=found["weights_only"],
                difference=difference,
                changed=(*changed, *found["causes"]),
            )

    def _refuse_other_data(self, where: str, manifest: dict[str, Any]) -> None:
        """*Collective.*"""

        def look() -> None:
            before, now = manifest.get("training_data"), appearance(self.train_dataset)
            told = difference_of_appearance(before, now) if before and now else None
            if told is not None:
                raise ValueError(f"`{where}` was trained on other data: {told}")

        replays.reworded(lambda: checkpoints.checked(self.population, look))

    def _start_of_replay(self, folder: Path, manifest: dict[str, Any]) -> str | None:
        """*Collective.* The checkpoint to begin from, the same everywhere; `None` for the run's beginning."""

        def look() -> tuple[str | None, list[str]]:
            if not self.args.should_save:
                return None, []
            found, skipped = replays.find_start(folder, manifest)
            return (found.name if found is not None else None), skipped

        outcomes = replays.reworded(lambda: checkpoints.checked(self.population, look))
        name, skipped = outcomes[0]
        for reason in skipped if self.population.rank == 0 else ():
            logger.warning(f"A checkpoint is skipped: {reason}.")
        return str(folder.parent / name) if name is not None else None

    @contextlib.contextmanager
    def _in_a_fresh_run(self, keep_optimizer: bool) -> Iterator[None]:
        """A trainer that has not trained, writes elsewhere and reports nowhere; all is as it was in the end."""
        population, args = self.population, self.args
        parts = [self, self.state, self.control, self.accelerator, args, population, self.callback_handler]
        parts += [*self.callback_handler.callbacks, self.accelerator.gradient_state]
        if keep_optimizer:
            parts += [self.optimizer, getattr(self.optimizer, "optimizer", self.optimizer), vars(self)["lr_scheduler"]]
        stateful = [self.optimizer] if keep_optimizer else []
        if self.accelerator.scaler is not None:
            stateful.append(self.accelerator.scaler)
        states = [(each, copy.deepcopy(each.state_dict())) for each in stateful]
        seen: dict[int, dict[str, Any]] = {id(vars(part)): vars(part) for part in parts if hasattr(part, "__dict__")}
        elsewhere = Path(population.broadcast(str(Path(tempfile.gettempdir()) / f"hf-wash-replay-{uuid.uuid4().hex}")))
        data = (self.train_dataset, self.eval_dataset)
        leads = args.should_save
        try:
            with (
                replays.weights_as_they_were(population.wholes),
                dry_run.as_it_was(
                    *seen.values(),
                    streams=population.streams,
                    owners=[None, *population.indices],
                    apart_from=data,
                ),
            ):
                args.output_dir = str(elsewhere)
                args.save_strategy, args.push_to_hub, args.enable_jit_checkpoint = SaveStrategy.NO, False, False
                # A checkpoint of weights alone is found to be one whatever this trainer would write.
                args.push_members = args.save_only_model = args.report = False
                self.callback_handler.callbacks = replays.taking_part(self.callback_handler.callbacks)
                if not keep_optimizer:
                    self.__dict__.update(optimizer=None, lr_scheduler=None)
                self.soup, self._trainings, self._resume = ServedSoup(), 0, None
                self._mixing = self._member_log = None
                self._become(population.members[0], self.members[0])
                own_collator: Any = vars(self)["data_collator"]
                self.__dict__["data_collator"] = dry_run.copy_of_collator(own_collator, population.members[0])
                self._overrides = [
                    replace(own, data_collator=dry_run.copy_of_collator(own.data_collator, population.members[0]))
                    for own in self._overrides
                ]
                self._replay = {}
                yield
        finally:
            for each, state in states:
                each.load_state_dict(state)
            self._bring_members_up_to_date()
            if leads:
                shutil.rmtree(elsewhere, ignore_errors=True)

    def _replay_to(self, folder: Path, manifest: dict[str, Any], start: str | None) -> Difference | None:
        """*Collective.* Train, and compare; the first difference of the moments at which a checkpoint may be written."""
        began = checkpoints.read_manifest(start)["step"] if start is not None else 0
        until = Until(manifest["step"], began, quiet=self._quiet)
        self._replay = {
            "folder": folder,
            "manifest": manifest,
            "until": until,
            "start": began,
            "weights_only": replays.is_weights_only(manifest),
            "causes": [],
            "differences": [],
        }
        self.callback_handler.callbacks.append(until)
        try:
            replays.reworded(lambda: self.train(resume_from_checkpoint=start))
        except ReplayOver:
            pass
        finally:
            until.close()
        found = self._replay["differences"]
        if not found:
            how = f"the replay ended at step {self.state.global_step}"
            return Difference(manifest["step"], None, "length of the run", "step", how)
        return None if found[-1] is None else found[0]

    # ---- While it trains -------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        result = super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._replay is not None:
            self._look_at_replay(self._replay)
        return result

    def _look_at_replay(self, replay: dict[str, Any]) -> None:
        """*Collective.* Compare where the run may have written the checkpoint: at a step's end, or that of an epoch."""
        until, found = replay["until"], replay["differences"]
        if self.state.global_step == until.step:
            found.append(self._compare(replay))
        same = bool(found) and found[-1] is None
        if same or (until.epoch_is_over and (found or self.control.should_training_stop)):
            raise ReplayOver

    def _save_checkpoint(self, model, trial) -> None:
        if self._replay is None:
            super()._save_checkpoint(model, trial)

    def _compare(self, replay: dict[str, Any]) -> Difference | None:
        """*Collective.* What stands here beside what the checkpoint holds, in the place in which it was written."""
        folder, manifest, population = replay["folder"], replay["manifest"], self.population

        def compare() -> list[tuple[int | None, Any]]:
            found: list[tuple[int | None, Any]] = []
            for slot, index in enumerate(population.indices):
                weights, training, streams = self._member_part(slot, index)
                if replay["weights_only"]:
                    training = streams = None
                place = folder / f"member_{index}"
                found.append((index, replays.compare_member(place, weights, training, streams, population.streams)))
            if self.args.should_save:
                saved = Path(self.args.output_dir) / "soup"
                self._save(str(saved))
                shared = self._shared_frozen(population.wholes[0])
                found.append((None, replays.compare_soup(folder, saved, shared)))
                if not replay["weights_only"]:
                    theirs = checkpoints.read_mixer(folder)
                    found.append((None, replays.compare_mixer(theirs, self.mixing.mixer_state())))
                found.append((None, replays.compare_counts(manifest, own)))
            return found

        with self._as_soup():
            own = self._manifest()
            outcomes = checkpoints.checked(population, compare)
        replay["causes"] = population.broadcast(replays.causes(manifest, own))
        first = replays.first_of(outcomes)
        if first is None:
            return None
        member, (part, tensor, how) = first
        return Difference(manifest["step"], member, part, tensor, how)
