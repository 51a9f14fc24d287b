#!/usr/bin/env python
"""
Train populations with each method of the field, from the same seeds and with the same recipe, and compare what comes
of them: members, ensemble, averaged model, greedy soup, what was sent.

    python examples/compare_methods.py --preset glyphs-short             # embedded data, on a CPU
    python examples/compare_methods.py --preset cifar100 --seeds 3       # the papers' set-up, ResNet-18
    python examples/compare_methods.py --preset glyphs-short --data_dir photos/ --methods wash papa plain
    python examples/compare_methods.py --preset glyphs-short --time_limit 40   # minutes; the rest another time

OUTPUT_DIR gets `table.md`, `table.csv`, `picture.png` and `results.json`, what `results_page.py` makes its page from. A
cell (one method, setting and seed) that is finished is not run again by the same command; one that was killed goes on
from its checkpoint. Tables and picture are of all finished cells of the folder that have the same setting, so that methods
can be added by another call.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from command_line import CommandLine, exits
from comparison.cell import Cell
from comparison.data import prepare
from comparison.methods import BUDGETS, METHODS, label, place_of, rows
from comparison.models import make_model
from comparison.record import cells_for, earlier, merged, record, run_of, save, tuned_settings, tuning_record
from comparison.runner import Runner, available_cores, in_words, step_seconds
from comparison.setting import MODELS, PRESETS, RECIPES, Setting
from comparison.tables import comparison_csv, comparison_table, rows_of, verdict
from transformers.utils import logging

from hf_wash.files import write_whole
from hf_wash.trainer.run_folder import MadeFolders


KINDS = ("published", "default", "tuned", "budgets")


@dataclass
class SettingArguments:
    """What is trained: a preset, and what is to be different from it."""

    preset: str = field(
        default="glyphs-short", metadata={"help": "Data, model, recipe and length.", "choices": list(PRESETS)}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Other data: a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    data_dir: str | None = field(default=None, metadata={"help": "Other data: a folder of images for each class."})
    model: str | None = field(default=None, metadata={"help": "Another model.", "choices": list(MODELS)})
    width: int | None = field(default=None, metadata={"help": "Channels of the first stage of resnet18."})
    recipes: str | None = field(
        default=None,
        metadata={
            "help": "heterogeneous: mixup, CutMix, label smoothing and erasing are drawn for each member.",
            "choices": list(RECIPES),
        },
    )
    population_size: int | None = field(default=None, metadata={"help": "Members, N; 3 in the presets."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimizer steps of a member, for a shorter run."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Test on so many images at most."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: outputs/SCRIPT-PRESET."})
    jobs: int | None = field(
        default=None, metadata={"help": "Cells at a time. Default: one for each core; 1 on a GPU."}
    )
    time_limit: float | None = field(
        default=None, metadata={"help": "Minutes after which the rest is left to another call."}
    )
    record: str | None = field(
        default=None,
        metadata={
            "help": "Where results.json is written to as well, such as docs/results/NAME.json. Cells that are in it "
            "already are not run again, and stay in it."
        },
    )

    def __post_init__(self):
        for name in ("jobs", "max_steps", "population_size", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, found {value}.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(f"--time_limit must be a number of minutes above 0, found {self.time_limit}.")
        if self.data_dir and self.dataset_name:
            raise ValueError("--data_dir and --dataset_name both name training data; give one of them.")
        if self.jobs is None:
            self.jobs = 1 if torch.accelerator.is_available() else available_cores()

    def setting(self) -> Setting:
        """The preset with what was said on the command line."""
        return PRESETS[self.preset].but(
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            data_dir=self.data_dir,
            model=self.model,
            width=self.width,
            recipes=self.recipes,
            population_size=self.population_size,
            steps=self.max_steps,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
        )


@dataclass
class CompareArguments:
    """Which methods, with which settings."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Of {', '.join(METHODS)}. Default: all."}
    )
    kinds: list[str] = field(
        default_factory=lambda: list(KINDS),
        metadata={
            "help": "published: the authors' settings; default: WASH as this library has it; tuned: those that "
            "tune_methods.py found for the preset; budgets: equal bytes. Default: all."
        },
    )
    budgets: list[float] = field(
        default_factory=lambda: list(BUDGETS),
        metadata={"help": "Copies of the model that a member sends in a step. Default: 0.01 0.04 0.1."},
    )
    seeds: int = field(default=3, metadata={"help": "Seeds for each row."})
    tuning: str | None = field(
        default=None, metadata={"help": "What tune_methods.py found. Default: docs/results/tuning-PRESET.json."}
    )

    def __post_init__(self):
        if self.tuning is not None and not Path(self.tuning).is_file():
            raise ValueError(f"--tuning {self.tuning}: there is no such file.")
        for name, known in (("methods", METHODS), ("kinds", KINDS)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"--{name} {value}: there is no such thing. There are: {', '.join(known)}.")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ValueError(f"--budgets must be copies of the model between 0 and 1, found {budget:g}.")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, found {self.seeds}.")


def begin(arguments: SettingArguments, setting: Setting, script: str) -> tuple[Runner, int, Any, int]:
    """
    Data, and how long a step takes.

    Returns:
        `tuple[Runner, int, nn.Module, int]`: what runs the cells; the steps of a member; a model, for its shapes; and
        the steps in an epoch.
    """
    folder = Path(arguments.output_dir or f"outputs/{script}-{arguments.preset}")
    with MadeFolders(folder).none_stays_empty():
        folder.mkdir(parents=True, exist_ok=True)
        data = prepare(setting, folder)
        steps_per_epoch = len(data.train) // setting.batch_size
        if not steps_per_epoch:
            raise ValueError(f"{len(data.train)} images to train on are fewer than a batch of {setting.batch_size}.")
        model = make_model(setting, data.label_names)
    runner = Runner(folder, arguments.jobs or 1, step_seconds(setting, data.label_names))
    return runner, setting.length(steps_per_epoch), model, steps_per_epoch


def run_all(
    runner: Runner, cells: list[Cell], arguments: SettingArguments, *records: dict[str, Any] | None
) -> tuple[list[dict], int]:
    """
    Run cells that earlier records of the setting, if there are any, do not hold; say what to expect before and what failed
    after; returns results and exit code.
    """
    for kept in records:
        if kept is not None and (taken := runner.adopt(kept["cells"], cells)):
            print(f"{taken} finished cells are taken from the record of a {kept['kind']}.")
    left = list({run_of(cell.as_dict()): cell for cell in cells if runner.result_of(cell) is None}.values())
    print(
        f"{len(cells)} cells, {len(left)} of them to run, {runner.jobs} at a time: about {in_words(runner.estimate(left))} "
        f"if the machine does nothing else.",
        flush=True,
    )
    results, failed = runner.run(cells, 60 * arguments.time_limit if arguments.time_limit else None)
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    return results, 1 if failed else 0


def write(folder: Path, kept: dict[str, Any], also: str | None) -> None:
    """Tables, picture and record of a comparison."""
    from comparison.picture import picture

    found = rows_of(kept["cells"], kept["setting"]["population_size"])
    write_whole(folder / "table.md", (comparison_table(found) + "\n").encode())
    write_whole(folder / "table.csv", comparison_csv(found).encode())
    write_whole(folder / "picture.png", picture(found, kept["setting"]["name"]))
    save(folder / "results.json", kept)
    if also:
        save(also, kept)


def main(arguments: list[str] | None = None) -> int:
    """Compare; returns the exit code."""
    parser = CommandLine([SettingArguments, CompareArguments], __doc__)
    logging.set_verbosity_error()
    given, chosen = parser.parse_args_into_dataclasses(args=arguments)
    setting = given.setting()
    before = earlier(given.record, "comparison", setting)
    tuned = tuned_settings(chosen.tuning or tuning_record(setting))
    runner, steps, model, steps_per_epoch = begin(given, setting, "compare")
    wanted, left_out = rows(
        chosen.methods,
        chosen.kinds,
        chosen.budgets,
        setting,
        steps,
        steps_per_epoch,
        model,
        tuned,
    )
    for reason in left_out:
        print(f"Left out: {reason}")
    cells = cells_for(wanted, chosen.seeds, setting)
    results, code = run_all(runner, cells, given, before)
    if not results:
        return code
    found, others = runner.finished(setting)
    every = merged(found, before, cells)
    every.sort(key=lambda cell: (cell["seed"], *place_of(cell["method"], cell["label"])))
    more = len(every) - len(results)
    kept = record("comparison", setting, steps, every, earlier_cells=more)
    write(runner.folder.parent, kept, given.record)
    table = rows_of(kept["cells"], setting.population_size)
    print(f"\n{comparison_table(table)}\n")
    by_label = {row.label: row for row in table}
    ours = by_label.get(label("wash", "tuned")) or by_label.get(label("wash", "default"))
    if ours is not None and chosen.seeds > 1:
        for row in (row for row in table if row is not ours):
            print(verdict(ours, row))
    print(f"\nTables, picture and record, of all {len(every)} finished cells of this setting: {runner.folder.parent}")
    if more:
        print(f"{more} of them are of earlier calls.")
    if others:
        print(f"Left out: {others} finished cells of another setting.")
    return code


if __name__ == "__main__":
    exits(main)
