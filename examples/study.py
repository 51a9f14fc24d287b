#!/usr/bin/env python
"""
The studies behind the advice on WASH's options: each a small table, one option varied and the rest as the comparison of
the preset has it.

    python examples/study.py --preset glyphs-short                              # all of them
    python examples/study.py --preset glyphs-short --studies p stop --seeds 3
    python examples/study.py --preset glyphs-short --list                       # what there is

Cells are kept as in `compare_methods.py`, and resumed. Cells that studies share are run once. The record is written to
`docs/results/study-PRESET.json` with `--record`, for `results_page.py`: the studies that are in it already stay, and what
the preset's comparison has in `docs/results/PRESET.json` with the same options is taken from there.
"""

from dataclasses import dataclass, field
from typing import Any

from command_line import CommandLine, exits
from compare_methods import SettingArguments, begin, run_all
from comparison.record import RESULTS, cells_for, earlier, merged, record, save, tuned_settings, tuning_record
from comparison.setting import PRESETS
from comparison.studies import STUDIES, cells_of_study, tables_of
from transformers.utils import logging


@dataclass
class StudyArguments:
    """Which studies."""

    studies: list[str] = field(
        default_factory=lambda: list(STUDIES), metadata={"help": f"Of {', '.join(STUDIES)}. Default: all."}
    )
    seeds: int = field(default=3, metadata={"help": "Seeds for each row."})
    list: bool = field(default=False, metadata={"help": "Say what each study asks, and stop."})

    def __post_init__(self):
        for name in self.studies:
            if name not in STUDIES:
                raise ValueError(f"--studies {name}: there is no such study. There are: {', '.join(STUDIES)}.")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, found {self.seeds}.")


def main(arguments: list[str] | None = None) -> int:
    """Run the studies; returns the exit code."""
    parser = CommandLine([SettingArguments, StudyArguments], __doc__)
    logging.set_verbosity_error()
    given, wanted = parser.parse_args_into_dataclasses(args=arguments)
    if wanted.list:
        for name in wanted.studies:
            print(f"{name}: {STUDIES[name].question}")
        return 0
    setting = given.setting()
    before = earlier(given.record, "study", setting)
    compared = None
    if given.record and setting == PRESETS[given.preset]:
        try:
            compared = earlier(RESULTS / f"{given.preset}.json", "comparison", setting)
        except ValueError as error:
            print(
                f"No cells are taken from the preset's comparison, since it was not run with this setting. ({error})"
            )
    tuned = tuned_settings(tuning_record(setting))
    runner, steps, model, steps_per_epoch = begin(given, setting, "study")
    rows: dict[str, tuple[str, str, dict[str, Any], int]] = {}
    members: dict[str, list[str]] = {}
    for name in wanted.studies:
        found, left_out = cells_of_study(name, setting, steps, steps_per_epoch, model, tuned)
        for reason in left_out:
            print(f"Left out: {reason}")
        members[name] = [row[0] for row in found]
        rows |= {row[0]: row for row in found}
    cells = cells_for(list(rows.values()), wanted.seeds, setting)
    results, code = run_all(runner, cells, given, before, compared)
    if not results:
        return code
    every = merged(results, before, cells)
    members = {**(before["studies"] if before is not None else {}), **members}
    members = {name: members[name] for name in STUDIES if name in members}
    kept = record("study", setting, steps, every, earlier_cells=len(every) - len(results), studies=members)
    save(runner.folder.parent / "results.json", kept)
    if given.record:
        save(given.record, kept)
    print("\n" + tables_of(kept))
    return code


if __name__ == "__main__":
    exits(main)
