"""
What a folder says about its run: `wash_run.json` and other small files of JSON, and where model and data come from.

Needs neither torch nor transformers.
"""

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .card_merge import CARD, front_matter


# What a program can read about a run: the card's own source, written beside it by the Trainer and by `hf-wash soup`.
RUN_RECORD = "wash_run.json"
RECORD_FORMAT = 1
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_record(folder: str | Path) -> dict[str, Any]:
    """A folder's `wash_run.json`; empty if it has none."""
    return read_json(Path(folder) / RUN_RECORD)


def write_record(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Writes `wash_run.json`, whole or not at all."""
    path = Path(folder) / RUN_RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"_{RUN_RECORD}.{os.getpid()}")
    staged.write_text(json.dumps({"format": RECORD_FORMAT, **record}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(staged, path)


def last_evaluation(log_history: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of the last evaluation in a run's log."""
    for entry in reversed(log_history):
        metrics = {key: value for key, value in entry.items() if key.startswith("eval_")}
        if metrics:
            return metrics
    return {}


def inherited_license(base_model: str | None, timeout: float = 10.0) -> str | None:
    """
    The license of the model that another one was made from.

    Args:
        base_model (`str`, *optional*):
            A folder, whose card is read, or a repository of the Hub, which is asked.
        timeout (`float`, *optional*, defaults to 10.0):
            Seconds to wait for the Hub. Whatever goes wrong there, the license is not known then.
    """
    if not base_model:
        return None
    if Path(base_model).exists():
        card = Path(base_model) / CARD
        found = front_matter(card).get("license") if card.is_file() else None
        return found if isinstance(found, str) else None
    if not hub_ids(base_model):
        return None
    from huggingface_hub import HfApi

    try:
        data = HfApi().model_info(base_model, timeout=timeout).card_data
        found = data.get("license") if data is not None else None
    except Exception:  # no network, no such repository, not for us: a card can do without
        return None
    return found if isinstance(found, str) else None


def dataset_repositories(*datasets: Any) -> list[str]:
    """The repositories of the Hub that data sets of the `datasets` library were loaded from."""
    found = []
    for dataset in datasets:
        checksums = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
        found += [
            match.group(1) for url in checksums if (match := re.match(r"hf://datasets/([^/]+/[^/@]+)@", str(url)))
        ]
    return list(dict.fromkeys(found))


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file. A `ValueError` if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object is expected.")
    return content


def count_values(folder: Path) -> int | None:
    """Number of values in a folder's weight files, from their headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            with open(file, "rb") as content:
                length = struct.unpack("<Q", content.read(8))[0]
                header = json.loads(content.read(min(length, 100_000_000)))
        except (OSError, ValueError, struct.error):
            return None
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for dimension in tensor["shape"]:
                    count *= dimension
                total += count
    return total or None


def as_list(value: Any) -> list:
    """A value or a list of them, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def hub_ids(names: Any) -> list[str]:
    """Those of one or more names that look like repositories of the Hub, and are no paths of this machine."""
    return [name for name in as_list(names) if REPO_ID.fullmatch(name) and not Path(name).exists()]


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
