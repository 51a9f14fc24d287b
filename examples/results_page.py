#!/usr/bin/env python
"""
Make `docs/results.md`, and the pictures beside its records, from the raw figures in `docs/results/`.

    python examples/results_page.py            # write them
    python examples/results_page.py --check    # say whether the page is what the figures say; nothing is written
"""

import argparse
import sys
from pathlib import Path

from comparison.page import load_records, page, picture_name
from comparison.record import RESULTS
from comparison.tables import rows_of


def main(arguments: list[str] | None = None, folder: Path = RESULTS) -> int:
    """Write or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0].strip())
    parser.add_argument("--check", action="store_true", help="Compare, and write nothing.")
    options = parser.parse_args(arguments)
    target = folder.with_suffix(".md")
    made = page(folder)
    if options.check:
        if not target.exists() or target.read_text() != made:
            print(f"{target} is not what {folder} says: run python examples/results_page.py", file=sys.stderr)
            return 1
        return 0
    from comparison.picture import picture

    target.write_text(made)
    for kept in load_records(folder):
        if kept["kind"] == "comparison":
            drawn = picture(rows_of(kept["cells"], kept["setting"]["population_size"]), kept["setting"]["name"])
            (folder / picture_name(kept)).write_bytes(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
