"""
The pictures of a run, for its report and its model card: each takes plain values and draws them on a figure.

Every line has a style or a marker of its own beside its colour, so that it can be told from the others in grey. Where
the values come from is `gather`'s and `survey`'s business. Needs matplotlib, which is optional.
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Look:
    """The colours of a page: of what is drawn on, of what is written, and of the lines (after Okabe and Ito)."""

    face: str
    ink: str
    grid: str
    soup: str
    ensemble: str
    members: str
    accent: str
    colormap: str


LIGHT = Look("#ffffff", "#1c1f23", "#c9ced4", "#c14f00", "#0068a8", "#6b737c", "#007a5a", "viridis")
DARK = Look("#16191d", "#e6e8eb", "#3b424a", "#ff9a56", "#6cc0f5", "#9aa3ad", "#3ecfa0", "viridis")

_WIDTH, _HEIGHT, _DPI = 5.2, 3.3, 150
_DASHES: tuple[Any, ...] = ((0, (1, 1)), (0, (4, 1, 1, 1)), (0, (2, 1)), (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "v", "^", "X", "P", "<")
# More members than these are not told apart: each would be a word in the legend, and none could be followed.
_TOLD_APART = 4

Series = tuple[Sequence[float], Sequence[float]]


def new_figure(look: Look, height: float = 1.0, panels: int = 1) -> tuple["Figure", Any]:
    """A figure in these colours, and its axes: one, or an array of several beneath each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT * height), dpi=_DPI, layout="constrained", facecolor=look.face)
    axes = figure.subplots(panels, 1)
    for each in [axes] if panels == 1 else axes:
        each.set_facecolor(look.face)
        each.tick_params(colors=look.ink, labelsize=9)
        for side, spine in each.spines.items():
            spine.set_color(look.ink)
            spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def as_png(figure: "Figure") -> bytes:
    """The figure's file; an unchanged run gives an unchanged file, so it holds no date and no version."""
    drawn = io.BytesIO()
    figure.savefig(drawn, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return drawn.getvalue()


def _finish(axes: Any, look: Look, x: str, y: str, grid: str | None = "both") -> None:
    axes.set_xlabel(x, color=look.ink, fontsize=10)
    axes.set_ylabel(y, color=look.ink, fontsize=10)
    if grid is not None:
        axes.grid(axis=grid, color=look.grid, linewidth=0.6)
        axes.set_axisbelow(True)


def _legend(axes: Any, look: Look) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(frameon=False, labelcolor=look.ink, fontsize=8.5, handlelength=3)


def _legend_below(figure: "Figure", axes: Any, look: Look) -> None:
    """Where lines may be anywhere."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        labelcolor=look.ink,
        fontsize=8.5,
        handlelength=3,
    )


def _at_least(axes: Any, span: float, low: float = -math.inf, high: float = math.inf) -> None:
    """A vertical axis that spans so much: noise should not look like a mountain."""
    bottom, top = axes.get_ylim()
    missing = max(0.0, span - (top - bottom)) / 2
    bottom, top = bottom - missing, top + missing
    if bottom < low:
        bottom, top = low, top + (low - bottom if missing else 0)
    if top > high:
        bottom, top = bottom - (top - high if missing else 0), high
    axes.set_ylim(bottom, top)


def _every(count: int) -> int:
    """So that a line has about eight markers."""
    return max(1, count // 8)


def _styles(look: Look, index: int, count: int) -> dict[str, Any]:
    """How member `index` of `count` is drawn."""
    if count > _TOLD_APART:
        label = "members" if index == 0 else None
        return {"color": look.members, "linewidth": 1, "linestyle": ":", "label": label}
    return {
        "color": look.members,
        "linewidth": 1.2,
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "label": f"member {index}",
    }


def draw_over_the_run(
    look: Look, soup: Series, ensemble: Series, members: Sequence[Series], label: str
) -> "Figure | None":
    """
    A metric of soup, ensemble and each member over the run; where there was one evaluation, beside each other.

    Args:
        soup, ensemble (`tuple`): Optimizer steps and values; empty ones for what was not evaluated.
        members (`Sequence[tuple]`): The same of each member.
        label (`str`): The metric with its unit.

    Returns:
        `Figure`; `None` if there is nothing to draw.
    """
    if not soup[0] or (len(soup[0]) < 2 and not any(steps for steps, _ in members)):
        return None
    if len(soup[0]) < 2:
        return _beside_each_other(look, soup, ensemble, members, label)
    figure, axes = new_figure(look)
    for index, (steps, values) in enumerate(members):
        if steps:
            axes.plot(steps, values, markevery=_every(len(steps)), **_styles(look, index, len(members)))
    if ensemble[0]:
        axes.plot(
            *ensemble, color=look.ensemble, linestyle="--", marker="s", markersize=4.5, label="ensemble",
            markevery=_every(len(ensemble[0])),
        )  # fmt: skip
    axes.plot(
        *soup, color=look.soup, linewidth=2.2, marker="D", markersize=4.5, label="soup", markevery=_every(len(soup[0]))
    )
    _finish(axes, look, "optimizer step", label)
    _legend(axes, look)
    return figure


def _beside_each_other(look: Look, soup: Series, ensemble: Series, members: Sequence[Series], label: str) -> "Figure":
    figure, axes = new_figure(look, 0.7)
    rows = [("soup", list(soup[1]), look.soup, "D"), ("ensemble", list(ensemble[1]), look.ensemble, "s")]
    rows = [row for row in rows if row[1]] + [("members", [v for _, own in members for v in own], look.members, "o")]
    for height, (_, values, color, marker) in enumerate(rows):
        axes.plot(values, [height] * len(values), marker, color=color, alpha=0.8, markersize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.margins(x=0.1)
    _finish(axes, look, label, "", grid="x")
    return figure


def draw_consensus(look: Look, distances: Series) -> "Figure | None":
    """
    The consensus distance over the run.

    Args:
        distances (`tuple`): Optimizer steps and distances.
    """
    if len(distances[0]) < 2:
        return None
    figure, axes = new_figure(look)
    axes.plot(
        *distances, color=look.accent, linewidth=2, marker="o", markersize=3.5, markevery=_every(len(distances[0]))
    )
    axes.set_ylim(bottom=0)
    _finish(axes, look, "optimizer step", "consensus distance\n(Euclidean, in units of a weight)")
    return figure


def draw_layers(
    look: Look, names: Sequence[str], steps: Sequence[float], spreads: Sequence[Sequence[float]]
) -> "Figure | None":
    """
    How far members are from their mean, layer by layer: over the run as a heat map, or at one step as bars.

    Args:
        names (`Sequence[str]`): The layers, first layer first.
        steps (`Sequence[float]`): Optimizer steps, of shape `(T,)`.
        spreads (`Sequence[Sequence[float]]`): Of shape `(T, layers)`: root mean square, in units of a weight.
    """
    if not names or not steps:
        return None
    what = "root mean square distance of a weight\nfrom the members' mean"
    ticks = sorted({round(i * (len(names) - 1) / 7) for i in range(8)}) if len(names) > 8 else list(range(len(names)))
    labels = [_short(names[tick]) for tick in ticks]
    if len(steps) < 2:
        figure, axes = new_figure(look, 1.3)
        axes.barh(range(len(names)), spreads[0], color=look.accent, edgecolor=look.face, linewidth=0.4)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=4)
        _finish(axes, look, what, "layer, from input to output", grid="x")
    else:
        figure, axes = new_figure(look, 1.3)
        image = axes.pcolormesh(
            _edges(steps), [i - 0.5 for i in range(len(names) + 1)], [list(row) for row in zip(*spreads, strict=True)],
            cmap=look.colormap, vmin=0,
        )  # fmt: skip
        axes.set_ylim(len(names) - 0.5, -0.5)
        bar = figure.colorbar(image, ax=axes, location="bottom", aspect=40, pad=0.02)
        bar.set_label(what, color=look.ink, fontsize=9)
        bar.ax.tick_params(colors=look.ink, labelsize=8)
        bar.outline.set_edgecolor(look.ink)
        _finish(axes, look, "optimizer step", "layer, from input to output", grid=None)
    axes.set_yticks(ticks, labels, fontsize=7.5)
    return figure


def _short(name: str, length: int = 26) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _edges(steps: Sequence[float]) -> list[float]:
    """The borders between columns: halfway between the steps."""
    between = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [steps[0] - (between[0] - steps[0]), *between, steps[-1] + (steps[-1] - between[-1])]


def draw_bytes(look: Look, amounts: Mapping[str, float], steps: int) -> "Figure | None":
    """
    Bytes sent in the whole run, by this one and by others, on a logarithmic scale.

    Args:
        amounts (`Mapping[str, float]`): Bytes by the method's name, this run's first.
        steps (`int`): Optimizer steps of the run.
    """
    shown = {name: amount for name, amount in amounts.items() if amount > 0}
    if not shown or not steps:
        return None
    figure, axes = new_figure(look, 0.75)
    first = next(iter(amounts))
    for height, (name, amount) in enumerate(shown.items()):
        own = name == first
        axes.barh(
            height, amount, color=look.soup if own else look.members, edgecolor=look.ink, linewidth=0.6, height=0.6,
            hatch=None if own else "///", alpha=1.0 if own else 0.75,
        )  # fmt: skip
        axes.annotate(
            f"{bytes_text(amount)}, {bytes_text(amount / steps)} a step", (amount, height), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=8.5, color=look.ink,
        )  # fmt: skip
    axes.set_xscale("log")
    low, high = min(shown.values()), max(shown.values())
    # Room for the words behind the longest bar.
    axes.set_xlim(low / 5, high * (high / low * 5) ** 0.45)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    _finish(axes, look, "bytes sent in the whole run, all members together (log scale)", "", grid="x")
    return figure


def bytes_text(amount: float) -> str:
    """A number of bytes as it is said: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} PB"


def draw_lines(look: Look, lines: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """
    Loss, and accuracy where there is one, along straight lines through weight space.

    Args:
        lines (`Sequence[Mapping]`): Each with `from`, `to` (what the ends are), `fractions`, `loss` and, with accuracy,
            `accuracy`, of one length.
    """
    if not lines:
        return None
    accurate = all(line.get("accuracy") is not None for line in lines)
    figure, axes = new_figure(look, 2.0 if accurate else 1.2, panels=2 if accurate else 1)
    panels = [("loss", "loss (nats)", 1.0), ("accuracy", "accuracy in %", 100.0)][: 2 if accurate else 1]
    # Between members, and to the soup: each kind has its colour and line, and its own marks.
    alike = {soup: [line for line in lines if (line["to"] == "soup") == soup] for soup in (True, False)}
    for each, (key, label, scale) in zip(axes if accurate else [axes], panels, strict=True):
        for line in lines:
            soup = line["to"] == "soup"
            number = alike[soup].index(line)
            each.plot(
                line["fractions"], [scale * value if value is not None else math.nan for value in line[key]],
                color=look.soup if soup else look.ensemble,
                linestyle="-" if soup else _DASHES[number % len(_DASHES)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4,
                markerfacecolor=look.face if soup else look.ensemble,
                linewidth=1.4 if soup else 1.6,
                label=f"{line['from']} to the soup, and beyond" if soup else f"{line['from']} to {line['to'].removeprefix('member ')}",
            )  # fmt: skip
        if any(line["to"] == "soup" for line in lines):
            each.axvline(1.0, color=look.soup, linewidth=0.8, linestyle=":")
        _at_least(each, 10.0, high=101.0) if key == "accuracy" else _at_least(each, 0.25 * each.get_ylim()[1], low=0.0)
        _finish(each, look, "position on the line (0: its start, 1: its end)", label)
    _legend_below(figure, axes[0] if accurate else axes, look)
    return figure


def draw_plane(look: Look, plane: Mapping[str, Any]) -> "Figure | None":
    """
    Loss on the plane through three members, as a map with heights.

    Args:
        plane (`Mapping`): What [`~hf_wash.report.plane.survey_plane`] found: `x` and `y` of the grid, `loss` of shape
            `(rows, columns)`, and the `places` of the members and the soup.
    """
    import numpy as np
    from matplotlib.colors import BoundaryNorm
    from matplotlib.patheffects import withStroke

    values = np.array([[math.nan if v is None else v for v in row] for row in plane.get("loss") or []], dtype=float)
    if not np.isfinite(values).any():
        return None
    levels = _heights(float(np.nanmin(values)), float(np.nanmax(values)))
    figure, axes = new_figure(look, 1.35)
    colormap = look.colormap
    norm = BoundaryNorm(levels, 256)
    masked = np.ma.masked_invalid(values)
    filled = axes.contourf(plane["x"], plane["y"], masked, levels=levels, cmap=colormap, norm=norm)
    axes.contour(plane["x"], plane["y"], masked, levels=levels, colors="#ffffff", linewidths=0.5)
    stroke = [withStroke(linewidth=2.5, foreground="#000000")]
    near = 0.04 * (plane["y"][-1] - plane["y"][0])
    for number, (name, (x, y)) in enumerate(plane["places"].items()):
        soup = name == "soup"
        axes.plot(
            x, y, "*" if soup else _MARKERS[number % len(_MARKERS)], color="#ffffff", markersize=14 if soup else 8,
            markeredgecolor="#000000", markeredgewidth=1.2, linestyle="none",
        )  # fmt: skip
        axes.text(
            x, y + near, name, color="#ffffff", fontsize=9, ha="center", va="bottom", path_effects=stroke,
        )  # fmt: skip
    axes.set_aspect("equal")
    first, second, *_ = plane["places"]
    bar = figure.colorbar(filled, ax=axes, ticks=levels[::2], format="%.3g")
    bar.set_label("loss (nats)", color=look.ink, fontsize=9)
    bar.ax.tick_params(colors=look.ink, labelsize=8)
    bar.outline.set_edgecolor(look.ink)
    _finish(
        axes,
        look,
        f"distance from {first} towards {second}\n(Euclidean, in units of a weight)",
        "distance across",
        grid=None,
    )
    return figure


def _heights(low: float, high: float, count: int = 12) -> list[float]:
    """
    Heights at which a map has its lines: closer to each other where it is low, since losses rise steeply around the
    members, and what is of interest lies between them.
    """
    span = max(high - low, 0.05 * abs(high), 1e-6)
    return [low + span * (number / count) ** 2 for number in range(count + 1)]


def draw_disagreement(look: Look, pairs: Sequence[Sequence[float]]) -> "Figure | None":
    """
    How often each two members predict different classes.

    Args:
        pairs (`Sequence[Sequence[float]]`): Fractions of examples, of shape `(N, N)`.
    """
    if len(pairs) < 2:
        return None
    figure, axes = new_figure(look, 1.15)
    percent = [[100 * value for value in row] for row in pairs]
    top = max(max(row) for row in percent) or 1.0
    # A member beside itself is no case of agreement: its place stays empty.
    shown = [
        [math.nan if row == column else value for column, value in enumerate(values)]
        for row, values in enumerate(percent)
    ]
    image = axes.imshow(shown, cmap=look.colormap, vmin=0, vmax=top)
    if len(pairs) <= 8:
        for row, values in enumerate(percent):
            for column, value in enumerate(values):
                if row != column:
                    color = "#000000" if value > 0.6 * top else "#ffffff"
                    axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=color)
    ticks = range(len(pairs)) if len(pairs) <= 8 else range(0, len(pairs), math.ceil(len(pairs) / 8))
    axes.set_xticks(list(ticks))
    axes.set_yticks(list(ticks))
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("examples on which two members differ, in %", color=look.ink, fontsize=9)
    bar.ax.tick_params(colors=look.ink, labelsize=8)
    _finish(axes, look, "member", "member", grid=None)
    return figure


def draw_reliability(look: Look, calibrations: Mapping[str, Mapping[str, Any]]) -> "Figure | None":
    """
    Reliability diagram: the accuracy of predictions by their confidence.

    Args:
        calibrations (`Mapping[str, Mapping]`): By who predicts ("soup", "ensemble", "member 0", …), what
            [`~hf_wash.report.measures.calibration`] returns.
    """
    if not calibrations:
        return None
    figure, axes = new_figure(look, 1.35)
    axes.plot([0, 100], [0, 100], color=look.grid, linewidth=1.5, label="as often right as confident")
    members = [name for name in calibrations if name.startswith("member ")]
    for name in [*members, *(name for name in ("ensemble", "soup") if name in calibrations)]:
        of = calibrations[name]
        if name in members:
            style = _styles(look, members.index(name), len(members))
        elif name == "ensemble":
            style = {"color": look.ensemble, "linestyle": "--", "marker": "s", "markersize": 4.5}
        else:
            style = {"color": look.soup, "linewidth": 2.2, "marker": "D", "markersize": 4.5}
        told = style.get("label", name)
        if told is not None:
            style["label"] = f"{told} (ECE {100 * of['ece']:.1f} %)" if told == name else told
        axes.plot([100 * v for v in of["confidence"]], [100 * v for v in of["accuracy"]], **style)
    axes.set_xlim(0, 102)
    axes.set_ylim(-2, 102)
    _finish(axes, look, "confidence: mean of the highest probability, in %", "accuracy in %")
    _legend_below(figure, axes, look)
    return figure
