"""
One cell of a comparison: a population trained with one method, setting and seed, and what came of it.

A cell that was killed goes on from its newest checkpoint when it is run again. Nothing in its result depends on that,
the times aside.
"""

import copy
import dataclasses
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from hf_wash import WashConfig, WashTrainer
from hf_wash.files import write_whole
from hf_wash.population.overrides import papa_recipes

from .beyond import make_known
from .data import Data, prepare
from .measure import best_average, consensus_distance, measure_plain, measure_population
from .models import make_model
from .setting import Setting


# Members and shuffles of one seed must not be those of another.
SEEDS_APART = 1000
# Over which part of the run an EMA reaches back. All are taken along, and held-out data choose.
EMA_SPANS = (0.01, 0.05, 0.2)


@dataclass(frozen=True)
class Cell:
    """
    What is trained.

    Args:
        label (`str`): Of its row.
        method (`str`): A key of `METHODS`, or of the variants in `beyond`.
        options (`dict`): Of `WashConfig`.
        seed (`int`): The comparison's; a member's is 1000 times this and its index.
        steps (`int`): Optimizer steps of a member.
        setting ([`Setting`]): What all cells share.
    """

    label: str
    method: str
    options: dict[str, Any]
    seed: int
    steps: int
    setting: Setting

    @property
    def name(self) -> str:
        return f"{self.label}-seed{self.seed}"

    @property
    def size(self) -> int:
        return self.options.get("population_size", self.setting.population_size)

    @property
    def work(self) -> int:
        """Steps of all members, what a cell's time grows with."""
        return self.size * self.steps

    def as_dict(self) -> dict[str, Any]:
        """As plain values, all that the result depends on."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Cell":
        """From [`as_dict`]."""
        return cls(**{**values, "setting": Setting(**values["setting"])})


class Progress(TrainerCallback):
    """
    Writes how far a cell is, measures its steps, and ends it with the script that started it.

    Args:
        path (`Path`): Of a file with the step, the last step, and how many steps took how many seconds so far.
    """

    def __init__(self, path: Path):
        self._path, self._starter = path, multiprocessing.parent_process()
        self.steps, self.seconds, self.steps_here = 0, 0.0, 0
        if path.exists():
            _, _, steps, seconds = path.read_text().split()
            self.steps, self.seconds = int(steps), float(seconds)
        self._began = self._written = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if self._starter is not None and not self._starter.is_alive():
            os._exit(1)
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.steps, self.steps_here, self.seconds = (
            self.steps + 1,
            self.steps_here + 1,
            self.seconds + now - self._began,
        )
        if now - self._written > 1 or state.global_step == state.max_steps:
            self._written = now
            write_whole(self._path, f"{state.global_step} {state.max_steps} {self.steps} {self.seconds}".encode())


class Averages(TrainerCallback):
    """
    Moving averages (timm's `ModelEmaV3`) of the weights of a plain run, or of the mean of a population's members, saved
    beside each checkpoint.
    """

    def __init__(self, folder: Path, steps: int):
        self._folder, self._steps = folder, steps
        # Of the Trainer that this is given to.
        self.members: Callable[[], list[nn.Module]] = list
        self._mean: nn.Module | None = None
        self.models: dict[float, nn.Module] = {}
        self._averages: list[ModelEmaV3] = []

    def _path(self, step: int) -> Path:
        return self._folder / f"averages-{step:09}.pt"

    @torch.no_grad()
    def _averaged(self) -> nn.Module:
        """The mean of the members; its buffers (BatchNorm's statistics) are those of the first."""
        members = self.members()
        if len(members) == 1:
            return members[0]
        if self._mean is None:
            self._mean = copy.deepcopy(members[0])
        for own in zip(self._mean.parameters(), *(member.parameters() for member in members), strict=True):
            torch.mean(torch.stack(own[1:]), 0, out=own[0])
        for buffer, of_first in zip(self._mean.buffers(), members[0].buffers(), strict=True):
            buffer.copy_(of_first)
        return self._mean

    def on_train_begin(self, args, state, control, **kwargs):
        model = self._averaged()
        self._averages = [ModelEmaV3(model, decay=1 - 1 / max(2.0, span * self._steps)) for span in EMA_SPANS]
        self.models = {span: ema.module for span, ema in zip(EMA_SPANS, self._averages, strict=True)}
        if state.global_step:
            saved = torch.load(self._path(state.global_step), weights_only=True, map_location=args.device)
            for average, weights in zip(self.models.values(), saved, strict=True):
                average.load_state_dict(weights)

    def on_step_end(self, args, state, control, **kwargs):
        model = self._averaged()
        for average in self._averages:
            average.update(model, step=state.global_step)
        if control.should_save:
            # Before the checkpoint, which follows this event; the one before is kept until the next, lest a kill in
            # between leaves a checkpoint without averages.
            torch.save([average.state_dict() for average in self.models.values()], self._path(state.global_step))
            for old in sorted(self._folder.glob("averages-*.pt"))[:-2]:
                old.unlink()


def make_trainer(cell: Cell, data: Data, folder: Path, callbacks: list[TrainerCallback]) -> WashTrainer:
    """The Trainer of a cell."""
    setting = cell.setting
    make_known(cell.options["mixing"])
    members = None
    if setting.recipes == "heterogeneous":
        members = papa_recipes(cell.size, len(data.label_names), seed=cell.seed, collate=data.collate)
    config = WashConfig(
        output_dir=str(folder),
        seed=SEEDS_APART * cell.seed,
        max_steps=cell.steps,
        per_device_train_batch_size=setting.batch_size,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        dataloader_num_workers=0 if setting.view != "resized_crop" else 2,
        remove_unused_columns=False,
        optim="sgd",
        optim_args=f"momentum={setting.momentum},nesterov={setting.nesterov}",
        learning_rate=setting.learning_rate,
        weight_decay=setting.weight_decay,
        max_grad_norm=0.0,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": setting.min_learning_rate},
        warmup_steps=setting.warmup_steps,
        soup_batch_norm_batches=setting.batch_norm_batches,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=max(1, math.ceil(cell.steps / (setting.checkpoints + 1))),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        **{"population_size": setting.population_size, **cell.options},
    )
    trainer = WashTrainer(
        model_init=lambda: make_model(setting, data.label_names),
        args=config,
        train_dataset=data.train,
        data_collator=data.collate,
        members=members,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(cell: Cell, folder: Path, data: Data) -> dict[str, Any]:
    """
    Train and measure.

    Args:
        cell ([`Cell`]): What.
        folder (`Path`): Where its checkpoints lie.
        data ([`Data`]): Of its setting.

    Returns:
        `dict`: Plain values: the cell's label, method, options, seed and steps; accuracies; what was sent (bytes that a
        member sends in a step, on average, and copies of the model); seconds of a step.
    """
    progress, averages = Progress(folder / "progress"), Averages(folder, cell.steps)
    over_time = cell.size == 1 or cell.method == "wash_ema"
    trainer = make_trainer(cell, data, folder, [progress, averages] if over_time else [progress])
    averages.members = lambda: trainer.population.members
    trainer.train(resume_from_checkpoint="auto")
    members = trainer.population.members
    size = sum(p.numel() * p.element_size() for p in members[0].parameters() if p.requires_grad)
    sent = trainer.mixing.bytes_exchanged / (cell.steps * len(members))
    found = {
        **{name: value for name, value in cell.as_dict().items() if name != "setting"},
        "parameters": sum(p.numel() for p in members[0].parameters()),
        "bytes_per_step": sent,
        "copies_per_step": sent / size,
        "seconds_per_step": progress.seconds / max(1, progress.steps),
        "mixing_seconds_per_step": trainer.mixing.seconds / max(1, progress.steps_here),
    }
    seed = SEEDS_APART * cell.seed
    if cell.size == 1:
        return found | measure_plain(members[0], averages.models, data, cell.setting, seed)
    recalibrated = trainer.args.soup_batch_norm == "recalibrate"
    soup = trainer.model
    if averages.models:
        found["ema_span"], soup = best_average(averages.models, data, cell.setting, seed)
    found |= measure_population(members, soup, data, cell.setting, seed, recalibrated)
    # Of the members from their mean, whatever is served.
    return found | {"consensus_distance": consensus_distance(members, trainer.model)}


def work_on(values: dict[str, Any], folder: str, result: str, data_folder: str, where: dict[str, str]) -> None:
    """
    What a process for one cell does.

    Args:
        values (`dict`): The cell, as [`Cell.as_dict`] has it.
        folder (`str`): Its own; what would be printed goes into `log.txt` there.
        result (`str`): The file that its result is written to.
        data_folder (`str`): Where prepared data are kept.
        where (`dict`): The checkout's commit, and the machine; they become part of the result.
    """
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cell = Cell.of(values)
    found = run(cell, Path(folder), prepare(cell.setting, data_folder)) | where
    write_whole(result, json.dumps(found, indent=1).encode())
