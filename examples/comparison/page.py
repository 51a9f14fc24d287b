"""The page on results, made from the records alone: tables, and sentences that are computed from their numbers."""

import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

from .methods import METHODS, describe
from .setting import PRESETS
from .studies import tables_of as study_tables
from .tables import Row, comparison_table, difference, markdown, rows_of, short, spread, told_apart, verdict


INTRODUCTION = """# Results

{hurry}What we measured, with the commands. All of it is small; read the spread before the mean.

This page is made by `python examples/results_page.py` from the raw figures in [`results/`](results); a test holds the two
together. How methods are compared, and what the columns mean, is said [at the end](#how-methods-are-compared).
"""

METHOD = """## How methods are compared

Every row trains its population with `WashTrainer` from the same seeds, data and recipe; only what members exchange
differs. Accuracies are those of test images on which nothing was chosen, mean ± standard deviation over seeds.

- *members*: the mean of the members, each with its own BatchNorm statistics. *ensemble*: the mean of their
  probabilities. *averaged model*: the mean of all weights, its BatchNorm estimated anew on training batches. *greedy soup*:
  of those members that improve it on images held out from training. A method whose last exchange is at the end of the
  run leaves its members one model, with BatchNorm statistics of before: look at the averaged model.
- *copies sent a step*: what a member gives to others in a step, on average, in copies of the model's parameters, whatever
  the number of processes; of an average, what goes into it. Budgets are met by p (WASH, SPARTA) or the interval; PAPA, which
  pulls at the first batch of each epoch, sends no less than that.
- *consensus distance*: sqrt(1/N · Σ ‖θ_n − θ̄‖²) at the end. *training data*: the members' accuracy on what they were
  trained on, to be held against the test's. *ms a step*: of all members, one after the other on one thread, on a machine
  that was shared with other runs, the median over seeds: an order of magnitude.
- *one model*: a plain run; *N × the steps* costs as much compute as the population. *its EMA*: the best by held-out images
  of three exponential moving averages of its weights, over 1, 5 and 20 % of the run.
- *published*: the settings of the methods' authors ([the peers](peers.md)), made for runs that are tens to hundreds of times
  as long: such a row says how far they carry, not which method is better. *default*: what this library advises; *tuned*: six
  trials for each method, of the same length, judged by a fifth of the training images held out, with one seed:
  such an accuracy has a standard error of one to two points, so that a choice among near equals is chance.
- **Told apart** are two averaged models if the difference of their accuracies is at least two standard errors, over
  seeds and over test images, both paired. Below that the setting is too small to say which is better.
"""


def load_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder; the shorter preset first."""
    return sorted((json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))), key=lambda r: r["steps"])


def name_of(kept: dict[str, Any]) -> str:
    """What a record is called: its preset, and how it differs."""
    setting = kept["setting"]
    words = [setting["name"]]
    preset = dataclasses.asdict(PRESETS[setting["name"]]) if setting["name"] in PRESETS else setting
    if setting["recipes"] != preset["recipes"]:
        words.append(f"{setting['recipes']} recipes")
    if (setting["model"], setting["width"]) != (preset["model"], preset["width"]):
        words.append(f"{setting['model']} of width {setting['width']}")
    if setting["population_size"] != preset["population_size"]:
        words.append(f"{setting['population_size']} members")
    return ", ".join(words)


def picture_name(kept: dict[str, Any]) -> str:
    """The file of a comparison's picture, beside its record."""
    return name_of(kept).replace(", ", "-").replace(" ", "-") + ".png"


def set_up(kept: dict[str, Any]) -> str:
    """What all runs of a record share, in a few sentences."""
    setting, cell = kept["setting"], kept["cells"][0]
    data = setting["dataset_name"] or setting["data_dir"]
    size = f"; {cell['test_size']:,} test images" if "test_size" in cell else ""
    return (
        f"Data: `{data}`{size}. Model: {setting['model']}, {cell['parameters']:,} parameters. {setting['population_size']} "
        f"members, {kept['steps']:,} steps each of {setting['batch_size']} images; SGD with "
        f"{'Nesterov ' if setting['nesterov'] else ''}momentum {setting['momentum']:g}, learning rate "
        f"{setting['learning_rate']:g} on a cosine to {setting['min_learning_rate']:g}, weight decay "
        f"{setting['weight_decay']:g}; {setting['recipes']} recipes; {setting['hold_out']:.0%} of the training images held "
        f"out."
    )


def provenance(kept: dict[str, Any]) -> str:
    """How a record came about."""
    word = "Commits" if ", " in kept["commit"] else "Commit"
    return f"{word} {kept['commit']}; {kept['machine']}:\n\n```\n{kept['command']}\n```"


def claims(rows: dict[str, Row]) -> list[str]:
    """What the issue of WASH's worth asks for, each as a sentence with its numbers."""
    ours = rows.get("wash-tuned") or rows.get("wash-default")
    if ours is None:
        return []
    gaps = [ensemble - soup for ensemble, soup in zip(ours.values("ensemble"), ours.values("soup"), strict=True)]
    worst = round(max(gaps), 6)  # whole images, in points
    said = [
        f"The averaged model of {ours.title} is {'within' if worst <= 1 else 'NOT within'} 1 point of its own ensemble for "
        f"every seed: the ensemble is ahead by {worst:+.2f} points at most (mean {statistics.fmean(gaps):+.2f})."
    ]
    alone = rows.get("independent-same-start")
    if alone is not None:
        members, soup = statistics.fmean(alone.values("members")), statistics.fmean(ours.values("soup"))
        said.append(
            f"It is {'above' if soup > members else 'NOT above'} the mean of independent members: {soup:.1f} against "
            f"{members:.1f} %."
        )
        for label in ("independent-same-start", "independent-different-starts"):
            if label in rows:
                own, average = (statistics.fmean(rows[label].values(what)) for what in ("members", "soup"))
                said.append(f"The average of {rows[label].title} reaches {average:.1f} %, its members {own:.1f} %.")
    said += [verdict(ours, rows[label]) for label in ("plain-N-times", "plain-N-times-ema") if label in rows]
    for kind in ("tuned", "published"):  # like with like
        if wash := rows.get(f"wash-{kind}"):
            peers = [row for label, row in rows.items() if label.endswith(f"-{kind}") and row is not wash]
            said += [verdict(wash, row) for row in peers]
    return said


def equal_bytes(rows: dict[str, Row]) -> str:
    """WASH beside the others at each budget, as a table."""
    lines = []
    budgets = sorted({label.partition("@")[2] for label in rows if "@" in label}, key=float)
    for budget in budgets:
        ours = rows.get(f"wash@{budget}")
        for method in METHODS:
            row = rows.get(f"{method}@{budget}")
            if row is None:
                continue
            against = difference(row, ours) if ours is not None and row is not ours else None
            told = ""
            if against is not None:
                told = ("ahead" if against[0] > 0 else "behind") if told_apart(against) else "not told apart"
                told = f"{against[0]:+.2f} ± {against[1]:.2f}: {told}"
            lines.append(
                [
                    budget,
                    METHODS[method].title,
                    describe(row.cells[0]["options"]),
                    short(statistics.fmean(row.values("copies_per_step"))),
                    spread(row.values("ensemble")),
                    spread(row.values("soup")),
                    told,
                ]
            )
    header = [
        "budget",
        "method",
        "setting",
        "copies sent a step",
        "ensemble, %",
        "averaged model, %",
        "against WASH, points",
    ]
    return markdown(header, lines) if lines else ""


def separable(rows: dict[str, Row]) -> str:
    """How many pairs of methods the setting can tell apart."""
    listed = [row for row in rows.values() if len(row.cells) > 1]
    pairs = [(a, b) for index, a in enumerate(listed) for b in listed[index + 1 :]]
    found = [difference(a, b) for a, b in pairs]
    apart = [pair is not None and told_apart(pair) for pair in found]
    if not pairs:
        return "One seed: the setting is too small to tell any two methods apart."
    errors = [pair[1] for pair in found if pair is not None]
    median = (
        f", and the median standard error of a difference is {statistics.median(errors):.2f} points" if errors else ""
    )
    return (
        f"Of {len(pairs)} pairs of rows, {sum(apart)} are told apart by their averaged models{median}; for the others the "
        f"setting is too small."
    )


def comparison_part(kept: dict[str, Any]) -> str:
    """A comparison, from its record."""
    found = rows_of(kept["cells"], kept["setting"]["population_size"])
    rows = {row.label: row for row in found}
    parts = [
        f"## {name_of(kept)}: the methods compared",
        set_up(kept),
        comparison_table(found),
        f"![Accuracy of the averaged model against what is sent](results/{picture_name(kept)})",
        separable(rows),
        "\n".join(f"- {sentence}" for sentence in claims(rows)),
    ]
    if table := equal_bytes(rows):
        parts += ["**At equal bytes**", table]
    return "\n\n".join(filter(None, [*parts, provenance(kept)]))


def study_part(kept: dict[str, Any]) -> str:
    """The studies of a record."""
    return "\n\n".join([f"## {name_of(kept)}: studies of WASH", set_up(kept), study_tables(kept), provenance(kept)])


def tuning_part(kept: dict[str, Any]) -> str:
    """What was tried for each row of a comparison, and what was chosen."""
    tried: dict[str, list[str]] = {}
    scores: dict[str, list[float]] = {}
    for cell in kept["cells"]:
        scores.setdefault(cell["label"], []).append(100 * cell["held_out"]["soup"])
    for cell in kept["cells"]:
        row = cell["label"].rpartition(".")[0]
        if row not in kept["chosen"]:  # not all of its trials are finished
            continue
        text = f"{describe(cell['options'])}: {statistics.fmean(scores[cell['label']]):.1f}"
        if text not in tried.setdefault(row, []):
            tried[row].append(text)
    lines = [
        [row, "; ".join(texts), describe({"mixing": _mixing(row), **kept["chosen"][row]})]
        for row, texts in tried.items()
    ]
    table = markdown(["row", "tried: accuracy of the averaged model on held-out training images, %", "chosen"], lines)
    return "\n\n".join([f"## {name_of(kept)}: what was tuned", set_up(kept), table, provenance(kept)])


def _mixing(row: str) -> str:
    return METHODS[row.partition("@")[0].partition("-")[0]].options["mixing"]


PARTS = {"comparison": comparison_part, "study": study_part, "tuning": tuning_part}


def filled(text: str, records: list[dict[str, Any]]) -> str:
    """
    A text with figures in the places that are left for them.

    Args:
        text (`str`):
            `{glyphs-short wash@0.1 soup}` becomes the mean ± standard deviation, over seeds, of that comparison's row and
            column (as in `Row.values`).
        records (`list[dict]`): As `load_records` gives them.

    Raises:
        KeyError: where no record has such a figure.
    """
    rows = {
        (name_of(kept), row.label): row
        for kept in records
        if kept["kind"] == "comparison"
        for row in rows_of(kept["cells"], kept["setting"]["population_size"])
    }

    def figure(place: re.Match[str]) -> str:
        name, label, what = place[1].rsplit(maxsplit=2)
        values = rows[name, label].values(what)
        if not values:
            raise KeyError(f"`{label}` of {name} has no {what}.")
        return spread(values)

    return re.sub(r"\{([^{}]+)\}", figure, text)


def page(folder: Path) -> str:
    """
    The whole page.

    Args:
        folder (`Path`):
            With the records (`*.json`), and what is written by hand: `hurry.md`, one sentence for a reader in a hurry,
            if it is there, whose figures are taken from the records ([`filled`]), and `finetuning.md`.
    """
    hurry = folder / "hurry.md"
    records = load_records(folder)
    said = filled(hurry.read_text(), records).strip() + "\n\n" if hurry.exists() else ""
    parts = [INTRODUCTION.format(hurry=said).strip()]
    parts += [PARTS[kind](kept) for kind in PARTS for kept in records if kept["kind"] == kind]
    parts += [(folder / "finetuning.md").read_text().strip(), METHOD.strip()]
    return "\n\n".join(parts) + "\n"
