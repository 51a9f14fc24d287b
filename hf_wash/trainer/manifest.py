"""
The manifest of a population checkpoint, `population.json`: what it must say to be believed, and whether the files beside
it are those that it names.

Whatever stands in a file, reading it ends in a manifest of the right types and sizes or in [`InvalidCheckpoint`].
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import TrainerState

from ..config import PopulationArguments
from ..soup.weights import open_member


MANIFEST = "population.json"
# Format 1 had neither a digest of itself nor the run's identity.
FORMAT, READABLE = 2, (1, 2)
TRAINER_STATE = "trainer_state.json"
# Checkpoints of the first format do not say whose they are: all of a folder are taken for one run's.
UNNAMED_RUN = "unnamed"
# Bytes. The manifest of ten thousand tensors has about one million.
_LARGEST = 1 << 26
_RUN = re.compile(r"[\w-]{1,64}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)", re.ASCII)


class InvalidCheckpoint(ValueError):
    """A checkpoint that cannot be resumed from; the message says what is wrong with it."""


# ---- Writing -------------------------------------------------------------------------------------------------------


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the format and its own digest, the SHA-256 of its canonical JSON without that."""
    manifest = {**content, "format": FORMAT}
    manifest.pop("digest", None)
    return {**manifest, "digest": _digest_of(json.dumps(manifest))}


def _digest_of(text: str) -> str:
    # Numbers as they stand in the text: of two that differ in the last digit a float may make one.
    content = json.loads(text, parse_float=str, parse_constant=str)
    content.pop("digest", None)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """A file's size in bytes and SHA-256."""
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def sync(path: Path) -> None:
    """Make sure that a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# ---- Reading -------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """
    A checkpoint's manifest.

    Raises:
        InvalidCheckpoint: if there is none, it cannot be read, is not what was written, or says what cannot be.
    """
    path = Path(folder) / MANIFEST
    if not path.parent.is_dir():
        # The Trainer's own words, too, since scripts look for them.
        raise InvalidCheckpoint(f"there is no folder `{folder}` (Can't find a valid checkpoint at {folder})")
    if not path.is_file():
        raise InvalidCheckpoint(f"`{folder}` has no {MANIFEST}: it is not a whole population checkpoint")
    try:
        if path.stat().st_size > _LARGEST:
            raise InvalidCheckpoint(f"the manifest `{path}` has {path.stat().st_size} bytes, which no manifest has")
        return _believed(path, path.read_text(encoding="utf-8"))
    except InvalidCheckpoint:
        raise
    except (ValueError, OSError) as error:
        raise InvalidCheckpoint(f"the manifest `{path}` cannot be read ({error})") from error
    except RecursionError:
        raise InvalidCheckpoint(f"the manifest `{path}` cannot be read (it is nested too deeply)") from None


def _believed(path: Path, text: str) -> dict[str, Any]:
    manifest = json.loads(text)
    if not isinstance(manifest, dict):
        raise InvalidCheckpoint(f"the manifest `{path}` is no JSON object")
    found = manifest.get("format")
    if isinstance(found, bool) or found not in READABLE:
        formats = " and ".join(map(str, READABLE))
        raise InvalidCheckpoint(f"`{path}` has format {_shown(found)}, and this version reads {formats}")
    digest = _digest_of(text)
    if manifest.get("digest", digest if found == 1 else None) != digest:
        raise InvalidCheckpoint(f"the manifest `{path}` is not what was written (its digest differs)")
    if found == 1:
        manifest.setdefault("run", UNNAMED_RUN)
    problem = _problem(manifest)
    if problem is not None:
        raise InvalidCheckpoint(f"the manifest `{path}` cannot be believed: {problem}")
    return manifest


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_list(value: Any, item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(item(each) for each in value)


def _is_tensor(value: Any) -> bool:
    """Name, shape, dtype, whether it is trained."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and _is_text(value[0])
        and _is_list(value[1], _is_whole)
        and _is_text(value[2])
        and isinstance(value[3], bool)
    )


def _is_appearance(value: Any) -> bool:
    """Of a data set; older versions did not say."""
    if value is None:
        return True
    if (
        not isinstance(value, dict)
        or not _is_whole(value.get("count"), 1)
        or not isinstance(value.get("digests"), dict)
    ):
        return False
    return all(_is_text(index) and _is_text(digest) for index, digest in value["digests"].items())


def _is_name_inside(name: Any) -> bool:
    return bool(_is_text(name) and name and not PurePosixPath(name).is_absolute())


def _is_file(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_whole(value.get("size"))
        and isinstance(value.get("sha256"), str)
        and bool(_DIGEST.fullmatch(value["sha256"]))
    )


def _is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _is_window(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_whole(value.get("since")):
        return False
    return _is_list(value.get("moved"), _is_whole) and len(value["moved"]) == 3


# What a manifest must say, and what it must be.
_MUST: dict[str, tuple[Callable[[Any], bool], str]] = {
    "run": (lambda value: isinstance(value, str) and bool(_RUN.fullmatch(value)), "the name of a run"),
    "step": (lambda value: _is_whole(value, 1), "a number of at least 1"),
    "total_steps": (lambda value: _is_whole(value, 1), "a number of at least 1"),
    "epoch": (_is_whole, "a number of at least 0"),
    "position": (_is_whole, "a number of at least 0"),
    "population_size": (lambda value: _is_whole(value, 1), "a number of at least 1"),
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a number"),
    "probability": (_is_probability, "a probability between 0 and 1"),
    "options": (lambda value: isinstance(value, dict), "a list of options"),
    "overrides": (
        lambda value: _is_list(value, lambda each: isinstance(each, dict)),
        "what members have of their own",
    ),
    "values_moved": (_is_whole, "a number of at least 0"),
    "bytes_exchanged": (_is_whole, "a number of at least 0"),
    "log_window": (_is_window, "a step and three numbers"),
    "architecture": (lambda value: _is_list(value, _is_tensor), "a list of tensors"),
    "members": (lambda value: _is_list(value, _is_whole) and value, "a list of members"),
    "files": (
        lambda value: isinstance(value, dict) and all(map(_is_file, value.values())),
        "sizes and SHA-256 of files",
    ),
}


def _problem(manifest: dict[str, Any]) -> str | None:
    """What a manifest says that cannot be, as a part of a sentence."""
    for name, (is_right, must) in _MUST.items():
        if name not in manifest:
            return f"it has no `{name}`"
        if not is_right(manifest[name]):
            return f"its `{name}` must be {must}, found {_shown(manifest[name])}"
    size, members, files = manifest["population_size"], manifest["members"], manifest["files"]
    if manifest["step"] > manifest["total_steps"]:
        return f"its `step` is {manifest['step']} of {manifest['total_steps']}"
    # Nothing is made of a size that the lists do not bear out.
    if len(manifest["overrides"]) != size:
        return f"it has a population of {size}, and lists {len(manifest['overrides'])} members' own settings"
    if len(set(members)) != len(members) or max(members) >= size or size % len(members):
        return f"it has a population of {size}, and lists the members {_shown(members)}"
    for name in files:
        if not _is_name_inside(name) or ".." in PurePosixPath(name).parts:
            return f"it names a file outside of it, {_shown(name)}"
    for name in (TRAINER_STATE, *(f"member_{index}/model.safetensors" for index in members)):
        if name not in files:
            return f"it does not list `{name}`"
    unknown = set(manifest["options"]) - set(PopulationArguments.__dataclass_fields__) - {"data_seed"}
    if unknown:
        return f"it has the option `{min(unknown)}`, which this version does not know"
    if not isinstance(manifest.get("arguments", {}), dict):
        return f"its `arguments` must be a list of options, found {_shown(manifest['arguments'])}"
    if not _is_appearance(manifest.get("training_data")):
        return (
            f"its `training_data` must be a number of examples and digests, found {_shown(manifest['training_data'])}"
        )
    return None


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def verify(folder: str | Path) -> dict[str, Any]:
    """
    Check a checkpoint's files against its manifest, size and SHA-256.

    Returns:
        `dict`: The manifest.

    Raises:
        InvalidCheckpoint: naming the first file that is missing, cannot be read or differs.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        for name, record in manifest["files"].items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise InvalidCheckpoint(f"the manifest of `{folder}` names a file outside of it, `{name}`")
            if not path.is_file():
                raise InvalidCheckpoint(f"`{path}` is missing")
            if path.stat().st_size != record["size"]:
                raise InvalidCheckpoint(f"`{path}` has {path.stat().st_size} bytes instead of {record['size']}")
        with ThreadPoolExecutor(max_workers=4) as threads:
            digests = threads.map(_sha256, (folder / name for name in manifest["files"]))
            for (name, record), digest in zip(manifest["files"].items(), digests, strict=True):
                if digest != record["sha256"]:
                    raise InvalidCheckpoint(f"`{folder / name}` is not what was written (its SHA-256 differs)")
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("global_step") != manifest["step"]:
            raise InvalidCheckpoint(f"`{folder / TRAINER_STATE}` is not that of step {manifest['step']}")
        whole = TrainerState(**state)
        if not isinstance(whole.log_history, list) or not isinstance(whole.stateful_callbacks, dict):
            raise InvalidCheckpoint(f"`{folder / TRAINER_STATE}` is no state of a Trainer")
    except InvalidCheckpoint:
        raise
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        # RuntimeError: a link to itself, or JSON nested too deeply; TypeError: what no Trainer's state has
        raise InvalidCheckpoint(f"`{folder}` cannot be read ({error})") from error
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_finite(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """
    Check that no member of a checkpoint has diverged. A manifest that says so is believed; those of older versions do
    not, and their members' weights are read.

    Raises:
        InvalidCheckpoint: naming the first member that holds NaN or infinite values, and a tensor of it.
    """
    if manifest.get("finite") is True:
        return
    for name in sorted(manifest["files"]):
        match = re.fullmatch(r"member_(\d+)/model\.safetensors", name)
        bad = open_member(Path(folder) / name, int(match[1])).first_not_finite() if match else None
        if match and bad is not None:
            raise InvalidCheckpoint(f"`{folder}` holds NaN or infinite values in `{bad}` of member {match[1]}")


# ---- The checkpoints of a folder -----------------------------------------------------------------------------------


def find_checkpoints(run_folder: str | Path) -> list[tuple[int, Path]]:
    """The folders of checkpoints with their steps, the newest first, whether they are whole or not."""
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        return []
    matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in run_folder.iterdir() if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def newest_complete(run_folder: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """
    The newest checkpoint of a run that is whole and whose members are finite.

    Args:
        run_folder (`str` or `Path`): The run's output folder.

    Returns:
        `tuple`: The checkpoint, `None` if there is none, and the newer ones that were skipped, each with the reason.
    """
    skipped = []
    for _, path in find_checkpoints(run_folder):
        try:
            check_finite(path, verify(path))
            return path, skipped
        except InvalidCheckpoint as error:
            skipped.append((path, str(error)))
    return None, skipped


def runs_in(run_folder: str | Path) -> dict[str, list[Path]]:
    """The checkpoints of a folder by the run that wrote them, the newest first, as far as their manifests tell."""
    runs: dict[str, list[Path]] = {}
    for _, path in find_checkpoints(run_folder):
        try:
            runs.setdefault(read_manifest(path)["run"], []).append(path)
        except InvalidCheckpoint:
            continue
    return runs
