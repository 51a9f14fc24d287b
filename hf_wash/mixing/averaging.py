"""
The peers that average: at some steps members are replaced by, or pulled towards, a mean over all of them.

[`AveragingMixer`] is the exchange that they have in common: one bucket that travels in one collective. What each method
adds is below: when, of what, and what becomes of the mean. Steps are counted from 1, as optimizer steps taken.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .agreement import agree, alike, architecture, averaged_buffers, check_members, place_of, processes
from .outcome import ContagionError, MixStats, PlanMismatchError
from .schedule import check_probability


# At the end of a bucket: a check number of the step, its square, how many processes want to stop, and how many have
# members that must not be averaged.
TRAILER = 4
# A bucket travels in sections of at least so many values, one on its way while the next is filled.
_SECTION = 2**22
# On a CPU it is filled, checked and emptied in blocks of about so many, which stay in the processor's cache.
_BLOCK = 2**18
# Steps are compared by their remainder from these at most; see `remainder_of`.
_REMAINDERS = {torch.float32: 257, torch.float64: 1_000_003}
_OTHER_STEPS = (
    "The processes came to this exchange with different steps, and this process with step {step}. Every process has to "
    "call mix() once after every step. Nothing was written into any member."
)
_TOO_LARGE = (
    "The members' values are finite at step {step}, and some are too large for a mean over all members to be sure to be "
    "finite. The exchange of this step was not carried out, and nothing was written into any member."
)


def remainder_of(dtype: torch.dtype, num_processes: int) -> int:
    """By what a step is divided for its check number, so that sums of squares over all processes are exact."""
    exact = round(2 / torch.finfo(dtype).eps)  # up to here every whole number is one of the dtype
    return min(_REMAINDERS[dtype], math.isqrt(exact // num_processes) + 1)


def check_steps(value: Any, what: str, least: int = 1) -> int:
    """
    A number of steps, or why it is none.

    Raises:
        ValueError: when `value` is not a whole number of at least `least`; `what` names it.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} must be a whole number of steps of at least {least}, and is {value!r}.")
    return value


class AveragingMixer:
    """
    A mixer whose exchange is a mean over all members of some of their values: θ̄ = (1/N) Σ_n θ_n, coordinate by
    coordinate.

    All values of an exchange travel in one bucket of one dtype (float32, or float64 where a tensor is), all-reduced in
    a few large sections, one on its way while the next is filled; the mean is accumulated there, so that the mean of
    half-precision members is rounded only once, at the end. (So is what PAPA pulls: where a small pull is below half a
    unit in the last place of a half-precision weight, the weight stays where it is.) Nothing is written into a member
    before all has come. A step without an exchange sends nothing. The result does not depend on how members are dealt
    to processes, up to rounding. What a process sends is what a ring sends: 2·(W − 1)/W buckets of W processes, the bytes of
    `MixStats.bytes_sent`.

    A method says when ([`AveragingMixer.is_due`]), and what becomes of the sum over all members (`_apply`).

    Args:
        members (`torch.nn.Module` or `list[torch.nn.Module]`):
            The members that this process hosts. Process r of W hosts members r·n to (r + 1)·n − 1, where n is the
            length of the list, the same on every process.
        options (`dict`, *optional*):
            What all processes have to agree on beside the members.
        buffers (`bool`, *optional*, defaults to `False`):
            Whether floating-point buffers that are saved with the model (BatchNorm's statistics) are averaged, too.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            The processes that host the population. `None`: all processes if `torch.distributed` is initialised, else
            this one.

    Raises:
        ValueError: on every process, for members or options that differ, or that cannot be averaged: no members, no
            trainable floating-point parameter, names, shapes or dtypes that are not the same, parameters that share
            memory, several devices in one process.
    """

    def __init__(
        self,
        members: nn.Module | Sequence[nn.Module],
        options: dict[str, Any] | None = None,
        *,
        buffers: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ):
        members = [members] if isinstance(members, nn.Module) else list(members)
        self._group, rank, self._num_processes = processes(process_group)
        self._members = range(rank * len(members), (rank + 1) * len(members))
        self._num_members = self._num_processes * len(members)
        error, description = None, {}
        try:
            parameters = check_members(members, self._members)
            self._check()
            averaged = [averaged_buffers(member) if buffers else {} for member in members]
            description = {
                "architecture": architecture(members[0]), "number of members": len(members),
                "method": type(self).__name__, **(options or {}), "buffers that are averaged": alike(averaged, self._members),
            }  # fmt: skip
        except ValueError as found:
            error = str(found)
        if self._group is not None:
            error, _ = agree(self._group, error, description, ())
        if error is not None:
            raise ValueError(error)
        self._names = [*parameters[0], *averaged[0]]
        self._num_parameters = len(parameters[0])
        # Buffers by their place: a module may assign another tensor to one.
        self._buffers = [
            [place_of(member, name) for name in own] for member, own in zip(members, averaged, strict=True)
        ]
        self._tensors: list[list[torch.Tensor]] = [
            [*own.values(), *more.values()] for own, more in zip(parameters, averaged, strict=True)
        ]
        # Buckets and plans are made for these, whatever becomes of the tensors.
        self._shapes = [tensor.shape for tensor in self._tensors[0]]
        self._dtypes = [tensor.dtype for tensor in self._tensors[0]]
        self._sizes = [tensor.numel() for tensor in self._tensors[0]]
        self._device = self._tensors[0][0].device
        wide = any(tensor.dtype == torch.float64 for tensor in self._tensors[0])
        self._dtype = torch.float64 if wide else torch.float32
        self._room = torch.empty(0, dtype=self._dtype, device=self._device)
        self._stop_wanted = False

    # ---- What a method is ------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise a `ValueError` for options that cannot be."""

    def is_due(self, step: int) -> bool:
        """
        Whether members exchange after a step.

        Args:
            step (`int`): The number of optimizer steps taken, from 1.

        Returns:
            `bool`: The same on every process.
        """
        raise NotImplementedError

    def _apply(self, blocks: Sequence["Block"], step: int) -> None:
        """Write into the members what follows from the sums over all members."""
        for block, own in itertools.product(blocks, self._tensors):
            for tensor, total in zip(own[block.tensors], block.parts, strict=True):
                if tensor.dtype == total.dtype:
                    torch.div(total, self._num_members, out=tensor)  # one pass over the memory
                else:
                    tensor.copy_(total / self._num_members)

    def state_dict(self) -> dict[str, Any]:
        """What a run has to keep beside its members to go on: tensors and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Take up what [`AveragingMixer.state_dict`] gave.

        Raises:
            ValueError: for the state of another method.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"The state of {type(self).__name__} has {sorted(self.state_dict()) or 'no entries'}, and this one has "
                f"{sorted(state)}: it is another method's."
            )

    # ---- The exchange ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mix(self, step: int, *, shuffle: bool = True, stop_requested: bool = False) -> MixStats:
        """
        To be called on every process after every optimizer step, and after the scheduler's.

        Args:
            step (`int`):
                The number of optimizer steps taken, from 1.
            shuffle (`bool`, *optional*, defaults to `True`):
                With `False` nothing is exchanged, whatever is due. The same on every process.
            stop_requested (`bool`, *optional*, defaults to `False`):
                Whether this process wants all to stop. It travels with the next exchange.

        Returns:
            [`MixStats`]: What was exchanged, and whether any process asked for a stop, the same on every process.

        Raises:
            ContagionError: on every process, when a member is NaN or infinite, or too large for a mean. No member has changed.
            PlanMismatchError: on every process, when they came with different steps. No member has changed.
            ValueError: when the step is no such integer.
        """
        check_steps(step, "step")
        self._stop_wanted = stop = self._stop_wanted or bool(stop_requested)
        if self._num_members == 1 or not shuffle or not self.is_due(step):
            return MixStats(0, 0, 0, False, stop and self._group is None, 0, 0, 0.0)
        return self._exchange(step, stop)

    def _look_up(self) -> str | None:
        """Takes up the buffers as they are now. Returns what is no longer as it was when the mixer was built."""
        for number, own, places in zip(self._members, self._tensors, self._buffers, strict=True):
            now: list[Any] = [getattr(module, name, None) for module, name in places]
            own[self._num_parameters :] = now
            for place, (tensor, shape, dtype) in enumerate(zip(own, self._shapes, self._dtypes, strict=True)):
                if tensor is None or tensor.shape != shape or tensor.dtype != dtype or tensor.device != self._device:
                    return self._changed(number, place)
        return None

    def _changed(self, number: int, place: int) -> str:
        kind = "parameter" if place < self._num_parameters else "buffer"
        return (
            f"The {kind} {self._names[place]!r} of member {number} is no longer of the shape, dtype and device that it "
            f"had when the mixer was built. Nothing was written into any member; build a new mixer after such a change."
        )

    def _finite(self) -> list[bool]:
        return [all(map(_is_finite, own)) for own in self._tensors]

    def _exchange(self, step: int, stop: bool) -> MixStats:
        problem = self._look_up()
        size = sum(self._sizes)
        bucket = self._bucket(size + TRAILER)
        blocks = list(self._blocks(bucket))
        pending, extremes, gone = [], [bucket.new_zeros(())], 0
        for block in blocks:
            if problem is None:
                torch._foreach_copy_(block.parts, self._tensors[0][block.tensors])
                for own in self._tensors[1:]:
                    torch._foreach_add_(block.parts, [tensor.to(self._dtype) for tensor in own[block.tensors]])
                extremes += torch.aminmax(block.values)
            else:
                block.values.zero_()  # the others are waiting for as many
            if block.end - gone >= _SECTION and block.end < size:
                pending.append(self._reduce(bucket[gone : block.end]))
                gone = block.end
        bucket[size:] = self._trailer(step, stop)
        bucket[-1] = self._too_large(extremes) if problem is None else 1
        pending.append(self._reduce(bucket[gone:]))
        waited = self._wait(pending)
        stop = self._judge(bucket[size:], step, lambda: problem or self._finite())
        self._apply(blocks, step)
        nbytes = sum(tensor.nbytes for own in self._tensors for tensor in own)
        return self._stats(size * len(self._members), nbytes, self._sent(bucket), stop, waited)

    # Whether an exchange leaves members with the mean of whole models.
    _averages = True

    def _stats(self, values: int, nbytes: int, sent: int, stop: bool, waited: float) -> MixStats:
        everywhere = values * self._num_processes, nbytes * self._num_processes
        return MixStats(values, nbytes, sent, self._averages, stop, *everywhere, waited)

    def _bucket(self, length: int) -> torch.Tensor:
        """Room for so many values; the same memory each time, since new memory costs more than a copy."""
        if self._room.numel() < length:
            self._room = torch.empty(length, dtype=self._dtype, device=self._device)
        return self._room[:length]

    def _blocks(self, bucket: torch.Tensor) -> Iterator["Block"]:
        """Parts a bucket, which has values of all tensors one after the other."""
        sizes = self._sizes
        enough = _BLOCK if self._device.type == "cpu" else _SECTION
        first, begin, end = 0, 0, 0
        for number, size in enumerate(sizes, 1):
            end += size
            if end - begin >= enough or (number == len(sizes) and end > begin):
                values = bucket[begin:end]
                parts = zip(values.split(sizes[first:number]), self._shapes[first:number], strict=True)
                yield Block(slice(first, number), end, values, [part.view(shape) for part, shape in parts])
                first, begin = number, end

    def _too_large(self, extremes: Iterable[torch.Tensor]) -> torch.Tensor:
        """Whether one of these is NaN, or so large that a sum over all processes could be infinite."""
        return ~(torch.stack([*extremes]).abs().max() <= torch.finfo(self._dtype).max / self._num_processes)

    def _trailer(self, step: int, stop: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What stands at the end of a bucket that is fine."""
        dtype = dtype or self._dtype
        check = step % remainder_of(dtype, self._num_processes)
        return torch.tensor([check, check * check, stop, 0], dtype=dtype)

    def _reduce(self, values: torch.Tensor) -> dist.Work | None:
        return None if self._group is None else dist.all_reduce(values, group=self._group, async_op=True)

    def _wait(self, pending: Sequence[dist.Work | None]) -> float:
        """Waits for what is on its way. Returns for how many seconds."""
        began = time.perf_counter()
        for work in pending:
            if work is not None:
                work.wait()
        return time.perf_counter() - began

    def _sent(self, bucket: torch.Tensor) -> int:
        """What a ring sends: each process all but its own part, once to add up and once to hand out."""
        return 2 * (self._num_processes - 1) * bucket.nbytes // self._num_processes

    def _judge(self, trailer: torch.Tensor, step: int, finite: Callable[[], list[bool] | str]) -> bool:
        """
        Raises what a summed trailer gives reason for. Returns whether any process wants to stop. Which of the local
        members are `finite`, or what else is wrong with them, is asked only if some process has found something.
        """
        check, squares, stop, bad = trailer.tolist()
        if check * check != squares * self._num_processes:
            raise PlanMismatchError(_OTHER_STEPS.format(step=step))
        if bad:
            own = finite()
            found: list = [own]
            if self._group is not None:
                found = [None] * self._num_processes
                dist.all_gather_object(found, own, group=self._group)
            if told := next((part for part in found if isinstance(part, str)), None):
                raise ValueError(told)
            named = [index for index, fine in enumerate(fine for part in found for fine in part) if not fine]
            if not named:
                raise ContagionError(range(self._num_members), step, _TOO_LARGE.format(step=step))
            raise ContagionError(named, step)
        self._stop_wanted = bool(stop)
        return bool(stop)


class Block(NamedTuple):
    """
    A part of a bucket: which tensors it has values of, where it ends, the values as they lie there, and as views of the
    tensors' shapes.
    """

    tensors: slice
    end: int
    values: torch.Tensor
    parts: list[torch.Tensor]


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


class PeriodicAverageMixer(AveragingMixer):
    """
    All members become their mean, every so many steps: θ_n ← (1/N) Σ_m θ_m.

    With the members' parameters alone, from the first interval on, it is local SGD (McMahan et al. 2017,
    https://huggingface.co/papers/1602.05629, algorithm 1 with all clients and equal weights), and DART's way of
    averaging (Jain et al. 2023, https://huggingface.co/papers/2302.14685), whose members differ by their
    augmentations. With `buffers=True`, `interval` 5 epochs and `first` 1 epoch it is the averaging of PAPA-all
    (Jolicoeur-Martineau et al. 2023, https://huggingface.co/papers/2304.03094), which rescales the activations of the
    averaged model afterwards (REPAIR): that is the caller's, told by `MixStats.averaged`. Optimizer states stay.

    Args:
        members (`torch.nn.Module` or `list[torch.nn.Module]`):
            As in [`AveragingMixer`].
        interval (`int`):
            Steps between two averagings.
        first (`int`, *optional*):
            The step of the first averaging. Defaults to `interval`.
        last (`int`, *optional*):
            The last step after which members may be averaged. `None`: there is none.
        buffers (`bool`, *optional*, defaults to `False`):
            Whether floating-point buffers that are saved with the model are averaged, too.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            As in [`AveragingMixer`].

    Raises:
        ValueError: as [`AveragingMixer`], and for steps that are no positive whole numbers.

    Example:

    ```python
    import torch
    from hf_wash.mixing import PeriodicAverageMixer

    members = [torch.nn.Linear(10, 2) for _ in range(3)]
    mixer = PeriodicAverageMixer(members, interval=20)
    for step in range(1, 101):
        ...  # a step of each member's optimizer
        mixer.mix(step)
    ```
    """

    def __init__(
        self,
        members: nn.Module | Sequence[nn.Module],
        *,
        interval: int,
        first: int | None = None,
        last: int | None = None,
        buffers: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ):
        self.interval, self.first, self.last = interval, first, last
        super().__init__(
            members, {**self._options(), "buffers": buffers}, buffers=buffers, process_group=process_group
        )

    def _options(self) -> dict[str, Any]:
        return {"interval": self.interval, "first": self.first, "last": self.last}

    def _check(self) -> None:
        check_steps(self.interval, "interval")
        for name in ("first", "last"):
            if getattr(self, name) is not None:
                check_steps(getattr(self, name), name)

    def is_due(self, step: int) -> bool:
        """Whether members are averaged after a step, counted from 1."""
        first = self.interval if self.first is None else self.first
        past_end = self.last is not None and step > self.last
        return step >= first and not past_end and (step - first) % self.interval == 0


class PapaMixer(AveragingMixer):
    """
    Members are pulled a little towards their mean, every few steps: PAPA (Jolicoeur-Martineau et al. 2023,
    https://huggingface.co/papers/2304.03094, section 3).

    After the optimizer's step and the scheduler's, w ← (1 − r)·w + r·w̄ with r = rate · lr_t / lr_0: the pull falls
    with the learning rate. The paper's α is 1 − `rate`. The mean is over all members, the one that is pulled included.
    Floating-point buffers that are saved (BatchNorm's statistics) are pulled, too; optimizer states stay.

    Args:
        members (`torch.nn.Module` or `list[torch.nn.Module]`):
            As in [`AveragingMixer`].
        optimizers (`torch.optim.Optimizer` or `list[torch.optim.Optimizer]`):
            Theirs, whose learning rate at the time of the pull counts: for each member that of the group which holds
            its first parameter.
        rate (`float`, *optional*, defaults to 0.01):
            1 − α, in [0, 1]: the part of the way to the mean at the full learning rate.
        interval (`int`, *optional*, defaults to 10):
            Batches between two pulls, counted from 0 in each epoch, so that the first batch of an epoch pulls.
        steps_per_epoch (`int`, *optional*):
            Optimizer steps in an epoch. `None`: the count is not begun anew.
        base_learning_rate (`float`, *optional*):
            lr_0. Defaults to each group's `initial_lr`, which a scheduler notes, else its `lr` at the beginning.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            As in [`AveragingMixer`].

    Raises:
        ValueError: as [`AveragingMixer`], and for a rate outside [0, 1], steps that are no positive whole numbers,
            optimizers that do not hold a member, or a base learning rate that is not above 0.

    Example:

    ```python
    import torch
    from hf_wash.mixing import PapaMixer

    members = [torch.nn.Linear(10, 2) for _ in range(3)]
    optimizers = [torch.optim.SGD(member.parameters(), lr=0.1) for member in members]
    mixer = PapaMixer(members, optimizers, rate=0.01, interval=10)
    for step in range(1, 101):
        ...  # a step of each member's optimizer and scheduler
        mixer.mix(step)
    ```
    """

    _averages = False

    def __init__(
        self,
        members: nn.Module | Sequence[nn.Module],
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        rate: float = 0.01,
        interval: int = 10,
        steps_per_epoch: int | None = None,
        base_learning_rate: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ):
        self.rate, self.interval, self.steps_per_epoch = rate, interval, steps_per_epoch
        listed = [members] if isinstance(members, nn.Module) else list(members)
        self._groups = _groups_of(listed, optimizers)
        self._base = [
            base_learning_rate if base_learning_rate is not None else float(group.get("initial_lr", group["lr"]))
            for group in self._param_groups()
        ]
        options = {"rate": rate, "interval": interval, "steps_per_epoch": steps_per_epoch}
        super().__init__(members, options, buffers=True, process_group=process_group)

    def _check(self) -> None:
        check_probability(self.rate, "rate")
        check_steps(self.interval, "interval")
        if self.steps_per_epoch is not None:
            check_steps(self.steps_per_epoch, "steps_per_epoch")
        if None in self._groups:
            raise ValueError("No optimizer holds a member's parameters: PapaMixer goes by their learning rates.")
        if any(not base > 0 for base in self._base):
            raise ValueError(f"base_learning_rate must be above 0, and is {min(self._base)!r}.")

    def is_due(self, step: int) -> bool:
        """Whether members are pulled after a step, counted from 1."""
        batch = step - 1
        if self.steps_per_epoch is not None:
            batch %= self.steps_per_epoch
        return batch % self.interval == 0

    def _param_groups(self) -> list[dict[str, Any]]:
        """Each member's group as it is now: an optimizer that loads a state has others afterwards."""
        return [found[0].param_groups[found[1]] for found in self._groups if found is not None]

    def _apply(self, blocks: Sequence[Block], step: int) -> None:
        for block in blocks:
            block.values.div_(self._num_members)
            for column, group, base in zip(self._tensors, self._param_groups(), self._base, strict=True):
                rate = min(1.0, self.rate * float(group["lr"]) / base)
                own = column[block.tensors]
                if all(tensor.dtype == self._dtype for tensor in own):
                    torch._foreach_lerp_(own, block.parts, rate)  # one pass over the memory
                    continue
                for tensor, mean in zip(own, block.parts, strict=True):
                    tensor.copy_(tensor.to(self._dtype).lerp(mean, rate))


def _groups_of(members: Sequence[nn.Module], optimizers: Any) -> list[tuple[torch.optim.Optimizer, int] | None]:
    """For each member, the optimizer and the place of its group that hold the member's first parameter that is in one."""
    optimizers = [optimizers] if not isinstance(optimizers, Sequence) else list(optimizers)
    groups = {
        id(parameter): (optimizer, place)
        for optimizer in optimizers
        for place, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    return [next((groups[id(p)] for p in member.parameters() if id(p) in groups), None) for member in members]
