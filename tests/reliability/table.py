"""
Tries every situation and writes docs/reliability.md's table and docs/reliability.csv.

`python tests/reliability/table.py [--only TEXT] [--fast] [--write] [--results FILE]`
"""

import argparse
import csv
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


ROOT = Path(__file__).parent.parent.parent
# As a package, whose `options` is not in anybody's way.
sys.path[:] = [str(ROOT / "tests"), *(path for path in sys.path if path != str(Path(__file__).parent))]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from reliability.everything import SITUATIONS  # noqa: E402
from reliability.harness import OUTCOMES, Server  # noqa: E402


PAGE, LISTING = ROOT / "docs" / "reliability.md", ROOT / "docs" / "reliability.csv"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
FELL_SHORT = "fell short"


def table(outcomes: dict[str, str]) -> str:
    """The table of a run, in Markdown: a row for each kind, a column for each outcome."""
    kinds = dict.fromkeys(situation.kind for situation in SITUATIONS)
    counts = Counter((situation.kind, outcomes[situation.id]) for situation in SITUATIONS)
    columns = [*OUTCOMES, *([FELL_SHORT] if FELL_SHORT in outcomes.values() else [])]
    rows = [["situations", "tried", *columns], ["---", *["---:"] * (len(columns) + 1)]]
    for kind in kinds:
        numbers = [counts[kind, column] for column in columns]
        rows.append([kind, str(sum(numbers)), *(str(number or "") for number in numbers)])
    totals = [sum(counts[kind, column] for kind in kinds) for column in columns]
    rows.append(["**all**", f"**{sum(totals)}**", *(f"**{total}**" for total in totals)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def listing(outcomes: dict[str, str]) -> list[list[str]]:
    """A row for each situation."""
    return [
        [situation.kind, situation.name, str(situation.processes), outcomes[situation.id]] for situation in SITUATIONS
    ]


def expected() -> dict[str, str]:
    """What each situation shall get."""
    return {situation.id: situation.outcome for situation in SITUATIONS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="A regular expression that a situation's kind and name must match.")
    parser.add_argument("--fast", action="store_true", help="Leave out the slow ones.")
    parser.add_argument("--write", action="store_true", help="Write the table; of all situations, whatever is chosen.")
    parser.add_argument(
        "--results", type=Path, help="A file of results: those in it are not tried again unless they fell short."
    )
    parser.add_argument("--whole", action="store_true", help="Show all that was printed where something fell short.")
    given = parser.parse_args()
    chosen = SITUATIONS if given.write else [s for s in SITUATIONS if re.search(given.only, s.id)]
    known = json.loads(given.results.read_text()) if given.results is not None and given.results.is_file() else {}
    outcomes = {s.id: s.outcome for s in SITUATIONS if known.get(s.id) == s.outcome}
    times: dict[str, float] = {}
    began = time.monotonic()
    with Server() as server, tempfile.TemporaryDirectory(prefix="reliability-") as root:
        for number, situation in enumerate(chosen):
            if situation.id in outcomes or (given.fast and situation.slow):
                continue
            answer = server.attempt(situation.id, Path(root) / str(number))
            outcomes[situation.id] = FELL_SHORT if answer["short"] else situation.outcome
            times[situation.id] = answer["seconds"]
            if answer["short"]:
                print(f"--- {situation.id}")
                for text in answer["short"]:
                    print(text if given.whole else text.splitlines()[0][:600])
                sys.stdout.flush()
            if given.results is not None:
                given.results.write_text(json.dumps(outcomes, indent=0))
    wrong = sum(outcome == FELL_SHORT for outcome in outcomes.values())
    slowest = ", ".join(f"{name} {times[name]:.1f} s" for name in sorted(times, key=lambda name: -times[name])[:8])
    print(f"{len(times)} situations in {time.monotonic() - began:.0f} s, {wrong} fell short; slowest: {slowest}")
    if given.write:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n{END}{after}", encoding="utf-8")
        with LISTING.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [["kind", "situation", "processes", "what it gets"], *listing(outcomes)]
            )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
