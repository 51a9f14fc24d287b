"""Tables of a comparison, and what its numbers can tell apart: from the cells' results, with NumPy alone."""

import csv
import io
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .measure import right
from .methods import METHODS, describe


@dataclass
class Row:
    """
    The cells of one method and setting, over all seeds.

    Args:
        title (`str`): As a reader sees it.
        label (`str`), method (`str`): As in the cells.
        cells (`list[dict]`): Their results.
        ema (`bool`): Whether this row is the moving average of that run.
    """

    title: str
    label: str
    method: str
    cells: list[dict[str, Any]]
    ema: bool = False

    def values(self, what: str) -> list[float]:
        """
        One value for each seed; none where the row has no such thing.

        Args:
            what (`str`): `members`, `ensemble`, `soup` or `greedy`, accuracies in %, or a key of a cell's result.
        """
        found = []
        for cell in self.cells:
            accuracies = cell["accuracy"]
            if what not in ("members", "ensemble", "soup", "greedy"):
                value = cell.get(what)
            elif self.ema:
                value = accuracies["ema"] if what == "soup" else None
            elif self.method == "plain" and what == "members":
                value = None
            elif what == "members":
                value = statistics.fmean(accuracies["members"])
            else:
                value = accuracies.get(what)
            if value is not None:
                found.append(100 * value if what in ("members", "ensemble", "soup", "greedy") else value)
        return found

    def hits(self) -> dict[int, np.ndarray]:
        """For each seed, which test images the averaged model (of a plain run: the model) gets right."""
        key = "ema_hits" if self.ema else "hits"
        return {cell["seed"]: right(cell[key], cell["test_size"]) for cell in self.cells}


def title_of(cell: dict[str, Any], population_size: int) -> str:
    """What the row of a cell is called."""
    if cell["method"] == "plain":
        return "one model" + (f", {population_size} × the steps" if cell["label"] == "plain-N-times" else "")
    method, said = METHODS[cell["method"]].title, describe(cell["options"])
    _, _, kind = cell["label"].partition("-")
    kind = f"at {cell['label'].partition('@')[2]} copies" if "@" in cell["label"] else kind
    if cell["method"] == "independent":
        return f"{method}, {said}"
    return f"{method}, {kind}" + (f" ({said})" if said else "")


def rows_of(cells: list[dict[str, Any]], population_size: int) -> list[Row]:
    """The rows of a comparison, in the order in which its cells were to be run."""
    rows: dict[str, Row] = {}
    for cell in cells:
        title = cell.get("title") or title_of(cell, population_size)
        rows.setdefault(cell["label"], Row(title, cell["label"], cell["method"], [])).cells.append(cell)
    found = []
    for row in rows.values():
        found.append(row)
        if row.method == "plain":
            found.append(Row(f"{row.title}, its EMA", f"{row.label}-ema", row.method, row.cells, ema=True))
    return found


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds; of one seed, the value."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def short(value: float) -> str:
    """Three digits, for what spans orders of magnitude."""
    return f"{value:.3g}" if value else "0"


COLUMNS = (
    "method", "seeds", "members, %", "ensemble, %", "averaged model, %", "greedy soup, %", "copies sent a step",
    "kB sent a step", "consensus distance", "training data, %", "ms a step",
)  # fmt: skip


def cells_of(row: Row) -> list[str]:
    """A row as texts, in the order of `COLUMNS`."""

    def mean(what: str, scale: float = 1.0) -> str:
        values = row.values(what)
        return short(scale * statistics.fmean(values)) if values else ""

    training = row.values("train_accuracy")
    return [
        row.title,
        str(len(row.cells)),
        *(spread(row.values(what)) for what in ("members", "ensemble", "soup", "greedy")),
        mean("copies_per_step"),
        mean("bytes_per_step", 1e-3),
        mean("consensus_distance"),
        f"{100 * statistics.fmean(training):.1f}" if training and not row.ema else "",
        # One run may have shared its core with something else.
        f"{1000 * statistics.median(row.values('seconds_per_step')):.0f}",
    ]


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    every = [header, ["---"] * len(header), *map(list, lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def comparison_table(rows: list[Row]) -> str:
    """The table of a comparison, as Markdown."""
    return markdown(COLUMNS, map(cells_of, rows))


def comparison_csv(rows: list[Row]) -> str:
    """The same with a line for each seed, and numbers as they are."""
    names = ("members", "ensemble", "soup", "greedy", "copies_per_step", "bytes_per_step", "consensus_distance",
             "train_accuracy", "seconds_per_step", "mixing_seconds_per_step")  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "title", "seed", *names])
    for row in rows:
        for cell in row.cells:
            alone = Row(row.title, row.label, row.method, [cell], row.ema)
            writer.writerow([row.label, row.title, cell["seed"], *(next(iter(alone.values(n)), "") for n in names)])
    return text.getvalue()


def difference(one: Row, other: Row) -> tuple[float, float] | None:
    """
    How much better the averaged model of one row is than another's, in points, and the standard error of that.

    Of the seeds and images that both have: the error is that of the mean over seeds (their spread) and that of the
    mean over test images (each image's difference), both paired.

    Returns:
        `tuple[float, float]`, *optional*: `None` with fewer than two seeds in common.
    """
    own, others = one.hits(), other.hits()
    seeds = sorted(set(own) & set(others))
    if len(seeds) < 2:
        return None
    apart = 100 * np.stack([own[seed] - others[seed] for seed in seeds])
    of_seeds, of_images = apart.mean(axis=1), apart.mean(axis=0)
    error = math.sqrt(of_seeds.var(ddof=1) / len(seeds) + of_images.var(ddof=1) / apart.shape[1])
    return float(apart.mean()), error


def told_apart(found: tuple[float, float]) -> bool:
    """Whether a [`difference`] is one: more than two standard errors. Two rows that are one run are not told apart."""
    return abs(found[0]) > 2 * found[1]


def verdict(one: Row, other: Row) -> str:
    """A sentence on the averaged models of two rows."""
    found = difference(one, other)
    if found is None:
        return f"{one.title} and {other.title}: fewer than two seeds in common."
    points, error = found
    said = f"{points:+.2f} ± {error:.2f} points"
    if not told_apart(found):
        return f"{one.title} minus {other.title}: {said}; too small a setting to tell them apart."
    return f"{one.title} is {'ahead of' if points > 0 else 'behind'} {other.title}: {said}."
