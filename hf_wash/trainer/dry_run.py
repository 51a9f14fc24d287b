"""
[`DryRun`]: what is known of a run before it begins, as a table; and what it takes to find out without leaving a trace.

Who is tried out is `checking`'s business. Nothing here knows a trainer.
"""

import contextlib
import copy
import math
import shutil
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import IterableDataset
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..hub.check import CannotCheck, check_export
from ..hub.kinds import kind_of
from ..hub.traffic import others_send, size_of
from ..hub.wording import bytes_text, short
from ..methods import METHODS
from ..population.streams import RandomStreams


@dataclass
class DryRun:
    """
    What [`PopulationMixin.check`] found: the same on every process. `str` makes a table of it.

    Attributes:
        members (`int`), processes (`int`): How many there are.
        steps (`int`): Optimizer steps of each member.
        batch_size (`int`): Examples that a member sees in a step.
        samples (`int`, *optional*): Examples in the training set of one member; `None` for a stream.
        losses (`list[float]`): Of each member on a batch of its own, untrained; empty for a stream that cannot be read
            twice.
        parameters (`int`), trained_parameters (`int`): Of one member.
        saved_bytes (`int`): Of a saved model.
        saved (`str`): How it was shown to load back.
        shuffle_probability (`float`): The p of this run.
        expected_shuffles (`float`): How often a first-layer weight is shuffled in the run, on average.
        too_few_shuffles (`str`, *optional*): What the run will warn of, if that is too seldom to be of use.
        values_moved (`float`), bytes_exchanged (`float`): What is expected to change owner in the run, of all members.
        others_send (`dict[str, int]`): Bytes that other methods would send.
        checkpoint_bytes (`int`): Of one checkpoint.
        checkpoints_written (`int`), checkpoints_kept (`int`): In the whole run, and at most at a time.
        final_bytes (`int`): Of the soup and the members that are saved in the end.
        disk_needed (`int`), disk_free (`int`): Bytes where the run is written to.
        output_dir (`str`): That is here.
        mixing (`str`): What members exchange.
    """

    members: int
    processes: int
    steps: int
    batch_size: int
    samples: int | None
    losses: list[float]
    parameters: int
    trained_parameters: int
    saved_bytes: int
    saved: str
    shuffle_probability: float
    expected_shuffles: float
    too_few_shuffles: str | None
    values_moved: float
    bytes_exchanged: float
    checkpoint_bytes: int
    checkpoints_written: int
    checkpoints_kept: int
    disk_free: int
    output_dir: str
    trained_bytes: int
    mixing: str = "wash"
    others_send: dict[str, int] = field(init=False)
    final_bytes: int = field(init=False)
    disk_needed: int = field(init=False)

    def __post_init__(self):
        self.others_send = others_send(self.members, self.steps, self.trained_bytes)
        self.others_send.pop(METHODS[self.mixing].title, None)
        self.final_bytes = (self.members + 1) * self.saved_bytes
        self.disk_needed = self.checkpoints_kept * self.checkpoint_bytes + self.final_bytes

    @property
    def problem(self) -> str | None:
        """Why the run would not end well, in a sentence."""
        if self.disk_needed <= self.disk_free:
            return None
        kept = f"{self.checkpoints_kept} checkpoints of {bytes_text(self.checkpoint_bytes)} and "
        return (
            f"{kept if self.checkpoints_kept else ''}{bytes_text(self.final_bytes)} for the soup and the members need "
            f"{bytes_text(self.disk_needed)} in `{self.output_dir}`, where {bytes_text(self.disk_free)} are free: make "
            "room, or keep fewer with `save_total_limit`."
        )

    def rows(self) -> list[tuple[str, str]]:
        """What the table says: names and texts."""
        samples = "a stream" if self.samples is None else f"{self.samples:,} samples for a member"
        losses = "not looked at: this stream cannot be read twice"
        if self.losses:
            low, high = (f"{bound(self.losses):.4g}" for bound in (min, max))
            losses = f"{low if low == high else f'{low} to {high}'} on a batch of each member, untrained"
        exchange = "nothing is exchanged"
        if self.values_moved:
            exchange = f"{short(self.values_moved)} values, {bytes_text(self.bytes_exchanged)} in the whole run"
            if self.mixing != "wash":
                exchange = f"{METHODS[self.mixing].title}, {exchange}"
        others = ", ".join(f"{name} {bytes_text(amount)}" for name, amount in self.others_send.items())
        shuffles = f"{self.expected_shuffles:.3g} of a weight of the first layer, p = {self.shuffle_probability:.4g}"
        return [
            ("model", f"{self.parameters:,} parameters, {self.trained_parameters:,} of them trained"),
            ("data", samples),
            ("loss", losses),
            ("saved model", f"{bytes_text(self.saved_bytes)}, {self.saved}"),
            (
                "run",
                f"{self.members} members × {self.steps:,} steps of {self.batch_size} samples, "
                f"{self.processes} process{'es' if self.processes > 1 else ''}",
            ),
            ("exchange", exchange),
            *([("shuffles", shuffles)] if self.values_moved and self.mixing == "wash" else []),
            *([("too few", self.too_few_shuffles)] if self.values_moved and self.too_few_shuffles else []),
            *([("others send", others)] if self.values_moved else []),
            (
                "checkpoints",
                f"{self.checkpoints_written} of {bytes_text(self.checkpoint_bytes)}, at most {self.checkpoints_kept} at a time"
                if self.checkpoints_written
                else "none",
            ),
            ("disk", f"{bytes_text(self.disk_needed)} needed, {bytes_text(self.disk_free)} free in {self.output_dir}"),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:<{width}}{text}" for name, text in rows)


# ---- Leaving no trace ----------------------------------------------------------------------------------------------

_CONTAINERS = (dict, list, set, deque, defaultdict, OrderedDict, Counter)


def _remember(value: Any, seen: set[int], restore: list[Callable[[], None]]) -> None:
    if type(value) not in _CONTAINERS or id(value) in seen:
        return
    seen.add(id(value))
    content = value.copy()

    def put_back() -> None:
        value.clear()
        (value.extend if isinstance(value, (list, deque)) else value.update)(content)

    restore.append(put_back)
    for item in list(value.values()) if isinstance(value, dict) else list(value):
        _remember(item, seen, restore)


@contextlib.contextmanager
def as_it_was(
    *attributes: dict[str, Any], streams: RandomStreams, owners: list, apart_from: tuple = ()
) -> Iterator[None]:
    """
    Undo in the end what the block does to some objects' attributes, lists and dictionaries among these with all that is
    in them, and to random streams.

    Args:
        *attributes (`dict`): The objects' own attributes, as `vars` gives them.
        streams ([`RandomStreams`]), owners (`list`): The streams, and whose they are.
        apart_from (`tuple`): Values that nothing is done to, and that may be long: data sets.
    """
    restore: list[Callable[[], None]] = []
    seen = {id(value) for value in apart_from}
    for own in attributes:
        _remember(own, seen, restore)
    states = {owner: streams.state(owner) for owner in owners}
    try:
        yield
    finally:
        for put_back in restore:
            put_back()
        for owner, state in states.items():
            streams.set_state(owner, state)


def copy_of_collator(collator: Any, model: nn.Module) -> Any:
    """A collator that may remember what it has drawn; the model that it holds stays the same."""
    try:
        return copy.deepcopy(collator, {id(model): model})
    except Exception:  # what cannot be copied has to serve itself
        return collator


def copy_of_stream(dataset: Any) -> Any:
    """A data set to take a batch from: a stream is copied, since what is read from it may be gone; `None` if it cannot be."""
    if not isinstance(dataset, IterableDataset):
        return dataset
    try:
        return copy.deepcopy(dataset)
    except Exception:  # an open file, a generator
        return None


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in the block into one sentence."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} failed: {in_a_line(error)}") from error


def in_a_line(error: Exception) -> str:
    """What went wrong; the type is named where the text may not say enough."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


# ---- Trying out ----------------------------------------------------------------------------------------------------


def first_batch(loader: Any) -> Any:
    """
    A loader's first batch. Nothing is read ahead, and nobody is told of a loader that is not read to its end.

    Raises:
        ValueError: if there is none.
    """
    batch = next(iter(getattr(loader, "base_dataloader", loader)), None)
    if batch is None:
        raise ValueError("The training data gives no batch: there are fewer examples than one needs.")
    return batch


def check_loss(loss: float, member: int, model: nn.Module, scaled: bool) -> None:
    """
    Refuse what no optimizer learns from.

    Args:
        loss (`float`): On a batch.
        member (`int`): Whose it is.
        model (`nn.Module`): After its backward pass.
        scaled (`bool`): Whether the gradients are scaled for fp16, and so may overflow at first.

    Raises:
        ValueError: for a loss or gradients that are not finite.
    """
    if not math.isfinite(loss):
        raise ValueError(f"The loss of member {member} on its first batch is {loss}.")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not scaled and not torch.isfinite(parameter.grad).all():
            raise ValueError(f"The gradient of `{name}` of member {member} is not finite on its first batch.")


def load_back(folder: Path, model: nn.Module, processing_class: Any, example: Any) -> str:
    """
    Load a saved model as others will.

    Args:
        folder (`Path`): Where it lies.
        model (`nn.Module`): What was saved.
        processing_class (*optional*): What was saved with it.
        example (`Mapping`, *optional*): A batch to compare the outputs on.

    Returns:
        `str`: What was shown, for a table.

    Raises:
        ValueError: if what is loaded is another model.
    """
    try:
        kind_of(model)
    except ValueError:
        return _compare_weights(folder, model)
    try:
        loaders = check_export(folder, model, processing_class=processing_class, example=example)
    except CannotCheck as reason:
        return f"not loaded back: {reason}"
    except RuntimeError as error:
        raise ValueError(f"The saved model does not load back as it was: {error}") from error
    return f"loaded back by {', '.join(loaders)}"


def _compare_weights(folder: Path, model: nn.Module) -> str:
    file = folder / "model.safetensors"
    own = model.state_dict()
    saved = load_file(file) if file.is_file() else {}
    if not saved.keys() & own.keys():
        return "not loaded back: its library has a format of its own"
    for name, value in saved.items():
        if name not in own or not torch.equal(own[name].detach().cpu(), value):
            raise ValueError(f"The saved model does not load back as it was: `{name}` differs.")
    return "its weights read back"


def state_of(optimizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of an optimizer's state, each with its parameter."""
    return [
        (parameter, value)
        for parameter, state in getattr(optimizer, "optimizer", optimizer).state.items()
        for value in (state.values() if isinstance(state, Mapping) else ())
        if isinstance(value, torch.Tensor)
    ]


@dataclass
class Tried:
    """
    What one process found when it tried out its members.

    Attributes:
        steps (`int`), steps_per_epoch (`int`): Optimizer steps.
        losses (`list[float]`): Of its members.
        state (`tuple[int, float, float]`): Bytes of one member's optimizer state; values and bytes of it that a shuffle moves,
            relative to those of the weights.
        saved (`tuple[int, str]`, *optional*): Bytes of a saved model, and how it was shown to load back, where this process writes.
        free (`int`, *optional*): Bytes that are free where it writes.
    """

    steps: int
    steps_per_epoch: int
    losses: list[float] = field(default_factory=list)
    state: tuple[int, float, float] = (0, 0.0, 0.0)
    saved: tuple[int, str] | None = None
    free: int | None = None


def measure_state(optimizer: Any) -> tuple[int, float, float]:
    """Of one member's optimizer that has made a step: as [`Tried.state`]."""
    state = state_of(optimizer)
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    moved = [value for parameter, value in state if value.shape == parameter.shape and value.dim()]
    values = sum(value.numel() for value in moved) / max(1, sum(parameter.numel() for parameter in parameters))
    return size_of(value for _, value in state), values, size_of(moved) / max(1, size_of(parameters))


# ---- What a run takes ------------------------------------------------------------------------------------------------


def existing(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def free_bytes(folder: Path) -> int:
    """Bytes that are free where a folder is or would be."""
    return shutil.disk_usage(existing(folder)).free


def mixer_bytes(args: Any, whole: nn.Module, members: int) -> int:
    """Bytes that a checkpoint holds of the method itself: with DiLoCo where the members last met, and a momentum."""
    if args.mixing != "diloco" or members == 1:
        return 0
    trained = [p for p in whole.parameters() if p.requires_grad and p.is_floating_point()]
    wide = any(p.dtype == torch.float64 for p in trained)
    return 2 * (8 if wide else 4) * sum(p.numel() for p in trained)


def count_checkpoints(args: Any, steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """
    How many checkpoints a run writes, and how many lie on the disk at most: one is removed when the next is whole.

    Args:
        args (`transformers.TrainingArguments`): The options.
        steps (`int`), steps_per_epoch (`int`): Optimizer steps in the run and in an epoch.
    """

    def times(strategy: Any, interval: str) -> int:
        if strategy == IntervalStrategy.STEPS:
            state = TrainerState()
            state.compute_steps(args, steps)
            return math.ceil(steps / getattr(state, interval))
        return math.ceil(steps / steps_per_epoch) if strategy == IntervalStrategy.EPOCH else 0

    if args.save_strategy == SaveStrategy.BEST:
        written = times(args.eval_strategy, "eval_steps")
    else:
        written = times(IntervalStrategy(args.save_strategy.value), "save_steps")
    if not args.save_total_limit:
        return written, written
    # With a limit of one the best is kept beside the last.
    best = args.load_best_model_at_end and args.save_total_limit == 1
    return written, min(written, args.save_total_limit + (2 if best else 1))
