"""The picture of a comparison: accuracy of the averaged model against what is sent."""

import io
import statistics

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot

from .methods import METHODS
from .tables import Row


# Readable in grey: methods differ by their markers and by how their lines are dashed, not by colour alone.
STYLES = {
    "wash": ("o", "-", "black"),
    "wash_opt": ("P", "-", "dimgrey"),
    "papa": ("s", "--", "tab:blue"),
    "papa_all": ("D", "--", "steelblue"),
    "papa_2": ("d", "--", "skyblue"),
    "dart": ("X", ":", "tab:purple"),
    "sparta": ("^", "-.", "tab:green"),
    "local_sgd": ("v", ":", "tab:red"),
    "diloco": ("*", (0, (5, 1, 1, 1, 1, 1)), "tab:orange"),
}
LEVELS = {"plain-N-times": "-", "plain-N-times-ema": "--", "independent-same-start": ":"}


def point(row: Row) -> tuple[float, float, float]:
    """Where a row stands: kB that a member sends in a step, accuracy of the averaged model, standard deviation of it."""
    accuracies = row.values("soup")
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return statistics.fmean(row.values("bytes_per_step")) / 1000, statistics.fmean(accuracies), spread


def picture(rows: list[Row], name: str) -> bytes:
    """
    Accuracy of the averaged model against the bytes that a member sends in a step, as PNG: for each method a line
    through its budgets, and hollow marks for its other settings. What sends nothing is a level line.

    Args:
        rows (`list[Row]`): Of the comparison.
        name (`str`): Of the setting.
    """
    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    sending = [row for row in rows if row.method in STYLES and statistics.fmean(row.values("bytes_per_step")) > 0]
    for method, (marker, dashes, colour) in STYLES.items():
        for filled in (True, False):  # budgets, joined; then other settings, hollow
            own = [row for row in sending if row.method == method and ("@" in row.label) is filled]
            points = sorted(map(point, own))
            if points:
                sent, accuracies, errors = zip(*points, strict=True)
                axes.errorbar(
                    sent, accuracies, yerr=errors, marker=marker, linestyle=dashes if filled else "none", color=colour,
                    capsize=3, markersize=7, markerfacecolor=colour if filled else "none",
                    label=METHODS[method].title + ("" if filled else ", other settings"),
                )  # fmt: skip
    for row in rows:
        if row.label in LEVELS:
            what = "ensemble" if row.method == "independent" else "soup"
            title = f"{row.title}, ensemble (sends nothing)" if what == "ensemble" else row.title
            level = statistics.fmean(row.values(what))
            axes.axhline(level, linestyle=LEVELS[row.label], color="grey", linewidth=1.2, label=title)
    if sending:
        axes.set_xscale("log")
    axes.set_xlabel("sent by a member in a step, on average (kB)")
    axes.set_ylabel("accuracy of the averaged model on test images (%)")
    axes.set_title(f"{name} (bars: standard deviation over seeds)", fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(fontsize=8, loc="outside right upper")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
