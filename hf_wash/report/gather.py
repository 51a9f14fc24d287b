"""
What a run has left, as the report's pictures take it: from its log, its record, the measurements and the members.

Nothing is drawn or written here, and nothing computed that needs a model to answer.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ..files import is_file
from ..hub.record import LOCAL_MEMBERS, is_number, last_evaluation, read_json, read_log, read_record
from ..hub.traffic import others_send
from ..methods import METHODS


PLACE = "report"
SURVEY = "measurements.json"
LAYER_KEY = "layer_spread/"


@dataclass
class Run:
    """
    What is known of a run.

    Args:
        name (`str`): What it is called.
        record (`dict`): As in `wash_run.json`.
        log (`list[dict]`): The entries of `trainer_state.json`.
        metrics (`dict[str, float]`): The final ones, with the keys of `evaluate`.
        surveyed (`dict`): What [`~hf_wash.report.survey.survey`] returned; empty if there was none.
        layer_names (`list[str]`), layer_steps (`list[float]`), layer_spreads (`list[list[float]]`):
            How far members are from their mean, layer by layer, at the steps at which that was measured.
        layer_source (`str`): Where that comes from, in words.
    """

    name: str
    record: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    surveyed: dict[str, Any] = field(default_factory=dict)
    layer_names: list[str] = field(default_factory=list)
    layer_steps: list[float] = field(default_factory=list)
    layer_spreads: list[list[float]] = field(default_factory=list)
    layer_source: str = ""

    @property
    def size(self) -> int | None:
        """Number of members, if known."""
        counted = sum(re.fullmatch(r"eval_member_\d+_loss", key) is not None for key in self.metrics)
        return self.record.get("population", {}).get("size") or counted or None

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run, if known."""
        logged = [int(entry["step"]) for entry in self.log if is_number(entry.get("step"))]
        return self.record.get("training", {}).get("steps") or max(logged, default=None)

    @property
    def method(self) -> str:
        """What its exchange is called."""
        known = METHODS.get(self.record.get("mixing", {}).get("method") or "")
        return known.title if known is not None and known.title and known is not METHODS["independent"] else "this run"

    def members_over_the_run(self, metric: str, scale: float = 1.0) -> list[tuple[list, list]]:
        """Steps and values of each member's metric."""
        found: list[tuple[list, list]] = []
        while (series := points(self.log, f"eval_member_{len(found)}_{metric}", scale))[0]:
            found.append(series)
        return found

    def sent(self) -> dict[str, float]:
        """Bytes that members sent in the whole run, this one's first; empty where that is not known."""
        exchanged = self.record.get("exchange", {}).get("bytes_exchanged")
        model_bytes = self.record.get("model", {}).get("trainable_bytes")
        if exchanged is None or not model_bytes or not self.steps or (self.size or 1) < 2:
            return {}
        others = others_send(self.size or 1, self.steps, model_bytes)
        return {self.method: exchanged, **{name: amount for name, amount in others.items() if name != self.method}}


def points(log: Sequence[Mapping[str, Any]], key: str, scale: float = 1.0) -> tuple[list, list]:
    """Steps and values of a key of a log. The last entry of a step counts: a final evaluation may repeat an earlier one."""
    values = {entry["step"]: entry[key] for entry in log if is_number(entry.get(key)) and is_number(entry.get("step"))}
    return list(values), [value * scale for value in values.values()]


def gather(
    folder: str | Path,
    *,
    surveyed: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    log_history: list[dict[str, Any]] | None = None,
) -> Run:
    """
    What a run's folder holds.

    Args:
        folder (`str` or `Path`): The folder of the run.
        surveyed, record, log_history (*optional*): In place of those in the folder.

    Raises:
        ValueError: if there is nothing of a run in it, or a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    record = read_record(folder) if record is None else record
    log = read_log(folder) if log_history is None else log_history
    newest = _newest_checkpoint(folder)
    if not log and newest is not None:
        log = read_log(newest)
    if surveyed is None:
        surveyed = read_survey(folder)
    members = sorted((folder / LOCAL_MEMBERS).glob("member_*"), key=_natural)
    if not log and not record and not members:
        raise ValueError(
            f"{folder} holds nothing of a run: expected trainer_state.json, wash_run.json or {LOCAL_MEMBERS}/ in it."
        )
    metrics = read_json(folder / "all_results.json")
    if not any(key.startswith("eval_") for key in metrics):
        metrics = last_evaluation(log)
    run = Run(
        name=record.get("card", {}).get("model_name") or folder.resolve().name,
        record=record,
        log=log,
        metrics={key: value for key, value in metrics.items() if is_number(value)},
        surveyed=surveyed,
    )
    _fill_layers(run, members)
    return run


def read_survey(folder: Path) -> dict[str, Any]:
    """The measurements beside a run's report; empty if there are none. A `ValueError` if they cannot be read."""
    path = folder / PLACE / SURVEY
    found = read_json(path)
    if not found:
        return {}
    lines, layers = found.get("lines", []), found.get("layers", {})
    keys = ("fractions", "loss")
    whole = isinstance(lines, list) and isinstance(layers, dict)
    whole = whole and all(
        isinstance(line, dict) and all(isinstance(line.get(k), list) for k in keys) for line in lines
    )
    if not whole or not _is_plane(found.get("plane")) or found.get("format") != 1:
        raise ValueError(f"{path} holds no measurements that this version can read: remove it, and measure again.")
    return found


def _is_plane(plane: Any) -> bool:
    """Whether it is a plane as `survey` has it, or none."""
    if plane is None:
        return True
    if not isinstance(plane, dict) or not isinstance(plane.get("places"), dict):
        return False
    x, y, rows = (plane.get(key) for key in ("x", "y", "loss"))
    if not (_is_numbers(x) and _is_numbers(y) and isinstance(rows, list)):
        return False
    heights = [[0.0 if value is None else value for value in row] if isinstance(row, list) else row for row in rows]
    return (
        min(len(x), len(y)) > 1
        and [_is_numbers(row) and len(row) for row in heights] == [len(x)] * len(y)
        and len(plane["places"]) > 1
        and all(_is_numbers(place) and len(place) == 2 for place in plane["places"].values())
    )


def _is_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(map(is_number, values))


def _newest_checkpoint(folder: Path) -> Path | None:
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    return max(
        (path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]), default=None
    )


def _fill_layers(run: Run, members: Sequence[Path]) -> None:
    """The layers' distances: over the run where the diagnostics logged them, else at its end."""
    columns = {
        entry["step"]: {key.removeprefix(LAYER_KEY): entry[key] for key in entry if key.startswith(LAYER_KEY)}
        for entry in run.log
        if is_number(entry.get("step")) and any(key.startswith(LAYER_KEY) for key in entry)
    }
    at_the_end = run.surveyed.get("layers") or {}
    if columns:
        # A file of the Trainer's has its keys by the alphabet (transformers 5.24), and only the measurements keep the order.
        logged, ordered = next(iter(columns.values())), at_the_end.get("names") or []
        run.layer_names = list(ordered) if set(ordered) == set(logged) else sorted(logged, key=_natural)
        run.layer_steps = list(columns)
        run.layer_spreads = [[_or_nan(column.get(name)) for name in run.layer_names] for column in columns.values()]
        run.layer_source = "while training by PopulationDiagnostics, on a sample of each layer's weights"
    elif at_the_end.get("names"):
        run.layer_names = list(at_the_end["names"])
        run.layer_steps = [run.surveyed.get("step") or 0]
        run.layer_spreads = [[_or_nan(value) for value in at_the_end["spread"]]]
        run.layer_source = "at the end of the run, on a sample of each layer's weights (all of them, of small layers)"
    elif len(members) > 1:
        names, spreads = _of_saved_members(members)
        run.layer_names, run.layer_steps, run.layer_spreads = names, [run.steps or 0], [spreads]
        run.layer_source = f"at the end of the run, from the weights in {LOCAL_MEMBERS}/, exactly"


def _or_nan(value: Any) -> float:
    return value if is_number(value) else math.nan


def _of_saved_members(members: Sequence[Path]) -> tuple[list[str], list[float]]:
    """The layers of saved members, tensor by tensor, in the order of their names: files do not keep another."""
    from safetensors import safe_open

    from ..soup.weights import find_weight_files

    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        held = []
        for member in members:
            opened: dict[str, Any] = {}
            for file in find_weight_files(member):
                if is_file(file):
                    reader = stack.enter_context(safe_open(str(file), framework="pt"))
                    opened.update(dict.fromkeys(reader.keys(), reader))
            held.append(opened)
        for name in sorted(held[0], key=_natural):
            layer, _, last = name.rpartition(".")
            if last.startswith("running_") or not all(name in opened for opened in held):
                continue
            values = [opened[name].get_tensor(name) for opened in held]
            if not values[0].is_floating_point():
                continue
            mean = sum(value.double() for value in values) / len(values)
            squares[layer] = squares.get(layer, 0.0) + sum(float((v.double() - mean).square().sum()) for v in values)
            counts[layer] = counts.get(layer, 0) + len(values) * values[0].numel()
    names = [layer for layer in squares if counts[layer]]
    return names, [math.sqrt(squares[layer] / counts[layer]) for layer in names]


def _natural(name: Any) -> list[Any]:
    """So that layer 10 comes after layer 9; what heads a model comes last and what it begins with first."""
    text = str(name)
    kind = (
        2
        if re.match(r"(classifier|fc|head|lm_head|score)\b", text)
        else 0
        if "embed" in text.split("encoder")[0]
        else 1
    )
    return [kind, *((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text))]


def as_json(surveyed: Mapping[str, Any]) -> bytes:
    """Measurements as their file has them."""
    return (json.dumps(surveyed, indent=1, allow_nan=False) + "\n").encode()
