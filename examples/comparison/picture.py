"""The picture of a comparison: accuracy of the averaged model against what is sent."""

import io
import math
import statistics

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatter
from matplotlib.transforms import Bbox

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


# How many points below the best the axis ends. What failed altogether stands at its edge, with its accuracy: it would press
# all that is worth comparing into a strip.
DEPTH = 25


# Where a text goes beside its point, and above or below its level line, in points of the page: the first free place.
BESIDE = [
    (x, y, "left" if x > 0 else "right" if x < 0 else "center")
    for y in (0, 9, -9, 18, -18, 27, -27, 36, -36, 45, -45)
    for x in ((8, -8) if abs(y) < 9 else (8, -8, 0))
]
ALONG = [(x, y, "left") for y in (6, -7, 15, -16) for x in (4, 130, 260, 390)]


def place(axes, points: list[tuple[float, float, float]], texts: list[tuple[float, float, str]], levels: dict) -> None:
    """
    Write names beside their points and along their level lines, so that none lies on another, on a mark or on its bar,
    as far as there is room.

    Args:
        axes (`matplotlib.axes.Axes`): Whose limits are final.
        points (`list[tuple[float, float, float]]`): All marks, as [`point`] gives them.
        texts (`list[tuple[float, float, str]]`): x, y in the axes' data, and what is written there.
        levels (`dict[str, float]`): What is written along which level.
    """
    axes.figure.canvas.draw()
    frame, to_pixels = axes.get_window_extent(), axes.transData.transform
    taken = []
    for x, y, spread in points:
        (left, low), (_, high) = to_pixels([(x, y - spread), (x, y + spread)])
        taken.append(Bbox.from_extents(left - 5, min(low, to_pixels((x, y))[1] - 5), left + 5, max(high, low + 10)))
    start = axes.get_xlim()[0]
    every = [(start, level, text, ALONG, "dimgrey") for text, level in levels.items()]
    every += [(x, y, text, BESIDE, "black") for x, y, text in sorted(texts, key=lambda one: (one[1], one[0]))]
    for x, y, text, places, colour in every:
        written = axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=7.5, va="center", color=colour,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip

        def put(dx: float, dy: float, side: str, written=written) -> Bbox:
            written.set_position((dx, dy))
            written.set_horizontalalignment(side)
            return written.get_window_extent()

        def is_free(box: Bbox) -> bool:
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            return inside and not any(box.overlaps(other) for other in taken)

        free = next((where for where in places if is_free(put(*where))), places[0])
        taken.append(put(*free))


def picture(rows: list[Row], name: str) -> bytes:
    """
    Accuracy of the averaged model against the bytes that a member sends in a step, as PNG: for each method a line
    through its budgets, its name at the end, and hollow marks for its other settings, each with its name. What sends
    nothing is a level line, and what is more than `DEPTH` points below the best lies at the lower edge.

    Args:
        rows (`list[Row]`): Of the comparison.
        name (`str`): Of the setting.
    """
    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    sending = [row for row in rows if row.method in STYLES and statistics.fmean(row.values("bytes_per_step")) > 0]
    texts: list[tuple[float, float, str]] = []
    marks: list[tuple[float, float, float]] = []
    levels: dict[str, float] = {}
    for row in rows:
        if row.label in LEVELS:
            what = "ensemble" if row.method == "independent" else "soup"
            title = f"{row.title}, ensemble (sends nothing)" if what == "ensemble" else row.title
            level = statistics.fmean(row.values(what))
            axes.axhline(level, linestyle=LEVELS[row.label], color="grey", linewidth=1.2, label=title)
            levels[title.removesuffix(" (sends nothing)")] = level
    edge = max([*levels.values(), *(point(row)[1] for row in sending)], default=0.0) - DEPTH
    failed = any(point(row)[1] < edge for row in sending)

    def named(row: Row, name: str) -> tuple[float, float, str]:
        x, y, _ = point(row)
        return (x, y, name) if y >= edge else (x, edge, f"{name}: {y:.1f} %")

    for method, (marker, dashes, colour) in STYLES.items():
        for filled in (True, False):  # budgets, joined; then other settings, hollow
            own = [row for row in sending if row.method == method and ("@" in row.label) is filled]
            own.sort(key=point)
            points = [(x, y, spread) if y >= edge else (x, edge, 0.0) for x, y, spread in map(point, own)]
            marks += points
            title = METHODS[method].title
            if filled:
                texts += [named(row, title) for row in own if row is own[-1] or point(row)[1] < edge]
            else:
                texts += [named(row, f"{title}, {row.label.partition('-')[2]}") for row in own]
            if points:
                sent, accuracies, errors = zip(*points, strict=True)
                bars = [math.nan if y == edge else error for y, error in zip(accuracies, errors, strict=True)]
                axes.errorbar(
                    sent, accuracies, yerr=bars, marker=marker, linestyle=dashes if filled else "none", color=colour,
                    capsize=3, markersize=7, markerfacecolor=colour if filled else "none",
                    label=METHODS[method].title + ("" if filled else ", other settings"),
                )  # fmt: skip
    if sending:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
        axes.margins(x=0.12, y=0.1)
    axes.set_xlabel("sent by a member in a step, on average (kB)")
    axes.set_ylabel("accuracy of the averaged model on test images (%)")
    below = f"; at the lower edge: below {edge:.0f} %" if failed else ""
    axes.set_title(f"{name} (bars: standard deviation over seeds{below})", fontsize=10)
    if failed:
        axes.set_ylim(bottom=edge - 1)
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(fontsize=8, loc="outside right upper")
    place(axes, marks, texts, levels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
