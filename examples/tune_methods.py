#!/usr/bin/env python
"""
Find, for each method, the setting that suits the length of a preset's run: six trials each, of the same length, judged
by held-out training data; the test set is not looked at.

    python examples/tune_methods.py --preset glyphs-short
    python examples/tune_methods.py --preset glyphs-long --methods wash papa --time_limit 60

The raw results and what was chosen are written to `docs/results/tuning-PRESET.json`, which `compare_methods.py` reads; of
other data, model or length than the preset's to `OUTPUT_DIR/tuning.json`, for its `--tuning`; or to `--record`, whose
cells are not run again. What was tuned before in other rows stays there.
What is free at a fixed number of bytes (when to stop a shuffle, PAPA's α, DiLoCo's outer learning rate) is tuned for each
budget, too, in three trials each.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import CommandLine, exits
from compare_methods import SettingArguments, begin, run_all
from comparison.cell import Cell
from comparison.methods import (
    BUDGETS,
    FREE,
    METHODS,
    describe,
    for_budget,
    free_trials,
    label,
    most_copies,
    trials,
)
from comparison.record import cells_for, earlier, merged, record, save, tuning_record
from comparison.setting import PRESETS
from torch import nn
from transformers.utils import logging


TUNABLE = [name for name, method in METHODS.items() if "tuned" in method.kinds]
# Of the training images, for the choice alone: 2 % of a small set are too few to choose by.
HELD_OUT = 0.2


@dataclass
class TuneArguments:
    """What is tuned."""

    methods: list[str] = field(
        default_factory=lambda: list(TUNABLE), metadata={"help": f"Of {', '.join(TUNABLE)}. Default: all."}
    )
    budgets: list[float] = field(
        default_factory=lambda: list(BUDGETS),
        metadata={"help": "Copies of the model that a member sends in a step. Default: 0.01 0.04 0.1."},
    )
    seeds: int = field(default=1, metadata={"help": "Seeds for each trial."})

    def __post_init__(self):
        for name in self.methods:
            if name not in TUNABLE:
                raise ValueError(f"--methods {name}: there is nothing to tune. There is in: {', '.join(TUNABLE)}.")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, found {self.seeds}.")


def rows_of_trials(
    names: list[str], budgets: list[float], size: int, steps: int, steps_per_epoch: int, model: nn.Module
) -> tuple[list[tuple[str, str, dict[str, Any], int]], list[str]]:
    """
    All trials, in the order in which they are made.

    Args:
        names (`list[str]`): The methods.
        budgets (`list[float]`): Model copies for each member and step.
        size (`int`): Members, N.
        steps, steps_per_epoch (`int`), model (`nn.Module`): What is trained, and how long.

    Returns:
        `tuple[list, list[str]]`: (label, method, options, steps) of each, labelled with its row, a dot and a number; and
        which rows are left out, since the method cannot send so many bytes, in a sentence each.
    """
    found: list[tuple[str, str, dict[str, Any], int]] = []
    left_out = []

    def add(name: str, kind: str, options: dict[str, Any]) -> None:
        number = 1 + sum(row_of(row) == label(name, kind) for row, *_ in found)
        found.append((f"{label(name, kind)}.{number}", name, {**METHODS[name].options, **options}, steps))

    for name in names:
        for options in trials(name, steps):
            add(name, "tuned", options)
    for budget in budgets:
        for name in (name for name in names if name in FREE):
            tried = free_trials(name, budget, model, size)
            for free in tried:
                add(name, f"{budget:g}", for_budget(name, budget, model, size, steps, steps_per_epoch, free))
            if not tried:
                most = most_copies(model, size)
                left_out.append(
                    f"{label(name, f'{budget:g}')}: it sends at most {most:.3g} of such a model in a step."
                )
    return found, left_out


def row_of(label: str) -> str:
    """The row that a trial is for."""
    return label.rpartition(".")[0]


def chosen_of(results: list[dict[str, Any]], cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """
    For each row of a comparison of which all trials are finished (equal effort for all), the options of the trial with
    the best averaged model on held-out data; of equal ones the first.

    Args:
        results (`list[dict]`): Of the cells that are finished; their labels are a row's, a dot, and a number.
        cells (`list[Cell]`): All.
    """
    finished = {(result["label"], result["seed"]) for result in results}
    unfinished = {row_of(cell.label) for cell in cells if (cell.label, cell.seed) not in finished}
    scores: dict[str, dict[str, list[float]]] = {}
    options: dict[str, dict[str, Any]] = {}
    for result in results:
        row = row_of(result["label"])
        if row in unfinished:
            continue
        scores.setdefault(row, {}).setdefault(result["label"], []).append(result["held_out"]["soup"])
        method = METHODS[result["method"]].options
        options[result["label"]] = {n: value for n, value in result["options"].items() if n not in method}
    found = {}
    for row, tried in scores.items():
        best = max(tried, key=lambda name: statistics.fmean(tried[name]))
        found[row] = options[best]
    # At a budget the comparison computes what the bytes decide, from its own length.
    free = {name: set(given[0]) for name, given in FREE.items()}
    return {
        row: {n: v for n, v in given.items() if "@" not in row or n in free[row.partition("@")[0]]}
        for row, given in found.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Tune; returns the exit code."""
    parser = CommandLine([SettingArguments, TuneArguments], __doc__)
    logging.set_verbosity_error()
    given, wanted = parser.parse_args_into_dataclasses(args=arguments)
    setting = given.setting()
    if given.record is not None:
        path = Path(given.record)
    elif setting == PRESETS[given.preset]:
        path = tuning_record(setting)
    else:
        path = Path(given.output_dir or f"outputs/tune-{given.preset}") / "tuning.json"
    setting = setting.but(hold_out=HELD_OUT, evaluate_on="held_out")
    before = earlier(path, "tuning", setting)
    runner, steps, model, steps_per_epoch = begin(given, setting, "tune")
    rows, left_out = rows_of_trials(
        wanted.methods, wanted.budgets, setting.population_size, steps, steps_per_epoch, model
    )
    for reason in left_out:
        print(f"Left out: {reason}")
    cells = cells_for(rows, wanted.seeds, setting)
    # A tuning that is asked for without naming a record is made, not looked up.
    results, code = run_all(runner, cells, given, before if given.record else None)
    if not results:
        return code
    every = merged(results, before, cells)
    own = {row_of(cell.label) for cell in cells}
    chosen = {row: options for row, options in (before or {"chosen": {}})["chosen"].items() if row not in own}
    chosen |= chosen_of([result for result in every if row_of(result["label"]) in own], cells)
    kept = record("tuning", setting, steps, every, earlier_cells=len(every) - len(results), chosen=chosen)
    save(path, kept)
    for row, options in chosen.items():
        print(
            f"{row}: {describe({'mixing': METHODS[row.partition('@')[0].partition('-')[0]].options['mixing'], **options})}"
        )
    print(f"Written to {path}.")
    return code


if __name__ == "__main__":
    exits(main)
