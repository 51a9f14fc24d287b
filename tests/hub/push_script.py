"""Pushes folders to the Hub that HF_ENDPOINT names, well and badly, and prints as JSON what came of it."""

import json
import logging
import sys
import time
from pathlib import Path

import huggingface_hub.utils._http as http

from hf_wash.hub.push import PushError, push_folder


class _NoWaiting:
    """The client waits longer and longer between its attempts; here every wait is short."""

    def __getattr__(self, name):
        return getattr(time, name)

    @staticmethod
    def sleep(seconds):
        time.sleep(min(seconds, 0.01))


def snapshot(folder: Path) -> dict[str, tuple]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def main(plan: Path) -> None:
    http.time = _NoWaiting()
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("hf_wash").addHandler(handler)
    outcomes = {}
    for name, (folder, repo_id, options) in json.loads(plan.read_text()).items():
        before = snapshot(Path(folder))
        warnings.clear()
        try:
            commit = push_folder(folder, repo_id, **options)
            commit = commit.result(timeout=60) if options.get("blocking") is False else commit
            outcomes[name] = {"commit": commit.oid}
        except (PushError, ValueError) as error:
            outcomes[name] = {"error": str(error), "type": type(error).__name__}
        outcomes[name] |= {"untouched": snapshot(Path(folder)) == before, "warnings": list(warnings)}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
