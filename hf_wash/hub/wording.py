"""How a card words what it knows: numbers, names, and phrases made of options."""

import math
from collections.abc import Mapping
from typing import Any

from .record import REPO_ID, is_number


PERCENT = ("accuracy", "top5_accuracy", "f1", "precision", "recall")


def link(name: str) -> str:
    """A repository of the Hub, as a link; any other name as it is."""
    return f"[{name}](https://hf.co/{name})" if REPO_ID.fullmatch(name) else cell(name)


def cell(text: str) -> str:
    """A text that fits into a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def title(name: str) -> str:
    """The name of a metric or a task, for readers."""
    known = {"ece": "ECE", "f1": "F1", "top5_accuracy": "Top-5 accuracy"}
    return known.get(name, name.replace("_", " ").capitalize())


def number(name: str, value: float | None) -> str:
    """The value of a metric: those between 0 and 1 of which one speaks in percent, in percent."""
    if value is None:
        return ""
    return f"{value:.2%}" if name in PERCENT and -1 <= value <= 1 else f"{value:.4f}"


def samples(count: float | None) -> str | None:
    """On how many samples something was measured, if that is a number of samples."""
    return f"{int(count):,} evaluation samples" if count and math.isfinite(count) else None


def plain(value: Any) -> str | None:
    """A number as short as it can be."""
    return None if value is None else f"{value:g}"


def short(count: float, units: tuple[str, ...] = ("", " k", " M", " B")) -> str:
    """A count with three digits and a unit; of bytes with the units of [`bytes_text`]."""
    power = max((power for power in range(len(units)) if count >= 1000**power), default=0)
    return (f"{count / 1000**power:.3g}" if power else f"{count:g}") + units[power]


def bytes_text(count: float) -> str:
    """Bytes with three digits and a unit."""
    return short(count, (" bytes", " kB", " MB", " GB", " TB"))


def when_shuffled(mixing: Mapping[str, Any]) -> str:
    """At which steps the members exchanged weights."""
    given = {"shuffle_interval": 1, "shuffle_start": 0.0, "shuffle_stop": 1.0}
    given |= {name: mixing[name] for name in given if mixing.get(name) is not None}
    interval, start, stop = given.values()
    text = "after every optimizer step" if interval == 1 else f"after every {interval} optimizer steps"
    return text if (start, stop) == (0.0, 1.0) else f"{text}, from {start:.0%} to {stop:.0%} of the run"


def when_averaged(mixing: Mapping[str, Any]) -> str | None:
    """At which steps whole models were averaged; `None` where that is not recorded."""
    interval, first, last, epoch = (mixing.get(f"average_{name}") for name in ("interval", "first", "last", "epoch"))
    if interval is None:
        return None
    text = "after every optimizer step" if interval == 1 else f"after every {interval:,} optimizer steps"
    if epoch is not None:
        return f"{text}, counted anew in each epoch of {epoch:,} steps, from its first step on"
    if first is not None and first != interval:
        text += f", from step {first:,} on"
    return text if last is None else f"{text}, up to step {last:,}"


def learning_rate(training: Mapping[str, Any]) -> str | None:
    """The learning rate and its course."""
    if training.get("learning_rate") is None:
        return None
    parts = [f"{training['learning_rate']:g}"]
    if training.get("lr_scheduler"):
        parts.append(f"{training['lr_scheduler']} schedule")
    warmup = training.get("warmup_steps")
    if warmup:
        parts.append(f"warm-up over {warmup:.0%} of the steps" if warmup < 1 else f"warm-up over {warmup:g} steps")
    return ", ".join(parts)


def differences(override: Mapping[str, Any]) -> str:
    """What a member had of its own."""
    parts = []
    for name, value in override.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping):
            parts.append(differences(value))
        elif value is True:
            parts.append(f"its own {words}")
        elif value is not None and value is not False:
            parts.append(f"{words} {value:g}" if is_number(value) else f"{words} {value}")
    return ", ".join(part for part in parts if part)


def soup_method(soup: Mapping[str, Any]) -> str | None:
    """How the soup was made."""
    statistics = {"recalibrate": "measured anew on training batches", "average": "averaged"}.get(
        str(soup.get("batch_norm"))
    )
    if soup.get("method") and statistics:
        return f"{soup['method']}, BatchNorm statistics {statistics}"
    return soup.get("method")
