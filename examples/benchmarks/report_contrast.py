"""
Two runs side by side: the loss on the straight lines between their members and through their soups, from the
measurements that their reports keep.

    python examples/train_vit.py --output_dir outputs/wash --mixing wash
    python examples/train_vit.py --output_dir outputs/independent --mixing independent
    python examples/benchmarks/report_contrast.py outputs/wash outputs/independent --out contrast.png
"""

import argparse
from pathlib import Path

from hf_wash.report import figures
from hf_wash.report.gather import Run, gather


def draw(runs: list[Run], look: figures.Look) -> bytes:
    """The picture in one look, both runs on the same axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.3), dpi=100, layout="constrained", facecolor=look.face)
    panels = figure.subplots(1, len(runs), sharey=True)
    for axes, run in zip(panels, runs, strict=True):
        lines = run.surveyed["lines"]
        for line in lines:
            soup = line["to"] == "soup"
            axes.plot(
                line["fractions"], line["loss"], color=look.soup if soup else look.ensemble,
                linestyle="-" if soup else "--", marker=None if soup else "o", markersize=3.5,
                label={True: "a member to the soup, and beyond", False: "a member to another"}[soup],
            )  # fmt: skip
        axes.set_title(
            f"{run.name if run.method == 'this run' else run.method}: barrier {run.surveyed['barrier']:.2g} nats",
            fontsize=11, color=look.ink,
        )  # fmt: skip
        axes.set_xlabel("position on the line (0: its start, 1: its end)", color=look.ink)
        axes.set_facecolor(look.face)
        axes.tick_params(colors=look.ink)
        axes.grid(color=look.grid, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(look.ink)
    panels[0].set_ylabel("loss (nats)", color=look.ink)
    named = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named, loc="outside lower center", ncols=2, frameon=False, labelcolor=look.ink)
    return figures.as_png(figure)


def main() -> None:
    """Read the runs and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, help="folders of two runs that have a report")
    parser.add_argument(
        "--out", type=Path, required=True, help="the picture to write; a dark one goes beside it, as -dark"
    )
    chosen = parser.parse_args()
    runs = [gather(folder) for folder in chosen.runs]
    for folder, run in zip(chosen.runs, runs, strict=True):
        if not run.surveyed.get("lines"):
            parser.error(f"{folder} has no measurements: train with report=True and evaluation data")
    chosen.out.write_bytes(draw(runs, figures.LIGHT))
    chosen.out.with_stem(f"{chosen.out.stem}-dark").write_bytes(draw(runs, figures.DARK))


if __name__ == "__main__":
    main()
