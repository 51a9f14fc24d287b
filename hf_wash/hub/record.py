"""
What a folder says about its run: `wash_run.json` and other small files of JSON, and where model and data come from.

Needs neither torch nor transformers.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, metadata_load

from ..files import is_file, write_whole
from ..sentences import shortened


# What a program can read about a run: the card's own source, written beside it by the Trainer and by `hf-wash soup`.
RUN_RECORD = "wash_run.json"
RECORD_FORMAT = 1
# Where the members are: in the folder of a run, whose uploads leave out what begins with `_`, and in a repository.
LOCAL_MEMBERS, PUSHED_MEMBERS = "_members", "members"
_TOO_LARGE = 2**1023
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


# What the files of a folder hold, as far as anybody here reads it: an object with these fields, a list of such, or one
# of these types. Anything may be missing or null.
_NUMBER, _NAMES = (int, float), (str, [str])
_RECORD = {
    "model": {"class": str, **dict.fromkeys(("parameters", "trainable_parameters", "trainable_bytes"), int)},
    "population": {"size": int, "member_data": str, "overrides": [{}]},
    "mixing": {
        "method": str,
        "shuffle_schedule": str,
        **dict.fromkeys(("shuffle_probability", "shuffle_interval", "shuffle_start", "shuffle_stop"), _NUMBER),
        **dict.fromkeys(("average_interval", "average_first", "average_last", "average_epoch"), int),
        "average_rate": _NUMBER,
    },
    "exchange": {"bytes_exchanged": int, "values_moved": int},
    "soup": {"method": str, "batch_norm": str, "ingredients": [str], "chosen": [int], "scores": [_NUMBER]}
    | {"left_out": [int]},
    "training": {
        **dict.fromkeys(("steps", "seed", "data_seed", "batch_size", "gradient_accumulation_steps"), int),
        **dict.fromkeys(("epochs", "learning_rate", "warmup_steps", "weight_decay"), _NUMBER),
        **dict.fromkeys(("label_smoothing_factor", "max_grad_norm"), _NUMBER),
        **dict.fromkeys(("optimizer", "lr_scheduler", "precision"), str),
    },
    "data": {"train_samples": int, "eval_samples": int},
    "hardware": {"text": str},
    "versions": {},
    "replay": {"command": str, "checkpoints": [str]},
    "card": {
        **dict.fromkeys(("model_name", "license"), str),
        **dict.fromkeys(("language", "tags", "finetuned_from", "tasks", "dataset", "dataset_tags"), _NAMES),
    },
}
_CONFIG = {
    **dict.fromkeys(("architecture", "model_type", "global_pool"), str),
    "architectures": [str],
    "label_names": [str],
    "id2label": {},
    "pretrained_cfg": {},
    "model_args": {},
}
_ADAPTER_CONFIG = {"peft_type": str, "task_type": str, "base_model_name_or_path": str, "auto_mapping": {}}
_STATE = {"log_history": [{}]}


def read_record(folder: str | Path) -> dict[str, Any]:
    """A folder's `wash_run.json`; empty if it has none. A `ValueError` if it is none, naming what is wrong in it."""
    path = Path(folder) / RUN_RECORD
    record = _read(path, _RECORD)
    size = record.get("population", {}).get("size")
    if size is not None and size < 1:
        raise ValueError(f"{path} has a population.size of {size}, and a population has at least one member.")
    return record


def read_config(path: str | Path) -> dict[str, Any]:
    """A model's configuration, as [`read_record`] reads a record."""
    config = _read(path, _CONFIG)
    for key, name in config.get("id2label", {}).items():
        if not re.fullmatch(r"\d{1,9}", key, re.ASCII) or not isinstance(name, str):
            raise ValueError(
                f"{path} has an entry {shortened({key: name})} in id2label, where a number and a name are expected."
            )
    return config


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """An adapter's configuration, as [`read_record`] reads a record; empty where there is no adapter."""
    return _read(Path(folder) / "adapter_config.json", _ADAPTER_CONFIG)


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """What a run has logged, from `trainer_state.json`, as [`read_record`] reads a record."""
    return _read(Path(folder) / "trainer_state.json", _STATE).get("log_history", [])


def write_record(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Writes `wash_run.json`, whole or not at all."""
    text = json.dumps({"format": RECORD_FORMAT, **record}, indent=2, ensure_ascii=False) + "\n"
    write_whole(Path(folder) / RUN_RECORD, text.encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file. A `ValueError` that names the file if it holds no object."""
    path = Path(path)
    if not is_file(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object is expected.")
    return content


def _read(path: str | Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    """A file's JSON object without what is null, if its known fields are of their shape."""
    content = read_json(path)
    wrong = next(_misshapen(content, shape), None)
    if wrong is not None:
        name, value = wrong
        raise ValueError(f"{path} has {shortened(value)} as {name}, where something else is expected.")
    return {name: value for name, value in content.items() if value is not None or name not in shape}


def _misshapen(value: Any, shape: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The names and values of what is not of its shape."""
    if isinstance(shape, tuple):
        if value is not None and all(any(_misshapen(value, each, "it")) for each in shape):
            yield name, value
    elif isinstance(shape, list):
        if isinstance(value, list):
            for each in value:
                yield from [(name, each)] if each is None else _misshapen(each, shape[0], name)
        elif value is not None:
            yield name, value
    elif isinstance(shape, Mapping):
        if isinstance(value, Mapping):
            for key, inner in shape.items():
                yield from _misshapen(value.get(key), inner, f"{name}.{key}".lstrip("."))
        elif value is not None:
            yield name, value
    elif value is not None and (not isinstance(value, shape) or (shape is not str and not is_number(value))):
        yield name, value


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
            readme = Path(base_model) / "README.md"
            card: Any = metadata_load(readme) if is_file(readme) else None
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
    files = [file for file in folder.glob("*.safetensors") if is_file(file)]
    try:
        # Newer than huggingface_hub 1.0, hence inside; every transformers we take asks for a version that has it. File
        # by file, since it takes no folder of an adapter.
        from huggingface_hub import get_local_safetensors_metadata

        headers = [get_local_safetensors_metadata(file) for file in files]
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
    """Whether a value of JSON is a number; a whole one that no float can hold is none."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _TOO_LARGE
    return whole or isinstance(value, float)
