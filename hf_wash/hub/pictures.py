"""
The pictures of a model card, from the log that a run keeps in `trainer_state.json`.

They need matplotlib, which is optional: without it there are none.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from .record import is_number


# Told apart by people who see colours differently: Okabe and Ito's palette.
_SOUP, _ENSEMBLE, _MEMBERS, _CONSENSUS = "#D55E00", "#0072B2", "#999999", "#009E73"


def draw_pictures(
    folder: str | Path, log_history: Sequence[Mapping[str, Any]], metrics: Mapping[str, float], place: str = "pictures"
) -> dict[str, str]:
    """
    Draws what a run's log has to show.

    Args:
        folder (`str` or `Path`):
            The folder of the card.
        log_history (`Sequence[Mapping]`):
            The entries of `trainer_state.json`.
        metrics (`Mapping[str, float]`):
            The final metrics, with the keys of `WashTrainer.evaluate`.
        place (`str`, *optional*, defaults to `"pictures"`):
            The subfolder to draw into.

    Returns:
        `dict[str, str]`: for each picture its caption and its path from the folder. Empty without matplotlib, and
        for a log with nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}

    metric = "accuracy" if "eval_accuracy" in metrics else "loss"
    pictures = {}
    for name, draw in ((metric, _evaluations), ("consensus", _consensus)):
        figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
        caption = draw(figure.subplots(), log_history, metrics, metric)
        if caption:
            drawn = io.BytesIO()
            # No date and no version, so that an unchanged run gives an unchanged file.
            figure.savefig(drawn, metadata={"Software": None})
            write_whole(Path(folder) / place / f"{name}.png", drawn.getvalue())
            pictures[caption] = f"{place}/{name}.png"
    return pictures


def _evaluations(axes: Any, log_history: Sequence[Mapping], metrics: Mapping[str, float], metric: str) -> str | None:
    scale, label = (100, "accuracy in %") if metric == "accuracy" else (1, metric)
    members = []
    while f"eval_member_{len(members)}_{metric}" in metrics:
        members.append(f"eval_member_{len(members)}_{metric}")
    steps, _ = _points(log_history, f"eval_{metric}")
    if len(steps) >= 2:
        look: dict[str, Any] = {"color": _MEMBERS, "linewidth": 1}
        for number, key in enumerate(members):
            axes.plot(*_points(log_history, key, scale), **look, label=None if number else "members")
        ensemble = _points(log_history, f"eval_ensemble_{metric}", scale)
        if ensemble[0]:
            axes.plot(*ensemble, color=_ENSEMBLE, linestyle="--", label="ensemble")
        axes.plot(*_points(log_history, f"eval_{metric}", scale), color=_SOUP, linewidth=2, label="soup")
        _label(axes, "optimizer step", label)
        axes.legend(frameon=False)
        return f"{metric.capitalize()} on the evaluation data while training"
    if not members or f"eval_{metric}" not in metrics:
        return None
    # One evaluation: where the soup and the ensemble stand among the members.
    rows = [("soup", [f"eval_{metric}"], _SOUP, "D"), ("ensemble", [f"eval_ensemble_{metric}"], _ENSEMBLE, "s")]
    rows = [row for row in rows if row[1][0] in metrics] + [("members", members, _MEMBERS, "o")]
    for height, (_, keys, color, marker) in enumerate(rows):
        values = [metrics[key] * scale for key in keys]
        axes.plot(values, [height] * len(values), marker, color=color, alpha=0.8, markersize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.margins(x=0.1)
    _label(axes, label)
    return f"{metric.capitalize()} of the soup, the ensemble and each member"


def _consensus(axes: Any, log_history: Sequence[Mapping], *_: Any) -> str | None:
    steps, distances = _points(log_history, "consensus_distance")
    if len(steps) < 2:
        return None
    axes.plot(steps, distances, color=_CONSENSUS, linewidth=2)
    axes.set_ylim(bottom=0)
    _label(axes, "optimizer step", "consensus distance")
    return "Consensus distance: how far the members are from their mean"


def _points(log_history: Sequence[Mapping[str, Any]], key: str, scale: float = 1) -> tuple[list, list]:
    # The last entry of a step counts: the final evaluation may repeat one made while training.
    values = {
        entry["step"]: entry[key]
        for entry in log_history
        if is_number(entry.get(key)) and is_number(entry.get("step"))
    }
    return list(values), [value * scale for value in values.values()]


def _label(axes: Any, x: str, y: str | None = None) -> None:
    axes.set_xlabel(x)
    if y is not None:
        axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if y is None else "both", alpha=0.25, linewidth=0.6)
