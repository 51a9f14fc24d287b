"""The studies: what is asked, which runs answer it, and what their numbers say."""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .beyond import ALL, VARIANTS, advised
from .methods import BUDGETS, METHODS, describe
from .methods import rows as comparison_rows
from .setting import Setting
from .tables import Row, difference, markdown, short, spread, told_apart


AT_BUDGETS = [name for name, method in METHODS.items() if "budgets" in method.kinds]
Runs = Callable[[int], list[tuple[str, dict[str, Any], int]]]
Groups = Callable[[list[Row]], dict[str, list[Row]]]


@dataclass(frozen=True)
class Study:
    """
    One question.

    Args:
        question (`str`): In a sentence.
        rows (`Callable`, *optional*):
            From the steps of a run to (method, options, steps) of each run; `None`: the comparison's at equal bytes.
        groups (`Callable`, *optional*):
            From its rows to those that are to be compared with each other, by what they have in common; `None`: all.
    """

    question: str
    rows: Runs | None
    groups: Groups | None = None


def _wash(*options: dict[str, Any]) -> Runs:
    return lambda steps: [("wash", {**advised(steps), **each}, steps) for each in options]


def _lengths(steps: int) -> list[tuple[str, dict[str, Any], int]]:
    found = []
    for part in (0.5, 1, 2):
        length = round(part * steps)
        for shuffles in (35, 140, 350):
            options = {"shuffle_probability": round(min(1.0, shuffles / length), 6), "shuffle_stop": 0.75}
            found.append(("wash", options, length))
    return found


def _by(name_of: Callable[[Row], str]) -> Groups:
    def groups(rows: list[Row]) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in rows:
            found.setdefault(name_of(row), []).append(row)
        return found

    return groups


_by_method = _by(lambda row: "No exchange" if row.method == "independent" else ALL[row.method].title)
_by_length = _by(lambda row: f"{row.cells[0]['steps']} steps")


def _by_budget(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {f"{budget:g} copies a step": [] for budget in BUDGETS}
    for row in rows:
        copies = statistics.fmean(row.values("copies_per_step"))
        budget = min(BUDGETS, key=lambda budget: abs(budget - copies))
        # PAPA sends at least once an epoch.
        far = abs(copies - budget) > 0.1 * budget
        title = row.title + (f" (which sends {short(copies)})" if far else "")
        found[f"{budget:g} copies a step"].append(dataclasses.replace(row, title=title))
    return {name: own for name, own in found.items() if own}


def _sizes(steps: int) -> list[tuple[str, dict[str, Any], int]]:
    sizes = (2, 3, 5, 10)
    found = [("wash", {**advised(steps), "population_size": size}, steps) for size in sizes]
    return found + [("independent", {"population_size": size}, steps) for size in sizes]


STUDIES = {
    "p": Study(
        "How often should weights be shuffled?",
        lambda steps: [
            ("wash", {**advised(steps), "shuffle_probability": p}, steps)
            for p in (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
        ],
    ),
    "p_steps": Study("Is it p × steps that decides, whatever the length of the run?", _lengths, _by_length),
    "schedule": Study(
        "Should shallow layers be shuffled more, or deep ones?",
        _wash(*({"shuffle_schedule": name} for name in ("decreasing", "constant", "increasing"))),
    ),
    "stop": Study(
        "When should shuffling stop?", _wash(*({"shuffle_stop": stop} for stop in (0.25, 0.5, 0.75, 0.9, 1.0)))
    ),
    "start": Study(
        "When should shuffling start?", _wash(*({"shuffle_start": start} for start in (0.0, 0.1, 0.25, 0.5)))
    ),
    "init": Study(
        "Should all members start from the same weights?",
        lambda steps: [
            (method, {**(advised(steps) if method == "wash" else {}), "same_init": same}, steps)
            for method in ("wash", "independent")
            for same in (True, False)
        ],
        _by_method,
    ),
    "optimizer_state": Study(
        "Should the optimizer's state be shuffled with the weights?",
        _wash({"shuffle_optimizer_state": False}, {"shuffle_optimizer_state": True}),
    ),
    "population_size": Study("How many members?", _sizes, _by_method),
    "batch_norm": Study(
        "Should the BatchNorm of the averaged model be estimated anew, or averaged?",
        lambda steps: [
            (method, {**(advised(steps) if method == "wash" else {}), "soup_batch_norm": how}, steps)
            for method in ("wash", "independent")
            for how in ("recalibrate", "average")
        ],
        _by_method,
    ),
    "beyond": Study(
        "Does WASH gain by what its paper does not have: a p that falls, averagings at the end, whole rows, or a moving "
        "average of the averaged model?",
        lambda steps: (
            [("wash", advised(steps), steps)]
            + [(name, advised(steps) if name == "wash_ema" else {}, steps) for name in VARIANTS]
        ),
    ),
    "equal_bytes": Study("At equal bytes, how does p compare with the others' intervals?", None, _by_budget),
}


def cells_of_study(
    name: str,
    setting: Setting,
    steps: int,
    steps_per_epoch: int,
    model: nn.Module,
    tuned: dict[str, Any] | None = None,
) -> tuple[list[tuple[str, str, dict[str, Any], int]], list[str]]:
    """
    The runs of a study.

    Args:
        name (`str`): A key of `STUDIES`.
        setting ([`Setting`]), steps, steps_per_epoch (`int`), model (`nn.Module`), tuned (`dict`, *optional*):
            As in a comparison.

    Returns:
        `tuple[list, list[str]]`: (label, method, options, steps) of each, once; and why some are left out. Runs that are the
        same have the same label in all studies.
    """
    make = STUDIES[name].rows
    left_out: list[str] = []
    if make is not None:
        wanted = make(steps)
    else:
        at_budgets, left_out = comparison_rows(
            AT_BUDGETS, ["budgets"], list(BUDGETS), setting, steps, steps_per_epoch, model, tuned
        )
        wanted = [row[1:] for row in at_budgets]
    found: dict[str, tuple[str, str, dict[str, Any], int]] = {}
    for method, options, length in wanted:
        # Defaults are left out, so that the same run has the same name wherever it is asked for.
        same = {"shuffle_schedule": "decreasing", "shuffle_start": 0.0, "shuffle_stop": 1.0, "same_init": True,
                "shuffle_optimizer_state": False, "soup_batch_norm": "recalibrate",
                "population_size": setting.population_size}  # fmt: skip
        same |= ALL[method].options
        options = {option: value for option, value in options.items() if same.get(option) != value}
        words = [method, *(f"{option}={value}" for option, value in sorted(options.items())), f"steps={length}"]
        name = "-".join(words).replace("shuffle_", "").replace("average_", "")
        # PAPA at two budgets of which it can meet neither is one run.
        found[name] = name, method, {**ALL[method].options, **options}, length
    return list(found.values()), left_out


def titled(cell: dict[str, Any], population_size: int, steps: int) -> str:
    """A run in words, with what the study varies even where it is the default."""
    options = {"shuffle_stop": 1.0, **cell["options"]} if cell["options"]["mixing"] == "wash" else cell["options"]
    said = describe(options)
    size = options.get("population_size", population_size)
    words = [ALL[cell["method"]].title + ("+Opt" if options.get("shuffle_optimizer_state") else "")]
    words += [said] if said else []
    words += [f"N = {size}"] if "N = " not in said else []
    words += [f"{cell['steps']} steps"] if cell["steps"] != steps else []
    return ", ".join(words)


def conclusion(rows: list[Row], groups: Groups | None = None) -> str:
    """
    What a reader should take from a study, computed: the best averaged model, and what cannot be told from it.

    Args:
        rows (`list[Row]`): The study's.
        groups (`Callable`, *optional*): Of the [`Study`].
    """
    if groups is not None:
        return "\n".join(f"- {name}. {conclusion(own)}" for name, own in groups(rows).items())
    if any(len(row.cells) < 2 for row in rows):
        return "One seed: nothing can be told."
    best = max(rows, key=lambda row: statistics.fmean(row.values("soup")))
    level, behind = [], []
    for row in rows:
        found = difference(best, row) if row is not best else None
        if found is not None:
            (behind if told_apart(found) else level).append(row.title)
    text = f"The best averaged model: {best.title}."
    if level:
        text += f" Not told apart from it (within two standard errors): {'; '.join(level)}."
    if behind:
        text += f" Behind it: {'; '.join(behind)}."
    return text


def tables_of(kept: dict[str, Any]) -> str:
    """All studies of a record, as Markdown."""
    size, steps = kept["setting"]["population_size"], kept["steps"]
    found: dict[str, Row] = {}
    for cell in kept["cells"]:
        title = titled(cell, size, steps)
        found.setdefault(cell["label"], Row(title, cell["label"], cell["method"], [])).cells.append(cell)
    parts = []
    header = ["", "seeds", "members, %", "ensemble, %", "averaged model, %", "greedy soup, %", "copies sent a step",
              "consensus distance"]  # fmt: skip
    for name, labels in kept["studies"].items():
        rows = [found[label] for label in labels if label in found]
        if not rows:
            continue
        lines = [
            [
                row.title,
                str(len(row.cells)),
                *(spread(row.values(what)) for what in ("members", "ensemble", "soup", "greedy")),
                short(statistics.fmean(row.values("copies_per_step"))),
                short(statistics.fmean(row.values("consensus_distance"))),
            ]
            for row in rows
        ]
        parts.append(
            f"**{STUDIES[name].question}**\n\n{markdown(header, lines)}\n\n{conclusion(rows, STUDIES[name].groups)}"
        )
    return "\n\n".join(parts)
