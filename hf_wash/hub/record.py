"""
What a folder says about its run: `wash_run.json` and other small files of JSON, and where model and data come from.

Needs neither torch nor transformers.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, metadata_load


# What a program can read about a run: the card's own source, written beside it by the Trainer and by `hf-wash soup`.
RUN_RECORD = "wash_run.json"
RECORD_FORMAT = 1
# Where the members are: in the folder of a run, whose uploads leave out what begins with `_`, and in a repository.
LOCAL_MEMBERS, PUSHED_MEMBERS = "_members", "members"
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


def read_json(path: str | Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file. A `ValueError` that names the file if it holds no object."""
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object is expected.")
    return content


def last_evaluation(log_history: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of the last evaluation in a run's log."""
    for entry in reversed(log_history):
        metrics = {key: value for key, value in entry.items() if key.startswith("eval_")}
        if metrics:
            return metrics
    return {}


def inherited_license(base_model: str | None, timeout: float = 10.0) -> str | None:
    """
    The license of the model that another one was made from: a folder, whose card is read, or a repository of the Hub,
    which is asked for `timeout` seconds. `None` where that does not tell.
    """
    try:
        if base_model and Path(base_model).exists():
            card: Any = metadata_load(Path(base_model) / "README.md")
        elif hub_ids(base_model):
            card = HfApi().model_info(str(base_model), timeout=timeout).card_data
        else:
            return None
        found = (card or {}).get("license")
    except Exception:  # no card, a broken one, no network, no such repository, not for us: a card can do without
        return None
    return found if isinstance(found, str) else None


def dataset_repositories(*datasets: Any) -> list[str]:
    """The repositories of the Hub that data sets of the `datasets` library were loaded from."""
    infos = (getattr(getattr(dataset, "info", None), "download_checksums", None) or {} for dataset in datasets)
    found = [re.match(r"hf://datasets/([^/]+/[^/@]+)@", str(url)) for urls in infos for url in urls]
    return list(dict.fromkeys(match.group(1) for match in found if match))


def count_values(folder: Path) -> int | None:
    """Number of values in a folder's weight files, from their headers."""
    try:
        # Newer than huggingface_hub 1.0, hence inside; every transformers we take asks for a version that has it. File
        # by file, since it takes no folder of an adapter.
        from huggingface_hub import get_local_safetensors_metadata

        headers = [get_local_safetensors_metadata(file) for file in folder.glob("*.safetensors")]
    except Exception:  # a file that is not what its name says is for others to complain about
        return None
    return sum(count for header in headers for count in header.parameter_count.values()) or None


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
