"""
Population checkpoints: written so that a folder named `checkpoint-<step>` is always whole, and read back on any number
of processes.

A checkpoint is staged under another name, its manifest (`manifest`, with the size and SHA-256 of every file) is written
last, and a rename makes it appear. Nothing that is loaded can run code: weights are safetensors, optimizer
states are read with torch's `weights_only`, random streams are JSON.
"""

import base64
import contextlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..population import Population, RandomStreams, grow_buffers
from ..soup.weights import open_member
from .manifest import (
    MANIFEST,
    InvalidCheckpoint,
    check_finite,
    file_record,
    newest_complete,
    read_manifest,
    runs_in,
    seal,
    sync,
    verify,
)


logger = logging.getLogger(__name__)

MEMBER_WEIGHTS, OPTIMIZER, STREAMS, FROZEN = "model.safetensors", "optimizer.pt", "streams.json", "frozen.safetensors"
# What a method of exchange keeps beside the members, if it does.
MIXER = "mixer.pt"
# Names that neither Trainer's rotation (`checkpoint-*`) nor an upload (which ignores `_*`) takes for a checkpoint.
STAGING_PREFIX, REPLACED_PREFIX = "_incomplete-", "_replaced-"


# ---- Writing -------------------------------------------------------------------------------------------------------


def staging_folder(folder: str | Path) -> Path:
    """Where the checkpoint `folder` is written before it appears."""
    folder = Path(folder)
    return folder.with_name(STAGING_PREFIX + folder.name)


class _Records:
    """
    [`file_record`] of files, made in threads while the next ones are written: neither hashing nor syncing needs Python, and
    the processor hashes while the disk is waited for.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._threads = ThreadPoolExecutor(max_workers=4)
        self._records: dict[str, tuple[Future, Future]] = {}

    def add(self, path: Path) -> None:
        hashed, synced = self._threads.submit(file_record, path), self._threads.submit(sync, path)
        self._records[path.relative_to(self._folder).as_posix()] = hashed, synced

    def __enter__(self) -> "_Records":
        return self

    def __exit__(self, *failure: object) -> None:
        # No thread may hold a file of what is about to be removed.
        self._threads.shutdown(cancel_futures=True)

    def collect(self) -> dict[str, dict[str, Any]]:
        """The records by the files' paths inside the folder, once all files are on the disk."""
        for _, synced in self._records.values():
            synced.result()
        return {name: hashed.result() for name, (hashed, _) in sorted(self._records.items())}


def write(
    population: Population,
    folder: Path,
    *,
    node: int,
    leads: bool,
    write_soup: Callable[[Path], dict[str, torch.Tensor]],
    member_part: Callable[[int, int], tuple[dict[str, torch.Tensor], Mapping[str, Any] | None, Any]],
    describe: Callable[[], dict[str, Any]],
) -> None:
    """
    *Collective.* Write a whole population checkpoint, or none.

    Args:
        population ([`Population`]): The members.
        folder (`Path`): The checkpoint's name.
        node (`int`): The machine whose folder this process writes to.
        leads (`bool`): Whether this process writes what is not a member's; one does for each folder.
        write_soup (`Callable`): Writes that into the staged checkpoint; returns what all members share, by name.
        member_part (`Callable`): From a member's place in this process and its index: its tensors and, to resume from, its part of the training's state and its random streams; else `None` twice.
        describe (`Callable`): Returns the manifest, without members and files.

    Raises:
        RuntimeError: on every process, if anything failed on any. Nothing is left of it.
    """
    staging, what = staging_folder(folder), f"Writing `{folder}`"

    def clean_up() -> None:
        if leads:
            shutil.rmtree(staging, ignore_errors=True)

    def begin() -> None:
        for path in (folder, staging):
            if leads and path.exists() and not path.is_dir():
                raise FileExistsError(f"`{path}` is there already, and no folder")
        if leads:
            clean_up()
            staging.mkdir(parents=True)

    def write_parts() -> tuple[int, list[int], dict]:
        with _Records(staging) as records:
            if leads:
                shared = write_soup(staging)
                if shared:
                    save_file(shared, staging / FROZEN, metadata={"format": "pt"})
                # Other processes write their members meanwhile.
                for path in staging.rglob("*"):
                    if path.is_file() and not _is_of_a_member(path, staging):
                        records.add(path)
            for slot, index in enumerate(population.indices):
                write_member(staging / f"member_{index}", *member_part(slot, index), written=records.add)
            return node, list(population.indices), records.collect()

    population.do_together(what, begin, clean_up)
    written = population.do_together(what, write_parts, clean_up)
    here = [(members, records) for where, members, records in written if where == node]

    def appear() -> None:
        if leads:
            manifest = describe()
            manifest["members"] = sorted(index for members, _ in here for index in members)
            manifest["files"] = {name: record for _, records in here for name, record in sorted(records.items())}
            publish(staging, folder, manifest)

    population.do_together(what, appear, clean_up)


def _is_of_a_member(path: Path, staging: Path) -> bool:
    return path.relative_to(staging).parts[0].startswith("member_")


def publish(staging: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """
    Make a staged checkpoint appear: the manifest, then the folder under its name.

    Args:
        staging (`Path`): Where everything has been written.
        folder (`Path`): The name it gets. A checkpoint of that name is replaced.
        manifest (`Mapping`): What the checkpoint holds, `files` among it.
    """
    with open(staging / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(seal(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    replaced = folder.with_name(REPLACED_PREFIX + folder.name)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(staging, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def own_tensors(model: nn.Module, shared: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """
    A member's tensors as they are written: parameters and persistent buffers by name, tied ones once.

    Args:
        model (`nn.Module`): The member.
        shared (`Iterable[str]`, *optional*): Names to leave out.
    """
    left_out = set(shared)
    return {
        name: tensor.detach().contiguous().cpu()
        for name, tensor in _written_tensors(model).items()
        if name not in left_out
    }


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Without torch's own checksum, which takes as long as the writing: the manifest has a better one."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _save_state(state: Mapping[str, Any], path: Path) -> None:
    try:
        with _without_crc32():
            torch.save(dict(state), path)
    except RuntimeError as error:  # torch does not say why it could not write (2.14)
        raise OSError(f"`{path}` could not be written, for want of space or for a broken disk ({error})") from error


def write_mixer(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what a method of exchange keeps beside the members into a staged checkpoint, if that is anything."""
    if state:
        _save_state(state, folder / MIXER)


def write_member(
    folder: Path,
    weights: dict[str, torch.Tensor],
    training: Mapping[str, Any] | None,
    streams: Any = None,
    written: Callable[[Path], None] = lambda path: None,
) -> None:
    """
    Write one member's part of a checkpoint.

    Args:
        folder (`Path`): `member_<i>/` of the staged checkpoint.
        weights (`dict[str, torch.Tensor]`): From [`own_tensors`].
        training (`Mapping`, *optional*): Optimizer, scheduler and scaler states: tensors, numbers and containers.
        streams (*optional*): Random states, from [`encode_streams`].
        written (`Callable`, *optional*): Called with each file when it is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The largest first: what is done with it takes longest.
    if training is not None:
        _save_state(training, folder / OPTIMIZER)
        written(folder / OPTIMIZER)
        (folder / STREAMS).write_text(json.dumps(streams), encoding="utf-8")
        written(folder / STREAMS)
    save_file(weights, folder / MEMBER_WEIGHTS, metadata={"format": "pt"})
    written(folder / MEMBER_WEIGHTS)


# ---- Reading -------------------------------------------------------------------------------------------------------


def resolve(
    population: Population, run_folder: str | Path, requested: str | Path | bool, leads: bool
) -> tuple[str, dict[str, Any]] | None:
    """
    *Collective.* Find the checkpoint to resume from, and check it.

    Args:
        population ([`Population`]): The members.
        run_folder (`str` or `Path`): The run's output folder.
        requested (`str`, `Path` or `bool`): A checkpoint; `True` for the newest whole one of the run; `"auto"` for the
            same, or a fresh start if there is none.
        leads (`bool`): Whether this process looks at the files; one does for each folder.

    Returns:
        `tuple[str, dict]`: The checkpoint and its manifest, the same on every process; `None` for a fresh start.

    Raises:
        InvalidCheckpoint: on every process, if what was asked for is not whole, or the folder holds checkpoints of
            several runs and none was named.
        ValueError: on every process, if there is none.
    """
    search = requested is True or requested == "auto"

    def look() -> tuple[tuple[str, str] | None, list[str]]:
        if not leads:
            return None, []
        if not search:
            manifest = verify(str(requested))
            check_finite(str(requested), manifest)
            return (Path(str(requested)).name, manifest["run"]), []
        found, skipped = newest_complete(run_folder)
        if found is None:
            return None, [reason for _, reason in skipped]
        _refuse_several_runs(run_folder)
        return (found.name, read_manifest(found)["run"]), [reason for _, reason in skipped]

    outcomes = checked(population, look)
    found, skipped = outcomes[0]
    if any(other not in (None, found) for other, _ in outcomes):
        held = ", ".join(f"{other[0]} of run {other[1][:8]}" if other else "none" for other, _ in outcomes)
        raise ValueError(
            f"The machines hold different newest checkpoints ({held}): remove what is not on all of them."
        )
    for reason in skipped if population.rank == 0 else ():
        logger.warning(f"A checkpoint is skipped: {reason}.")
    if found is None:
        if requested == "auto":
            return None
        raise ValueError(
            f"No complete checkpoint was found in `{run_folder}` (No valid checkpoint found in output directory)."
        )
    folder = os.path.join(run_folder, found[0]) if search else str(requested)
    return folder, checked(population, lambda: read_manifest(folder))[population.rank]


def _refuse_several_runs(run_folder: str | Path) -> None:
    runs = runs_in(run_folder)
    if len(runs) < 2:
        return
    listing = ", ".join(f"run {run[:8]} up to `{found[0].name}`" for run, found in runs.items())
    raise InvalidCheckpoint(
        f"`{run_folder}` holds checkpoints of {len(runs)} runs ({listing}): name the checkpoint to go on from"
    )


def checked(population: Population, work: Callable[[], Any]) -> list:
    """
    *Collective.* As `do_together`, for what is wrong with a checkpoint.

    Raises:
        InvalidCheckpoint: the same on every process.
    """
    result, problem = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        problem = str(error).rstrip(".")
    outcomes = population.gather_processes((result, problem))
    for rank, (_, text) in enumerate(outcomes):
        if text is not None:
            # Process 0 speaks for all: it is the one that looks for a checkpoint.
            raise InvalidCheckpoint(f"Cannot resume: {f'process {rank}: ' if rank else ''}{text}.")
    return [value for value, _ in outcomes]


def as_architecture(listing: list) -> list[tuple]:
    """An architecture that has been through JSON."""
    return [(name, tuple(shape), dtype, trained) for name, shape, dtype, trained in listing]


def _written_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    names = set(model.state_dict())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name in names}


def check_weights(member: nn.Module, paths: Sequence[Path]) -> None:
    """
    Check that files hold a member's tensors, all of them and no others, of their shapes and dtypes. No value is read.

    Raises:
        InvalidCheckpoint: naming the first tensor that is wrong. A buffer may have another shape: some grow.
    """
    own, buffers = _written_tensors(member), {name for name, _ in member.named_buffers()}
    found: set[str] = set()
    for path in paths:
        try:
            specs = open_member(path, 0).specs
        except ValueError as error:
            raise InvalidCheckpoint(str(error).rstrip(".")) from error
        for name, (shape, dtype) in specs.items():
            if name not in own:
                raise InvalidCheckpoint(f"`{path}` holds `{name}`, which the model has not")
            for what, theirs, ours in (("shape", shape, tuple(own[name].shape)), ("dtype", dtype, own[name].dtype)):
                if theirs != ours and not (what == "shape" and name in buffers):
                    raise InvalidCheckpoint(f"`{path}` holds `{name}` of {what} {theirs}, the model's is {ours}")
        found |= specs.keys()
    missing = sorted(own.keys() - found)
    if missing:
        raise InvalidCheckpoint(f"`{paths[0]}` lacks `{missing[0]}`")


def read_weights(member: nn.Module, *paths: Path) -> None:
    """
    Load what [`own_tensors`] gave into a member, in place.

    Raises:
        InvalidCheckpoint: as [`check_weights`], before anything has been changed.
    """
    check_weights(member, paths)
    for path in paths:
        tensors = load_file(path)
        grow_buffers(member, tensors)
        own = _written_tensors(member)
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value)


def _load_state(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own would have it read again with any code that is in it
        refused = isinstance(error, pickle.UnpicklingError)
        what = "what is no tensor, number or container of these" if refused else "no state of an optimizer"
        raise InvalidCheckpoint(f"`{path}` holds {what}, so it is not read: it may run code") from None


def read_mixer(folder: Path) -> Any:
    """
    What [`write_mixer`] has written; `None` if there was nothing to write.

    Raises:
        InvalidCheckpoint: if the file holds something else than tensors, numbers and containers of these.
    """
    return _load_state(folder / MIXER) if (folder / MIXER).is_file() else None


def read_training(folder: Path, streams: RandomStreams) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    A member's optimizer, scheduler and scaler states, and its random streams.

    Args:
        folder (`Path`): `member_<i>/` of a checkpoint.
        streams ([`RandomStreams`]): Those that are to take the streams.

    Raises:
        InvalidCheckpoint: if the checkpoint was written with `save_only_model`, or its files hold something else.
    """
    path = folder / OPTIMIZER
    if not path.is_file():
        raise InvalidCheckpoint(f"`{folder}` has weights only (`save_only_model`), so training cannot go on from it")
    training = _load_state(path)
    must = {"groups": list, "state": dict, "scheduler": dict, "loss": float}
    if not isinstance(training, dict) or not all(isinstance(training.get(name), kind) for name, kind in must.items()):
        raise InvalidCheckpoint(f"`{path}` holds no state of an optimizer")
    try:
        decoded = decode_streams(json.loads((folder / STREAMS).read_text(encoding="utf-8")))
        loader = decoded["loader"]
        for state in (decoded["streams"], loader["epoch_start"], loader["before_upcoming"]):
            if state is not None:
                streams.check(state)
        if decoded["streams"] is None or loader["epoch_start"] is None:
            raise ValueError("they are missing")
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InvalidCheckpoint(f"`{folder / STREAMS}` holds no random streams ({error})") from error
    return training, decoded


# ---- States of a member among others' ------------------------------------------------------------------------------


def cut_out(optimizer, scheduler, member: nn.Module, index: int) -> dict[str, Any]:
    """
    One member's part of the process's optimizer and scheduler.

    Args:
        optimizer (`torch.optim.Optimizer`): Of all local members; its groups carry `member`.
        scheduler: The learning-rate scheduler.
        member (`nn.Module`): The member.
        index (`int`): Its index in the population.

    Returns:
        `dict`: `groups` (their options, with the names of their parameters), `state` (by parameter name) and
        `scheduler` (lists of one entry for each group cut to the member's groups).
    """
    names = {parameter: name for name, parameter in member.named_parameters()}
    own = [position for position, group in enumerate(optimizer.param_groups) if group["member"] == index]
    groups, state = [], {}
    for position in own:
        group = optimizer.param_groups[position]
        groups.append(
            {**{k: v for k, v in group.items() if k != "params"}, "names": [names[p] for p in group["params"]]}
        )
        state |= {names[p]: dict(optimizer.state[p]) for p in group["params"] if p in optimizer.state}
    count = len(optimizer.param_groups)
    schedule = {
        name: [value[position] for position in own] if _one_for_each_group(value, count) else value
        for name, value in scheduler.state_dict().items()
    }
    return {"groups": groups, "state": state, "scheduler": schedule}


def _one_for_each_group(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count


def put_together(optimizer, scheduler, members: Mapping[int, nn.Module], parts: Mapping[int, dict[str, Any]]) -> None:
    """
    The reverse of [`cut_out`], for any set of local members.

    Args:
        optimizer (`torch.optim.Optimizer`): With groups for exactly these members.
        scheduler: The learning-rate scheduler.
        members (`Mapping[int, nn.Module]`): The local members by index.
        parts (`Mapping[int, dict]`): What was cut out of each.

    Raises:
        InvalidCheckpoint: if a member's parameter groups are not those that were saved, or nothing that these take.
    """
    try:
        _put_together(optimizer, scheduler, members, parts)
    except InvalidCheckpoint:
        raise
    except Exception as error:  # whatever torch makes of another optimizer's state
        raise InvalidCheckpoint(
            f"the state of the optimizer or of the learning rates is none that this run's take ({error!r})"
        ) from error


def _put_together(optimizer, scheduler, members: Mapping[int, nn.Module], parts: Mapping[int, dict[str, Any]]) -> None:
    packed = optimizer.state_dict()
    packed["state"] = {}
    remaining = {index: iter(part["groups"]) for index, part in parts.items()}
    names = {p: (index, name) for index, member in members.items() for name, p in member.named_parameters()}
    for group, packed_group in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        index = group["member"]
        saved = next(remaining[index], None)
        own_names = [names[p][1] for p in group["params"]]
        if saved is None or saved["names"] != own_names:
            raise InvalidCheckpoint(f"the optimizer of member {index} groups its parameters in another way")
        foreign = sorted(set(saved) - set(group) - {"names"})
        if foreign:
            raise InvalidCheckpoint(
                f"the optimizer of member {index} was of another kind (`optim`): this run's has no `{foreign[0]}`"
            )
        packed_group.update({name: value for name, value in saved.items() if name != "names"})
        for name, number in zip(own_names, packed_group["params"], strict=True):
            if name in parts[index]["state"]:
                packed["state"][number] = parts[index]["state"][name]
    optimizer.load_state_dict(packed)

    order = [group["member"] for group in optimizer.param_groups]
    first = parts[order[0]]["scheduler"]
    merged = {}
    for name, value in first.items():
        if _one_for_each_group(value, len(parts[order[0]]["groups"])):
            entries = {index: iter(part["scheduler"][name]) for index, part in parts.items()}
            merged[name] = [next(entries[index]) for index in order]
        else:
            merged[name] = value
    scheduler.load_state_dict(merged)


# ---- Random streams ------------------------------------------------------------------------------------------------


def encode_streams(value: Any) -> Any:
    """Random states as JSON: tensors and arrays become base64 of their bytes with shape and dtype."""
    if isinstance(value, torch.Tensor):
        return {"tensor": base64.b64encode(value.cpu().numpy().tobytes()).decode(), "shape": list(value.shape)}
    if isinstance(value, np.ndarray):
        encoded = base64.b64encode(value.tobytes()).decode()
        return {"array": encoded, "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, dict):
        return {"dict": {key: encode_streams(item) for key, item in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [encode_streams(item) for item in value]}
    return value


def decode_streams(value: Any) -> Any:
    """The reverse of [`encode_streams`]."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        state = np.frombuffer(base64.b64decode(value["tensor"]), dtype=np.uint8)
        return torch.from_numpy(state.copy()).reshape(value["shape"])
    if "array" in value:
        raw = np.frombuffer(base64.b64decode(value["array"]), dtype=value["dtype"])
        return raw.reshape(value["shape"]).copy()
    if "tuple" in value:
        return tuple(decode_streams(item) for item in value["tuple"])
    return {key: decode_streams(item) for key, item in value["dict"].items()}
