"""How a card words what it knows: numbers, names, and phrases made of options."""

from collections.abc import Mapping
from typing import Any

from .record import is_number


PERCENT = ("accuracy", "top5_accuracy", "f1", "precision", "recall")


def links(names: list[str]) -> str:
    """Repositories of the Hub, as links."""
    return ", ".join(f"[{name}](https://hf.co/{name})" for name in names)


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


def plain(value: Any) -> str | None:
    """A number as short as it can be."""
    return None if value is None else f"{value:g}"


def short_count(count: int) -> str:
    """A count with three digits and a unit."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def bytes_text(count: float) -> str:
    """Bytes with three digits and a unit."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g} bytes"


def when_shuffled(mixing: Mapping[str, Any]) -> str:
    """At which steps the members exchanged weights."""
    interval = mixing.get("shuffle_interval", 1)
    text = "after every optimizer step" if interval == 1 else f"after every {interval} optimizer steps"
    start, stop = mixing.get("shuffle_start", 0.0), mixing.get("shuffle_stop", 1.0)
    return text if (start, stop) == (0.0, 1.0) else f"{text}, from {start:.0%} to {stop:.0%} of the run"


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
        if isinstance(value, Mapping):
            parts.append(differences(value))
            continue
        if value in (None, False):
            continue
        words = name.replace("_", " ")
        parts.append(
            f"its own {words}" if value is True else f"{words} {value:g}" if is_number(value) else f"{words} {value}"
        )
    return ", ".join(part for part in parts if part)


def soup_method(soup: Mapping[str, Any]) -> str | None:
    """How the soup was made."""
    if not soup.get("method"):
        return None
    text = soup["method"]
    if soup.get("batch_norm"):
        text += {
            "recalibrate": ", BatchNorm statistics measured anew on training batches",
            "average": ", BatchNorm statistics averaged",
        }.get(soup["batch_norm"], "")
    return text
