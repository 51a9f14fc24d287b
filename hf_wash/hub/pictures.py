"""
The pictures of a model card, from the log that a run keeps in `trainer_state.json`: those of its report that say how
good the model is and how close its members stayed, drawn by the same functions.

They need matplotlib, which is optional: without it there are none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..report import figures
from ..report.gather import Run, points
from ..report.page import can_draw


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
    if not can_draw():
        return {}
    metric = "accuracy" if "eval_accuracy" in metrics else "loss"
    scale, label = (100.0, "accuracy in %") if metric == "accuracy" else (1.0, "loss (nats)")
    run = Run("", log=[dict(entry) for entry in log_history])
    soup, ensemble = (points(run.log, f"eval_{who}{metric}", scale) for who in ("", "ensemble_"))
    members = run.members_over_the_run(metric, scale)
    over_time = len(soup[0]) > 1
    if not over_time:
        # One evaluation, or the final metrics alone: where the soup and the ensemble stand among the members.
        final = Run("", log=[{**metrics, "step": 0}])
        soup, ensemble = (points(final.log, f"eval_{who}{metric}", scale) for who in ("", "ensemble_"))
        members = final.members_over_the_run(metric, scale)
    # A card is read on a white page and on a dark one: it gets the picture that brings its own background.
    drawn = {
        metric: (
            figures.draw_over_the_run(figures.LIGHT, soup, ensemble, members, label),
            f"{metric.capitalize()} on the evaluation data while training"
            if over_time
            else f"{metric.capitalize()} of the soup, the ensemble and each member",
        ),
        "consensus": (
            figures.draw_consensus(figures.LIGHT, points(run.log, "consensus_distance")),
            "Consensus distance: how far the members are from their mean",
        ),
    }
    pictures = {}
    for name, (figure, caption) in drawn.items():
        if figure is not None:
            write_whole(Path(folder) / place / f"{name}.png", figures.as_png(figure))
            pictures[caption] = f"{place}/{name}.png"
    return pictures
