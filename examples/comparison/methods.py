"""
The methods and their settings: as published, as tuned for the length of the run, and for a budget of bytes.

A setting is a dictionary of `WashConfig` options. The sizes of models come from exact shapes.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_wash.methods import METHODS as MIXINGS
from hf_wash.methods import times_of
from hf_wash.mixing.schedule import expected_values_moved

from .setting import Setting


BUDGETS = (0.01, 0.04, 0.1)


@dataclass(frozen=True)
class Method:
    """
    A way of training a population, or one model.

    Args:
        title (`str`): As people call it.
        options (`dict`): What makes it this method.
        published (`dict`): What its authors set.
        kinds (`tuple[str, ...]`): Which settings of it are worth a row.
    """

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("published", "tuned")


WITH_BUDGETS = ("published", "tuned", "budgets")

# `plain` is one model, trained for N times the steps and for as many as a member; EMAs of both are taken along.
METHODS = {
    "wash": Method("WASH", {"mixing": "wash"}, kinds=("published", "default", "tuned", "budgets")),
    "wash_opt": Method("WASH+Opt", {"mixing": "wash", "shuffle_optimizer_state": True}),
    "papa": Method("PAPA", {"mixing": "papa"}, {"average_interval": 10, "average_rate": 0.99}, WITH_BUDGETS),
    "papa_all": Method("PAPA-all", {"mixing": "papa_all"}),
    "papa_2": Method("PAPA-2", {"mixing": "papa_2"}),
    "dart": Method("DART", {"mixing": "dart"}),
    "sparta": Method("SPARTA", {"mixing": "sparta"}, {"shuffle_probability": 0.005}, WITH_BUDGETS),
    "local_sgd": Method("local SGD", {"mixing": "local_sgd"}, kinds=WITH_BUDGETS),
    "diloco": Method("DiLoCo", {"mixing": "diloco"}, {"average_interval": 500, "average_rate": 0.7}, WITH_BUDGETS),
    "independent": Method("independent", {"mixing": "independent"}, kinds=("same start", "different starts")),
    "plain": Method("one model", {"mixing": "independent", "population_size": 1}, kinds=("N times", "once")),
}

# What is tuned at a given number of bytes, where bytes leave something free; the first is taken where nothing was tuned.
# From a study on other glyphs, of before this comparison (docs/choosing_p.md).
FREE = {
    "wash": [{"shuffle_stop": 0.75}, {"shuffle_stop": 1.0}, {"shuffle_stop": 0.6}],
    "papa": [{"average_rate": 0.5}, {"average_rate": 0.9}, {"average_rate": 0.0}],
    "diloco": [{"average_rate": 0.7}, {"average_rate": 0.4}, {"average_rate": 1.0}],
}


def free_trials(method: str, budget: float, model: nn.Module, size: int) -> list[dict[str, Any]]:
    """
    What is tried for a method when it is tuned at a number of bytes: three settings of what these leave free.

    Args:
        method (`str`): A key of `FREE`.
        budget (`float`): Copies of the model that a member sends in a step, on average.
        model (`nn.Module`): Any member; shapes count.
        size (`int`): Members, N.

    Returns:
        `list[dict]`: The settings; none if the method cannot send as much at all.
    """
    if method != "wash":
        return FREE[method]
    least = budget / most_copies(model, size)
    if least >= 1:
        return []
    # A shuffle that ends early sends less, whatever its p.
    middle, latest, earliest = (each["shuffle_stop"] for each in FREE["wash"])
    earliest = max(earliest, math.ceil(1000 * least) / 1000)
    middle = middle if earliest < middle else round((earliest + latest) / 2, 4)
    return [{"shuffle_stop": stop} for stop in (middle, latest, earliest)]


def most_copies(model: nn.Module, size: int) -> float:
    """Copies of a model that a member of WASH sends in a step at p = 1."""
    return expected_values_moved(model, size, 1.0) / sum(p.numel() for p in model.parameters() if p.requires_grad)


def trials(method: str, steps: int) -> list[dict[str, Any]]:
    """
    What is tried for a method when it is tuned: six settings each, spread over what is sensible for the run's length.

    Args:
        method (`str`): A key of `METHODS`.
        steps (`int`): Of one member.
    """

    def shuffles(number: float, stop: float) -> dict[str, Any]:
        return {"shuffle_probability": round(min(1.0, number / steps), 6), "shuffle_stop": stop}

    def interval(part: float, **more: Any) -> dict[str, Any]:
        return {"average_interval": max(1, round(part * steps)), **more}

    tried = {
        "wash": [shuffles(n, stop) for n, stop in
                 ((35, 0.75), (140, 0.75), (350, 0.75), (700, 0.75), (140, 1.0), (350, 1.0))],
        "papa": [{"average_interval": every, "average_rate": rate}
                 for every, rate in ((10, 0.99), (10, 0.9), (10, 0.5), (10, 0.0), (25, 0.5), (25, 0.0))],
        "papa_all": [interval(part) for part in (1 / 100, 1 / 50, 1 / 25, 1 / 10, 1 / 5, 1 / 3)],
        "sparta": [{"shuffle_probability": p} for p in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)],
        "diloco": [interval(part, average_rate=rate)
                   for part, rate in ((1 / 50, 0.7), (1 / 25, 0.7), (1 / 10, 0.7), (1 / 50, 0.4), (1 / 25, 0.4),
                                      (1 / 25, 1.0))],
    }  # fmt: skip
    tried["wash_opt"] = tried["wash"]
    tried["papa_2"] = tried["dart"] = tried["local_sgd"] = tried["papa_all"]
    if method not in tried:
        raise ValueError(f"There is nothing to tune in {method!r}; there is in {', '.join(sorted(tried))}.")
    return tried[method]


def for_budget(
    method: str,
    budget: float,
    model: nn.Module,
    size: int,
    steps: int,
    steps_per_epoch: int,
    free: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    The setting of a method that sends so much.

    Args:
        method (`str`): `wash`, `papa`, `sparta`, `local_sgd` or `diloco`.
        budget (`float`): Copies of the model that a member sends in a step, on average.
        model (`nn.Module`): Any member; shapes count.
        size (`int`): Members, N.
        steps, steps_per_epoch (`int`): Of one member.
        free (`dict`, *optional*): What bytes leave free, as tuned.

    Raises:
        ValueError: if the method cannot send as much, and says what it can.
    """
    free = free if free is not None else (FREE[method][0] if method in FREE else {})
    if method == "wash":
        most = most_copies(model, size) * free["shuffle_stop"]
        if budget > most:
            raise ValueError(f"WASH sends at most {most:.3g} of such a model in a step, so not {budget:g}.")
        return {**free, "shuffle_probability": budget / most}
    if method == "sparta":
        return {"shuffle_probability": budget}
    if method == "papa":
        # It begins to count anew in each epoch, so that it sends more than one in `average_interval`, and at least once
        # an epoch: the nearest.
        interval = min(
            range(1, min(steps_per_epoch, steps) + 1),
            key=lambda every: abs(times_of(method, every, steps, steps_per_epoch).count(steps) / steps - budget),
        )
        return {**free, "average_interval": interval}
    return {**free, "average_interval": round(1 / budget)}


def label(method: str, kind: str) -> str:
    """The name of a row, in files and on the command line: `wash-tuned`, `papa@0.04`."""
    return f"{method}@{kind}" if kind[0].isdigit() else f"{method}-{kind.replace(' ', '-')}"


def place_of(method: str, row: str) -> tuple[int, int, float]:
    """Where a row stands among all rows of a comparison, as a key to sort by."""
    kinds = METHODS[method].kinds
    if "@" in row:
        return list(METHODS).index(method), len(kinds), float(row.partition("@")[2])
    kind = next((number for number, kind in enumerate(kinds) if row == label(method, kind)), len(kinds))
    return list(METHODS).index(method), kind, 0.0


def rows(
    names: list[str],
    kinds: list[str],
    budgets: list[float],
    setting: Setting,
    steps: int,
    steps_per_epoch: int,
    model: nn.Module,
    tuned: dict[str, Any] | None,
) -> tuple[list[tuple[str, str, dict[str, Any], int]], list[str]]:
    """
    All rows of a comparison.

    Args:
        names (`list[str]`): Keys of `METHODS`.
        kinds (`list[str]`): Of `published`, `tuned`, `budgets`.
        budgets (`list[float]`): Model copies for each member and step.
        setting ([`Setting`]), steps, steps_per_epoch (`int`), model (`nn.Module`): What is trained, and how long.
        tuned (`dict`, *optional*): What the tuning script chose, by row.

    Returns:
        `tuple[list, list[str]]`: (label, method, options, steps) of each row, and why some are left out.
    """
    found: list[tuple[str, str, dict[str, Any], int]] = []
    left_out = []
    tuned = tuned or {}

    def add(name: str, kind: str, options: dict[str, Any], length: int = steps) -> None:
        options = {**METHODS[name].options, **options}
        try:
            if "average_interval" in MIXINGS[options["mixing"]].options:
                times_of(options["mixing"], options.get("average_interval"), length, steps_per_epoch)
        except ValueError as error:
            left_out.append(f"{label(name, kind)}: {error}")
        else:
            found.append((label(name, kind), name, options, length))

    for name in names:
        for kind in METHODS[name].kinds:
            if name == "independent":
                add(name, kind, {"same_init": kind == "same start"})
            elif name == "plain":
                add(name, kind, {}, steps * (setting.population_size if kind == "N times" else 1))
            elif kind == "budgets" and kind in kinds:
                for budget in budgets:
                    free = tuned.get(label(name, f"{budget:g}"))
                    size = setting.population_size
                    try:
                        add(name, f"{budget:g}", for_budget(name, budget, model, size, steps, steps_per_epoch, free))
                    except ValueError as error:
                        left_out.append(f"{label(name, f'{budget:g}')}: {error}")
            elif kind == "tuned" and kind in kinds:
                if label(name, kind) in tuned:
                    add(name, kind, tuned[label(name, kind)])
                else:
                    left_out.append(
                        f"{label(name, kind)}: it has not been tuned for this preset; `tune_methods.py` does."
                    )
            elif kind in ("published", "default") and kind in kinds:
                published = METHODS[name].published
                if METHODS[name].options.get("mixing") == "wash" and kind == "published":
                    published = {"shuffle_probability": setting.wash_probability}
                # What the documentation advises beside the defaults.
                add(name, kind, published if kind == "published" else {"shuffle_stop": 0.75})
    return found, left_out


def describe(options: dict[str, Any]) -> str:
    """A setting in a few words, for tables: `p = 0.05, until 75 %`."""
    said = []
    for name, value in options.items():
        if name == "shuffle_probability":
            said.append(f"p = {value:.3g}")
        elif name == "shuffle_stop" and value < 1:
            said.append(f"until {value:.0%}")
        elif name == "shuffle_start" and value > 0:
            said.append(f"from {value:.0%}")
        elif name == "average_interval":
            said.append(f"every {value}")
        elif name == "average_rate":
            said.append(f"α = {value:g}" if options["mixing"] == "papa" else f"outer lr {value:g}")
        elif name == "same_init":
            said.append("same start" if value else "different starts")
        elif name == "population_size" and options.get("mixing") != "independent":
            said.append(f"N = {value}")
        elif name == "shuffle_schedule":
            said.append(value)
        elif name == "soup_batch_norm":
            said.append(f"BatchNorm {value}d")
    return ", ".join(said)
