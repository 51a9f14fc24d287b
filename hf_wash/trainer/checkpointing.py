"""
[`Checkpointing`]: when a population's Trainer writes a checkpoint, what is in it, and how a run goes on from one.

How it is written so that it appears whole, and read back, is `checkpoint`'s work.
"""

import os
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints
from transformers.utils import logging

from .. import __version__
from ..architecture import describe_architecture, first_difference
from ..population import MemberOverrides, copy_member
from . import checkpoint as checkpoints
from .log import MemberLog
from .part import Part


logger = logging.get_logger(__name__)


class Checkpointing(Part):
    """The part of a population's Trainer that writes checkpoints and resumes from them."""

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
        names = ["mixing", "shuffle_probability", "shuffle_schedule", "shuffle_optimizer_state", "shuffle_interval"]
        names += ["shuffle_start", "shuffle_stop", "same_init", "member_data", "data_seed", "soup"]
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
        difference = first_difference(own, theirs, "this run", "the checkpoint")
        if difference is not None:
            raise ValueError(f"Cannot resume: `{folder}` holds another architecture: {difference}.")
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
        _ = self.members  # made here, if they are not there yet
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
            self._resuming["streams"].append(checkpoints.decode_streams(streams))
        self._resuming["parts"] = parts
        wholes = dict(zip(self.population.indices, self.population.wholes, strict=True))
        checkpoints.put_together(self.optimizer, self.lr_scheduler, wholes, parts)

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
