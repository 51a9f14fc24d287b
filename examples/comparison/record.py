"""What is kept of a comparison: one small JSON file with all its cells, and where and how they were run."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_wash.files import write_whole

from .cell import Cell
from .setting import Setting


# What another call of the same cell may have otherwise.
OF_THE_CALL = ("seconds_per_step", "mixing_seconds_per_step", "commit", "machine")
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def machine() -> str:
    """The processor or accelerator, and the libraries' versions."""
    if torch.accelerator.is_available() and torch.cuda.is_available():
        what = torch.cuda.get_device_name()
    else:
        names = [line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")]
        what = f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, one thread a cell"
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return f"{what}; {versions}"


def _cpu_info() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def commit() -> str:
    """The commit of this checkout, with a plus where files differ from it, records aside; `unknown` without git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)docs/results")
        return git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command() -> str:
    """The command line, from the repository's root, without the folder of the outputs."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word not in ("--output_dir", "--record"):
            words.append(word)
        skip = word in ("--output_dir", "--record")
    return " ".join(["python", f"examples/{Path(sys.argv[0]).name}", *words])


def record(
    kind: str, setting: Setting, steps: int, cells: list[dict[str, Any]], earlier_cells: int = 0, **more: Any
) -> dict[str, Any]:
    """
    All that is kept.

    Args:
        kind (`str`): `comparison`, `study` or `tuning`.
        setting ([`Setting`]), steps (`int`): What all cells share.
        cells (`list[dict]`): Their results.
        earlier_cells (`int`): How many of them are not of the command that is run.
        **more: What the kind adds.
    """
    # A folder's cells may be of several calls, commits and machines.
    commits = dict.fromkeys(cell.get("commit", "unknown") for cell in cells)
    machines = dict.fromkeys(cell.get("machine", machine()) for cell in cells)
    return {
        "kind": kind,
        "setting": dataclasses.asdict(setting),
        "steps": steps,
        "command": command() + (" # and earlier calls with other rows or seeds" if earlier_cells else ""),
        "commit": ", ".join(commits),
        "machine": "; and ".join(machines),
        **more,
        "cells": rounded(cells),
    }


def rounded(value: Any) -> Any:
    """As a record has it: six digits are more than any of it means, and less than a float takes."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value


def earlier(path: str | Path | None, kind: str, setting: Setting) -> dict[str, Any] | None:
    """
    A record that a call is about to add to; `None` if there is none. Its cells say where and with what they were run.

    Args:
        path (`str` or `Path`, *optional*): Of the record.
        kind (`str`), setting ([`Setting`]): What the call is about to write there.

    Raises:
        ValueError: if what is there is something else, which would be lost.
    """
    if path is None or not Path(path).exists():
        return None
    try:
        kept = json.loads(Path(path).read_text())
        found, own = kept["kind"], rounded(kept["setting"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a {kind}: give another --record.") from error
    if found != kind:
        raise ValueError(f"{path} is the record of a {found}, and this is a {kind}: give another --record.")
    other = [name for name, value in rounded(dataclasses.asdict(setting)).items() if own.get(name) != value]
    if other:
        raise ValueError(
            f"{path} is a record of other runs, which differ in {', '.join(other)}: give another --record."
        )
    where = {"commit": kept["commit"], "machine": kept["machine"]}
    return {
        **kept,
        "cells": [cell | {name: cell.get(name, value) for name, value in where.items()} for cell in kept["cells"]],
    }


def merged(results: list[dict[str, Any]], before: dict[str, Any] | None, cells: list[Cell]) -> list[dict[str, Any]]:
    """
    Results, and those cells of an earlier record that they do not replace. A cell that came out as it was recorded stays as
    it was recorded: its times, commit and machine are what the record's tables are of.

    Args:
        results (`list[dict]`): Of this call.
        before (`dict`, *optional*): From [`earlier`].
        cells (`list[Cell]`): Of this call: what was recorded of the same row with other options is left out.
    """
    wanted = {cell.label: spec_of(cell.as_dict()) for cell in cells}
    known = {(result["label"], result["seed"]) for result in results}
    recorded = before["cells"] if before is not None else []
    by_name = {(cell["label"], cell["seed"]): cell for cell in recorded}
    results = [
        cell
        if (cell := by_name.get((result["label"], result["seed"]))) and _outcome(cell) == _outcome(result)
        else result
        for result in results
    ]
    return results + [
        cell
        for cell in recorded
        if (cell["label"], cell["seed"]) not in known and wanted.get(cell["label"], spec_of(cell)) == spec_of(cell)
    ]


def _outcome(cell: dict[str, Any]) -> dict[str, Any]:
    """What came of a cell, whenever and wherever it was run."""
    return {name: rounded(value) for name, value in cell.items() if name not in OF_THE_CALL}


def spec_of(cell: dict[str, Any]) -> dict[str, Any]:
    """What all cells of a row share, as a record has it."""
    return {name: rounded(cell[name]) for name in ("label", "method", "options", "steps")}


def run_of(cell: dict[str, Any]) -> str:
    """
    What decides the result of a cell beside its setting, whatever row it is for: cells that share it are one run. DART
    whose interval is given does what local SGD does, bit for bit.

    Args:
        cell (`dict`): As a record has it, or `Cell.as_dict`.
    """
    options = dict(cell["options"])
    if options["mixing"] == "dart" and options.get("average_interval") is not None:
        options["mixing"] = "local_sgd"
    # The one variant that differs from its method by what is measured.
    average = cell["method"] == "wash_ema"
    return json.dumps([rounded(options), cell["steps"], cell["seed"], average], sort_keys=True)


def save(path: str | Path, kept: dict[str, Any]) -> None:
    """Write a record, a line for each cell."""
    head = {name: value for name, value in kept.items() if name != "cells"}
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
    lines = ",\n".join(f"  {json.dumps(cell, ensure_ascii=False)}" for cell in kept["cells"])
    write_whole(path, f'{text},\n "cells": [\n{lines}\n ]\n}}\n'.encode())


def tuning_record(setting: Setting) -> Path:
    """Where what was tuned for a preset is kept."""
    return RESULTS / f"tuning-{setting.name}.json"


def tuned_settings(path: str | Path) -> dict[str, Any]:
    """
    What was chosen in a tuning, by row; empty where nothing was tuned.

    Args:
        path (`str` or `Path`): Of its record; there need not be one.

    Raises:
        ValueError: if there is something else.
    """
    if not Path(path).exists():
        return {}
    try:
        return dict(json.loads(Path(path).read_text())["chosen"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is no record of a tuning, which tune_methods.py writes.") from error


def cells_for(rows: list[tuple[str, str, dict[str, Any], int]], seeds: int, setting: Setting) -> list[Cell]:
    """All cells of some rows: one seed after the other, so that a comparison that is cut short has whole tables."""
    return [
        Cell(label, method, options, seed, steps, setting)
        for seed in range(seeds)
        for label, method, options, steps in rows
    ]
