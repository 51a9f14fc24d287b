"""
The pictures of a model card, from the log that a run keeps in `trainer_state.json`.

They need matplotlib, which is optional: without it there are none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    caption = _evaluations(figure.subplots(), log_history, metrics, metric)
    if caption:
        pictures[caption] = _save(figure, folder, place, metric)
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    caption = _consensus(figure.subplots(), log_history)
    if caption:
        pictures[caption] = _save(figure, folder, place, "consensus")
    return pictures


def _save(figure: Any, folder: str | Path, place: str, name: str) -> str:
    path = Path(folder) / place / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version, so that an unchanged run gives an unchanged file.
    figure.savefig(path, metadata={"Software": None})
    return f"{place}/{name}.png"


def _points(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[list, list]:
    # The last entry of a step counts: the final evaluation may repeat one made while training.
    values = {entry["step"]: entry[key] for entry in log_history if _is_number(entry.get(key)) and "step" in entry}
    return list(values), list(values.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _members(keys: Any, metric: str) -> list[str]:
    names = []
    while f"eval_member_{len(names)}_{metric}" in keys:
        names.append(f"eval_member_{len(names)}_{metric}")
    return names


def _evaluations(axes: Any, log_history: Sequence[Mapping], metrics: Mapping[str, float], metric: str) -> str | None:
    percent = metric == "accuracy"
    scale = 100 if percent else 1
    label = "accuracy in %" if percent else metric
    steps, soup = _points(log_history, f"eval_{metric}")
    members = _members(metrics, metric)
    if len(steps) >= 2:
        for number, key in enumerate(members):
            x, y = _points(log_history, key)
            name = "members" if number == 0 else None
            axes.plot(x, [v * scale for v in y], color=_MEMBERS, linewidth=1, label=name)
        x, y = _points(log_history, f"eval_ensemble_{metric}")
        if x:
            axes.plot(x, [v * scale for v in y], color=_ENSEMBLE, linestyle="--", label="ensemble")
        axes.plot(steps, [v * scale for v in soup], color=_SOUP, linewidth=2, label="soup")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        _clean(axes, "both")
        axes.legend(frameon=False)
        return f"{label.split()[0].capitalize()} on the evaluation data while training"
    if not members or f"eval_{metric}" not in metrics:
        return None
    # One evaluation: where the soup and the ensemble stand among the members.
    rows = [("soup", [metrics[f"eval_{metric}"]], _SOUP, "D")]
    if f"eval_ensemble_{metric}" in metrics:
        rows.append(("ensemble", [metrics[f"eval_ensemble_{metric}"]], _ENSEMBLE, "s"))
    rows.append(("members", [metrics[key] for key in members], _MEMBERS, "o"))
    for height, (_, values, color, marker) in enumerate(rows):
        axes.plot([v * scale for v in values], [height] * len(values), marker, color=color, alpha=0.8, markersize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.margins(x=0.1)
    axes.set_xlabel(label)
    _clean(axes, "x")
    return f"{label.split()[0].capitalize()} of the soup, the ensemble and each member"


def _consensus(axes: Any, log_history: Sequence[Mapping]) -> str | None:
    steps, distances = _points(log_history, "consensus_distance")
    if len(steps) < 2:
        return None
    axes.plot(steps, distances, color=_CONSENSUS, linewidth=2)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("consensus distance")
    axes.set_ylim(bottom=0)
    _clean(axes, "both")
    return "Consensus distance: how far the members are from their mean"


def _clean(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
