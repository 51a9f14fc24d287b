"""
[`Replay`]: whether a checkpoint is what its run makes of the one before it; and what it takes to find out: where to
begin, what a trainer has to get back afterwards, and the comparison, bit by bit.

Who replays is `replaying`'s business. Nothing here knows a trainer.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..population import RandomStreams
from ..population.failures import known_to_all
from .checkpoint import FROZEN, MEMBER_WEIGHTS, OPTIMIZER, encode_streams, read_training
from .manifest import InvalidCheckpoint, check_finite, find_checkpoints, read_manifest, verify


# Of a member's file, what a run goes on from. The rest (its loss since the last log line) belongs to the log.
_COMPARED = {"groups": "optimizer options", "state": "optimizer state", "scheduler": "scheduler", "scaler": "scaler"}
# What a manifest says of how far the run was.
_COUNTS = ("epoch", "position", "values_moved", "bytes_exchanged")
# What a trainer may make of another run, and says so itself.
_CAUSES = ("total_steps", "batches", "probability")


@dataclass(frozen=True)
class Difference:
    """
    The first thing in which a replay and a checkpoint differ.

    Attributes:
        step (`int`): The step after which they were compared.
        member (`int`, *optional*): Whose it is; `None` for what belongs to no single member (the soup, say).
        part (`str`): "weights", "optimizer state", "random streams", ...
        tensor (`str`): Its name there; of an optimizer the parameter's, then the name of the state.
        how (`str`): By how much, for people.
    """

    step: int
    member: int | None
    part: str
    tensor: str
    how: str

    def __str__(self) -> str:
        whose = f" of member {self.member}" if self.member is not None else ""
        return f"`{self.tensor}` ({self.part}{whose}) differs at step {self.step}: {self.how}"


@dataclass(frozen=True)
class Replay:
    """
    What [`PopulationMixin.verify_checkpoint`] found: the same on every process. `str` says it in a few lines.

    Attributes:
        folder (`str`): The checkpoint.
        step (`int`), start (`int`): Its step, and that of the checkpoint from which it was replayed; 0 for the
            beginning of the run.
        members (`int`): How many there are.
        weights_only (`bool`): Whether the checkpoint holds nothing but weights (`save_only_model`).
        difference ([`Difference`], *optional*): The first; `None` where all is the same, bit for bit.
        changed (`tuple[str, ...]`): What of the trainer differs from what the checkpoint was written with, each as
            "name was value and is value": where there is something, a difference is to be expected.
    """

    folder: str
    step: int
    start: int
    members: int
    weights_only: bool
    difference: Difference | None
    changed: tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Whether the replay made the checkpoint, bit for bit."""
        return self.difference is None

    def __str__(self) -> str:
        start = f"from step {self.start}" if self.start else "from the beginning of the run"
        if self.difference is None:
            states = "" if self.weights_only else ", their optimizer states, learning rates and random streams"
            many = "s" if self.members > 1 else ""
            return (
                f"identical: replayed {start} to step {self.step}, the weights of {self.members} member{many}{states} and "
                f"the soup are those of `{self.folder}`, bit for bit."
            )
        lines = [f"different: {self.difference}.", f"Replayed {start} to compare with `{self.folder}`."]
        if self.changed:
            lines.append(
                "This is to be expected, since not all is as it was when the checkpoint was written: "
                f"{'; '.join(self.changed)}."
            )
        return "\n".join(lines)


# ---- Where to begin ------------------------------------------------------------------------------------------------


def find_start(folder: Path, manifest: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """
    The newest complete checkpoint of the same run before a checkpoint, in the same folder.

    Args:
        folder (`Path`): The checkpoint.
        manifest (`Mapping`): Its manifest.

    Returns:
        `tuple`: The checkpoint before it, `None` if there is none, and why newer ones were passed over.
    """
    skipped = []
    for step, path in find_checkpoints(folder.absolute().parent):
        if step >= manifest["step"]:
            continue
        try:
            if read_manifest(path)["run"] != manifest["run"]:
                continue
            found = verify(path)
            check_finite(path, found)
        except InvalidCheckpoint as error:
            skipped.append(str(error))
            continue
        if is_weights_only(found):
            skipped.append(f"`{path}` has weights only (`save_only_model`)")
            continue
        return path, skipped
    return None, skipped


def is_weights_only(manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint cannot be resumed from."""
    return f"member_{manifest['members'][0]}/{OPTIMIZER}" not in manifest["files"]


# ---- Ending and putting back ---------------------------------------------------------------------------------------


class ReplayOver(Exception):
    """Ends the training loop of a replay, on every process."""

    def __init__(self) -> None:
        super().__init__("the replay is over")
        known_to_all(self)


class Until(TrainerCallback):
    """
    Ends a replay at the first moment that is past a step: the next step's beginning, or a run's end.

    Args:
        step (`int`): The step.
        start (`int`): Where the replay begins.
        quiet (`bool`): Whether no progress is shown.
    """

    def __init__(self, step: int, start: int, quiet: bool):
        self.step, self.epoch_is_over = step, False
        self._bar = tqdm(total=step - start, desc="replaying", disable=quiet, leave=False)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.max_steps < self.step:
            raise ReplayOver

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch_is_over = False

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise ReplayOver

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epoch_is_over = True

    def close(self) -> None:
        """The end of the progress bar."""
        self._bar.close()


def taking_part(callbacks: Iterable[TrainerCallback]) -> list[TrainerCallback]:
    """Callbacks without those that report or show progress: transformers' own, and what is derived from them."""
    return [
        callback
        for callback in callbacks
        if not isinstance(callback, (PrinterCallback, ProgressCallback))
        and not any(base.__module__.startswith("transformers.integrations") for base in type(callback).__mro__)
    ]


@contextlib.contextmanager
def weights_as_they_were(roots: Sequence[nn.Module]) -> Iterator[None]:
    """
    Undo in the end what the block does to modules: parameters, buffers, gradients, and whether they train. A copy is
    kept in the host's memory.
    """
    modules = list({id(module): module for root in roots for module in root.modules()}.values())
    slots = [(module, module.training, dict(module._parameters), dict(module._buffers)) for module in modules]
    held = [t for _, _, parameters, buffers in slots for t in (*parameters.values(), *buffers.values())]
    tensors = {id(tensor): tensor for tensor in held if tensor is not None}
    kept = [(tensor, tensor.detach().to("cpu", copy=True), tensor.grad) for tensor in tensors.values()]
    gradients = [gradient.clone() if gradient is not None else None for _, _, gradient in kept]
    try:
        yield
    finally:
        for module, training, parameters, buffers in slots:
            module.training = training
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for (tensor, value, _), gradient in zip(kept, gradients, strict=True):
                tensor.copy_(value)
                tensor.grad = gradient


# ---- Comparing -----------------------------------------------------------------------------------------------------


Found = tuple[str, str, str]  # part, tensor, how


def first_difference(theirs: Any, ours: Any, name: str = "") -> tuple[str, str] | None:
    """
    The first place at which two values differ in a bit: tensors, arrays, numbers, texts, and containers of these.

    Args:
        theirs: What a checkpoint holds.
        ours: What the replay has made.
        name (`str`, *optional*): Of the values.

    Returns:
        `tuple[str, str]`, *optional*: The name of the place, keys joined by dots, and how they differ.
    """
    if isinstance(theirs, np.ndarray) and isinstance(ours, np.ndarray):
        theirs, ours = (torch.from_numpy(np.ascontiguousarray(value)) for value in (theirs, ours))
    if isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
        how = _how_tensors_differ(theirs.detach().cpu(), ours.detach().cpu())
        return (name, how) if how is not None else None
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        return _difference_of_mappings(theirs, ours, name)
    if isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
        if len(theirs) != len(ours):
            return name, f"the checkpoint has {len(theirs)} entries, the replay {len(ours)}"
        if len(theirs) > 16 and tuple(theirs) != tuple(ours):
            differing = sum(a != b for a, b in zip(theirs, ours, strict=True))
            return name, f"{differing} of {len(theirs)} values"
        found = (first_difference(a, b, f"{name}.{i}") for i, (a, b) in enumerate(zip(theirs, ours, strict=True)))
        return next((each for each in found if each is not None), None)
    # `repr` tells 0.0 from -0.0, and finds NaN to be itself.
    if type(theirs) is not type(ours) or repr(theirs) != repr(ours):
        return name, f"the checkpoint has {_short(theirs)}, the replay {_short(ours)}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _difference_of_mappings(theirs: Mapping, ours: Mapping, name: str) -> tuple[str, str] | None:
    for key, value in theirs.items():
        place = f"{name}.{key}" if name else str(key)
        if key not in ours:
            return place, "the replay has none"
        found = first_difference(value, ours[key], place)
        if found is not None:
            return found
    extra = next((key for key in ours if key not in theirs), None)
    return (f"{name}.{extra}" if name else str(extra), "the checkpoint has none") if extra is not None else None


def _how_tensors_differ(theirs: torch.Tensor, ours: torch.Tensor) -> str | None:
    for what in ("dtype", "shape"):
        before, now = getattr(theirs, what), getattr(ours, what)
        if before != now:
            return f"the checkpoint's {what} is {before}, the replay's {now}"
    if not theirs.numel():
        return None
    before, now = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (theirs, ours))
    if torch.equal(before, now):
        return None
    count = int((before != now).view(theirs.numel(), -1).any(1).sum())
    how = f"{count:,} of {theirs.numel():,} values"
    if theirs.is_floating_point():
        largest = float((theirs.double() - ours.double()).abs().max())
        how += f", by at most {largest:.3g}"
    return how


def compare_member(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    training: Mapping[str, Any] | None,
    encoded: Any,
    streams: RandomStreams,
) -> Found | None:
    """
    What is a member's own.

    Args:
        folder (`Path`): `member_<i>/` of the checkpoint.
        weights, training, encoded: What the replay would write there, as for `checkpoint.write_member`; `training` is
            `None` where the checkpoint has weights only.
        streams ([`RandomStreams`]): Those that the checkpoint's have to suit.

    Returns:
        `tuple[str, str, str]`, *optional*: The part, the tensor and how it differs.

    Raises:
        InvalidCheckpoint: for files that hold something else.
    """
    found = first_difference(load_file(folder / MEMBER_WEIGHTS), weights)
    if found is not None:
        return "weights", *found
    if training is None:
        return None
    theirs, drawn = read_training(folder, streams)
    for key, part in _COMPARED.items():
        # As they are after a file, in which a number's own type may be another's.
        found = first_difference(theirs.get(key), training.get(key))
        if found is not None:
            return part, *found
    ours = json.loads(json.dumps(encoded))
    found = first_difference(json.loads(json.dumps(encode_streams(drawn))), ours)
    if found is None:
        return None
    name = ".".join(part for part in found[0].split(".") if part not in ("dict", "tuple", "tensor", "array"))
    return "random streams", name, "another state"


def compare_soup(folder: Path, saved: Path, shared: Mapping[str, torch.Tensor]) -> Found | None:
    """
    What all members share, and the soup.

    Args:
        folder (`Path`): The checkpoint.
        saved (`Path`): The soup of the replay, saved in the same way.
        shared (`Mapping[str, torch.Tensor]`): What the replay's members share.
    """
    theirs = load_file(folder / FROZEN) if (folder / FROZEN).is_file() else {}
    found = first_difference(theirs, shared)
    if found is not None:
        return "frozen weights", *found
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == FROZEN:
            continue
        ours = load_file(saved / path.name) if (saved / path.name).is_file() else {}
        found = first_difference(load_file(path), ours)
        if found is not None:
            return "weights of the soup", *found
    return None


def compare_mixer(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any]) -> Found | None:
    """What the method of exchange keeps beside the members, in the checkpoint and in the replay."""
    found = first_difference(theirs or {}, ours)
    return ("state of the exchange", *found) if found is not None else None


def compare_counts(manifest: Mapping[str, Any], ours: Mapping[str, Any]) -> Found | None:
    """How far the run was, by its manifest and by the replay's."""
    found = first_difference({name: manifest[name] for name in _COUNTS}, {name: ours[name] for name in _COUNTS})
    return ("counts", *found) if found is not None else None


def causes(manifest: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What makes another run of it, beside options: its length, its data's, and where it computes."""
    told = [(name, manifest.get(name), ours[name]) for name in _CAUSES]
    before = manifest.get("made_with", {})
    told += [(name, before.get(name), value) for name, value in ours["made_with"].items()]
    return [f"{name} was {was!r} and is {now!r}" for name, was, now in told if was is not None and was != now]


def first_of(found: Sequence[Sequence[tuple[int | None, Found | None]]]) -> tuple[int | None, Found] | None:
    """Of what all processes found, by the member each belongs to, the first in the order of members; others come last."""
    differences = [(member, each) for process in found for member, each in process if each is not None]
    return min(differences, key=lambda entry: (entry[0] is None, entry[0] or 0), default=None)


def reworded(work: Callable[[], Any]) -> Any:
    """Do what resuming does, and say of what it refuses that it cannot be replayed."""
    try:
        return work()
    except ValueError as error:
        if error.args and str(error).startswith("Cannot resume"):
            error.args = (str(error).replace("Cannot resume", "Cannot replay", 1), *error.args[1:])
        raise
