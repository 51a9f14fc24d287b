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
    """The commit of this checkout, with a plus where files differ from it; `unknown` without git."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def command() -> str:
    """The command line, from the repository's root, without the folder of the outputs."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word not in ("--output_dir", "--record"):
            words.append(word)
        skip = word in ("--output_dir", "--record")
    return " ".join(["python", f"examples/{Path(sys.argv[0]).name}", *words])


def record(kind: str, setting: Setting, steps: int, cells: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """
    All that is kept.

    Args:
        kind (`str`): `comparison`, `study` or `tuning`.
        setting ([`Setting`]), steps (`int`): What all cells share.
        cells (`list[dict]`): Their results.
        **more: What the kind adds.
    """
    # A folder's cells may be of several calls, commits and machines.
    commits = dict.fromkeys(cell.get("commit", "unknown") for cell in cells)
    machines = dict.fromkeys(cell.get("machine", machine()) for cell in cells)
    return {
        "kind": kind,
        "setting": dataclasses.asdict(setting),
        "steps": steps,
        "command": command(),
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


def recorded(path: str | Path, setting: Setting) -> list[tuple[Cell, dict[str, Any]]]:
    """
    The cells of a record, with their results; none if there is no such file, or if it is of another setting.

    Args:
        path (`str` or `Path`): That [`save`] wrote.
        setting ([`Setting`]): Theirs.
    """
    if not Path(path).exists():
        return []
    kept = json.loads(Path(path).read_text())
    if kept["setting"] != rounded(dataclasses.asdict(setting)):
        return []
    return [
        (
            Cell(result["label"], result["method"], result["options"], result["seed"], result["steps"], setting),
            {"machine": kept["machine"], **result},
        )
        for result in kept["cells"]
    ]


def save(path: str | Path, kept: dict[str, Any]) -> None:
    """Write a record, a line for each cell."""
    head = {name: value for name, value in kept.items() if name != "cells"}
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
    lines = ",\n".join(f"  {json.dumps(cell, ensure_ascii=False)}" for cell in kept["cells"])
    write_whole(path, f'{text},\n "cells": [\n{lines}\n ]\n}}\n'.encode())


def tuned_settings(setting: Setting, folder: Path = RESULTS) -> dict[str, Any]:
    """
    What was chosen for a preset, by row; empty where nothing was tuned.

    Args:
        setting ([`Setting`]): Of the preset.
        folder (`Path`): With the records.
    """
    path = folder / f"tuning-{setting.name}.json"
    return json.loads(path.read_text())["chosen"] if path.exists() else {}


def cells_for(rows: list[tuple[str, str, dict[str, Any], int]], seeds: int, setting: Setting) -> list[Cell]:
    """All cells of some rows: one seed after the other, so that a comparison that is cut short has whole tables."""
    return [
        Cell(label, method, options, seed, steps, setting)
        for seed in range(seeds)
        for label, method, options, steps in rows
    ]
