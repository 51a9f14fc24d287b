"""
The report of a run: one HTML page with its pictures inside, and the same pictures beside it.

What is known comes from `gather`, the pictures from `figures`; here is what is said of them.
"""

import base64
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..sentences import all_printable, printable
from . import figures
from .figures import DARK, LIGHT, Look, bytes_text
from .gather import PLACE, SURVEY, Run, as_json, gather, points


PAGE = "index.html"


def can_draw() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def write_report(
    folder: str | Path,
    *,
    surveyed: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    log_history: list[dict[str, Any]] | None = None,
) -> Path:
    """
    Write the report of a run into its folder: `report/index.html`, the pictures and `report/measurements.json`.

    Args:
        folder (`str` or `Path`):
            The run's folder.
        surveyed (`dict`, *optional*):
            What was measured, which is then kept. What was kept, if not given.
        record, log_history (*optional*):
            In place of `wash_run.json` and `trainer_state.json`.

    Returns:
        `Path`: the page.

    Raises:
        ValueError: if there is nothing of a run in the folder, or a file cannot be read.
        ImportError: without matplotlib.
    """
    if not can_draw():
        raise ImportError('A report needs matplotlib: pip install "hf-wash[report]".')
    run = gather(folder, surveyed=surveyed, record=record, log_history=log_history)
    place = Path(folder) / PLACE
    if surveyed:
        write_whole(place / SURVEY, as_json(surveyed))
    pictures = {}
    for name, (draw, caption, note) in _pictures(run).items():
        light = draw(LIGHT)
        if light is None:
            continue
        drawn = {"": figures.as_png(light), "-dark": figures.as_png(draw(DARK))}
        for suffix, content in drawn.items():
            write_whole(place / f"{name}{suffix}.png", content)
        width, height = (round(inches * 100) for inches in light.get_size_inches())
        pictures[name] = {
            "light": _embedded(drawn[""]), "dark": _embedded(drawn["-dark"]), "caption": caption, "note": note,
            "width": width, "height": height,
        }  # fmt: skip
    page = place / PAGE
    write_whole(page, render(run, pictures).encode("utf-8"))
    return page


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


Drawing = tuple[Callable[[Look], Any], str, str]


def _pictures(run: Run) -> dict[str, Drawing]:
    """Each picture's drawing, its caption and what else is to be said of it."""
    log, seen = run.log, run.surveyed
    found: dict[str, Drawing] = {}

    def over_the_run(metric: str, scale: float, label: str, caption: str) -> None:
        soup, ensemble = (points(log, f"eval_{who}{metric}", scale) for who in ("", "ensemble_"))
        members = run.members_over_the_run(metric, scale)
        found[metric] = (
            lambda look: figures.draw_over_the_run(look, soup, ensemble, members, label), caption, ""
        )  # fmt: skip

    over_the_run("accuracy", 100.0, "accuracy in %", "Accuracy on the evaluation data.")
    over_the_run("loss", 1.0, "loss (nats)", "Loss on the evaluation data.")
    distances = points(log, "consensus_distance")
    found["consensus"] = (
        lambda look: figures.draw_consensus(look, distances),
        "Consensus distance: how far the members are from their mean.",
        "While training it is estimated on a sample of the weights; at an evaluation it is exact.",
    )
    over_time = len(run.layer_steps) > 1
    found["layers"] = (
        lambda look: figures.draw_layers(look, run.layer_names, run.layer_steps, run.layer_spreads),
        f"Distance from the members' mean, layer by layer{' and step by step' if over_time else ''}.",
        f"Measured {run.layer_source}." if run.layer_source else "",
    )
    found["bytes"] = (
        lambda look: figures.draw_bytes(look, run.sent(), run.steps or 0),
        "Bytes sent in the whole run by all members together.",
        "",
    )
    accurate = any(line.get("accuracy") is not None for line in seen.get("lines", []))
    found["lines"] = (
        lambda look: figures.draw_lines(look, seen.get("lines", [])),
        f"Loss{' and accuracy' if accurate else ''} along straight lines through weight space.",
        "Numbers name members. A line to the soup goes on beyond it; the vertical line is where it meets the soup.",
    )
    plane = seen.get("plane") or {}
    found["plane"] = (
        lambda look: figures.draw_plane(look, plane),
        "Loss on the plane through three members, with the soup.",
        _said_of_plane(plane) if plane else "",
    )
    found["disagreement"] = (
        lambda look: figures.draw_disagreement(look, seen.get("disagreement") or []),
        "How often two members predict different classes.",
        "",
    )
    found["reliability"] = (
        lambda look: figures.draw_reliability(look, seen.get("calibration") or {}),
        "Reliability: how often predictions of a confidence are right.",
        "Below the diagonal a model is more confident than it is right. ECE is the expected calibration error.",
    )
    return found


def _said_of_plane(plane: Mapping[str, Any]) -> str:
    columns, rows, away = plane["x"], plane["y"], plane.get("soup_away")
    soup = ""
    if away is not None:
        # A uniform soup of three is their centre, up to rounding.
        inside = away <= 1e-3 * (columns[-1] - columns[0])
        soup = (
            " The soup lies in it."
            if inside
            else f" The soup is {_plain(away)} away from it, and drawn where it comes nearest."
        )
    return f"Measured on {len(columns)} × {len(rows)} points, with straight lines between them.{soup}"


def render(run: Run, pictures: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's HTML."""
    import jinja2

    from .. import __version__

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))
    seen = run.surveyed
    examples = f"{seen.get('examples', 0):,} examples of {seen.get('data', 'the evaluation data')}"
    known = {"lines": [], "disagreement": None, "calibration": None}
    run.surveyed = {**known, **seen}
    return template.render(
        run=run,
        pictures=pictures,
        light=LIGHT,
        dark=DARK,
        version=__version__,
        survey_file=SURVEY,
        **all_printable(
            {
                "lead": _lead(run),
                "facts": _facts(run),
                "results": _results(run, examples),
                "exchange": _exchange(run),
                "basin": _basin(run),
                "basin_source": f"Measured on {examples}. " + _batch_norm(seen) + _no_plane(seen),
                "lines": [_line(line) for line in seen.get("lines", [])],
                "calibrations": _calibrations(seen.get("calibration") or {}),
                "calibration_source": f"On {examples}, in 15 bins of confidence.",
                "recipe": _recipe(run),
                "how_to_measure": (
                    "a Trainer with evaluation data does so at the end of training (report=True), and "
                    "`hf-wash report DIR --eval-data FOLDER` of a run's members that were saved."
                ),
            }
        ),
    )


def _lead(run: Run) -> str:
    size = run.size
    method = run.record.get("mixing", {}).get("method")
    what = {"wash": "shuffled a few of their weights (WASH)", "independent": "exchanged nothing"}.get(
        method or "", f"exchanged weights ({run.method})" if method else "were trained"
    )
    members = f"{size} members" if size and size > 1 else "A model" if size else "Members"
    steps = f" over {run.steps:,} optimizer steps" if run.steps else ""
    kind = run.record.get("model", {}).get("class")
    return f"{members}{f' of {kind}' if kind else ''} that {what}{steps}."


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def _plain(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _facts(run: Run) -> list[tuple[str, str]]:
    metrics, seen, sent = run.metrics, run.surveyed, run.sent()
    facts = []
    for key, name in (("eval_accuracy", "soup"), ("eval_ensemble_accuracy", "ensemble")):
        if key in metrics:
            facts.append((f"accuracy of the {name}", _percent(metrics[key])))
    if "eval_accuracy" not in metrics and "eval_loss" in metrics:
        facts.append(("loss of the soup", _plain(metrics["eval_loss"])))
    if seen.get("lines"):
        facts.append(("highest barrier between members, in nats", _plain(seen.get("barrier"))))
    distances = points(run.log, "eval_consensus_distance")[1] or points(run.log, "consensus_distance")[1]
    if distances:
        facts.append(("consensus distance at the end", _plain(distances[-1])))
    own = sent.get(run.method)
    if own:
        facts.append(("less exchanged than DDP would send", f"{sent['DDP'] / own:,.3g} ×"))
    return facts


def _results(run: Run, examples: str) -> dict[str, Any] | None:
    metrics = run.metrics
    names = [name for name in ("accuracy", "loss", "ece") if f"eval_{name}" in metrics]
    says = {
        "accuracy": ("accuracy", _percent),
        "loss": ("loss (nats)", _plain),
        "ece": ("calibration error", _percent),
    }
    keys = {f"member {i}": f"eval_member_{i}_{{}}" for i in range(run.size or 0)}
    keys |= {"members' mean": "eval_members_{}_mean", "ensemble": "eval_ensemble_{}", "soup": "eval_{}"}
    if names:
        rows = [[who, *(says[name][1](metrics.get(key.format(name))) for name in names)] for who, key in keys.items()]
        rows = [row for row in rows if set(row[1:]) != {"–"}]
        return {"columns": ["", *(says[name][0] for name in names)], "rows": rows, "source": "At the last evaluation."}
    answers = run.surveyed.get("answers") or {}
    if not answers:
        return None
    order = [*(name for name in answers if name.startswith("member ")), "ensemble", "soup"]
    rows = [
        [name, _percent(answers[name]["accuracy"]), _plain(answers[name]["loss"])] for name in order if name in answers
    ]
    return {"columns": ["", "accuracy", "loss (nats)"], "rows": rows, "source": f"On {examples}, at the end."}


def _exchange(run: Run) -> dict[str, Any] | None:
    sent, steps = run.sent(), run.steps
    if not sent or not steps:
        return None
    own = sent[run.method]
    rows = [
        [name, bytes_text(amount / steps), bytes_text(amount), "1" if name == run.method else _times(amount, own)]
        for name, amount in sent.items()
    ]
    model = run.record["model"]
    return {
        "columns": ["", "sent per step", "sent in all", f"compared with {run.method}"],
        "rows": rows,
        "source": (
            f"{run.method[0].upper()}{run.method[1:]}: the values that members got from each other, counted while training. The others are computed for the same "
            f"{run.size} members, the {steps:,} steps of this run and its {model.get('trainable_parameters') or 0:,} trained "
            f"parameters ({bytes_text(model['trainable_bytes'])}): SPARTA 0.5 % of the model for each member and step, PAPA "
            "one model for each member every 10 steps, data-parallel training (DDP) one gradient for each member and step. "
            "Headers, and that collectives may carry values twice, are left out of all."
        ),
    }


def _times(amount: float, own: float) -> str:
    return f"{amount / own:,.3g} ×" if own else "–"


def _basin(run: Run) -> str:
    barrier = run.surveyed.get("barrier")
    lines = [line for line in run.surveyed.get("lines", []) if line["to"] != "soup"]
    if barrier is None or not lines:
        return (
            "On a line between members the loss is not finite somewhere, so there is no saying how high a barrier is."
        )
    worst = max(lines, key=lambda line: line["barrier"])
    ends = (worst["loss"][0] + worst["loss"][-1]) / 2
    between = f"between {worst['from']} and {worst['to'].removeprefix('member ')}"
    if barrier <= 0:
        return (
            "On none of the lines between members does the loss rise above the straight line between the losses of the "
            "ends: the members lie in one basin."
        )
    compared = f", {100 * barrier / ends:.2g} % of the {ends:.3g} of its ends" if ends > 0 else ""
    return (
        f"The highest barrier lies {between}: the loss rises {barrier:.3g} nats above the straight line between the losses "
        f"of the ends{compared}. Members whose average works have a barrier near 0; where it is high, they lie in "
        "different basins, and their soup on the ridge between these."
    )


def _batch_norm(seen: Mapping[str, Any]) -> str:
    said = seen.get("batch_norm")
    return f"BatchNorm statistics were {said}." if said else ""


def _no_plane(seen: Mapping[str, Any]) -> str:
    if seen.get("plane", seen) is None:
        return " The first three members lie on one line, so there is no plane to draw."
    return ""


def _line(line: Mapping[str, Any]) -> list[str]:
    ends = [line["loss"][line["fractions"].index(end)] for end in (0.0, 1.0)]
    target = "the soup" if line["to"] == "soup" else line["to"]
    return [f"{line['from']} to {target}", _plain(line["barrier"]), " and ".join(_plain(end) for end in ends)]


def _calibrations(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    order = [*(name for name in found if name.startswith("member ")), "ensemble", "soup"]
    return [[n, _percent(found[n]["ece"]), _percent(found[n]["accuracy_overall"])] for n in order if n in found]


def _recipe(run: Run) -> list[list[str]]:
    parts = (run.record.get(part, {}) for part in ("mixing", "training", "population", "data", "soup", "hardware"))
    mixing, training, population, data, soup, hardware = parts
    wash = mixing.get("method") == "wash"
    rows = [
        ("mixing", mixing.get("method")),
        ("probability p", wash and mixing.get("shuffle_probability")),
        ("schedule over depth", wash and mixing.get("shuffle_schedule")),
        ("members start from", population.get("same_init") is not None and ("the same weights" if population["same_init"] else "different weights")),
        ("steps", training.get("steps")),
        ("batch size of a member", training.get("batch_size")),
        ("optimizer", training.get("optimizer")),
        ("learning rate", training.get("learning_rate")),
        ("seed", training.get("seed")),
        ("training examples", data.get("train_samples")),
        ("soup", soup.get("method")),
        ("hardware", hardware.get("text")),
    ]  # fmt: skip
    return [
        [
            name,
            f"{value:,}"
            if isinstance(value, int)
            else f"{value:g}"
            if isinstance(value, float)
            else printable(str(value)),
        ]
        for name, value in rows
        if value not in (None, False)
    ]
