"""[`SpartaMixer`]: a few weights, drawn anew in each step, become their mean over all members."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from .averaging import AveragingMixer, check_steps
from .plan import Planner
from .schedule import check_probability


class SpartaMixer(AveragingMixer):
    """
    After every step a few weights, drawn anew each time, become their mean: SPARTA (Exo Labs 2025,
    https://github.com/exo-explore/gym).

    Every scalar is selected with one probability at all depths, the same scalars for all members. Every process derives
    them from (seed, step), so that only the values are sent; the published code draws and broadcasts masks of a byte
    for each parameter of the model. Parameters only; optimizer states stay.

    Args:
        members (`torch.nn.Module` or `list[torch.nn.Module]`):
            As in [`AveragingMixer`].
        probability (`float`, *optional*, defaults to 0.005):
            With which a weight is selected in a step, in [0, 1].
        seed (`int`, *optional*, defaults to 0):
            Of the selection, in [0, 2^64).
        interval (`int`, *optional*, defaults to 1):
            Steps between two exchanges.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            As in [`AveragingMixer`].

    Raises:
        ValueError: as [`AveragingMixer`], and for a probability outside [0, 1] or a seed outside its range.
    """

    _averages = False

    def __init__(
        self,
        members: nn.Module | Sequence[nn.Module],
        *,
        probability: float = 0.005,
        seed: int = 0,
        interval: int = 1,
        process_group: dist.ProcessGroup | None = None,
    ):
        self.probability, self.interval, self._seed = probability, interval, seed
        options = {"probability": probability, "seed": seed, "interval": interval}
        super().__init__(members, options, process_group=process_group)
        sizes = [tensor.numel() for tensor in self._tensors[0]]
        self._planner = Planner(seed, sizes, [float(probability)] * len(sizes), 0)
        expected = float(probability) * sum(sizes)
        self._room_for = math.ceil(expected + 6 * math.sqrt(expected) + 6)
        self._chosen: list[tuple[int, torch.Tensor]] = []

    def _check(self) -> None:
        check_probability(self.probability)
        check_steps(self.interval, "interval")
        Planner(self._seed, [], [], 0)

    def is_due(self, step: int) -> bool:
        """Whether members exchange after a step, counted from 1."""
        return step % self.interval == 0

    def _read(self, step: int) -> list[list[torch.Tensor]]:
        coordinates, offsets = self._planner.select(step)
        every = torch.from_numpy(coordinates).to(self._device)
        self._chosen = [
            (number, every[begin:end])
            for number, (begin, end) in enumerate(itertools.pairwise(offsets.tolist()))
            if end > begin
        ]
        return [[self._picked(own)] for own in self._tensors]

    def _picked(self, own: list[torch.Tensor]) -> torch.Tensor:
        """A member's selected values, tensor after tensor."""
        sizes = [len(at) for _, at in self._chosen]
        values = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
        for (number, at), part in zip(self._chosen, values.split(sizes), strict=True):
            part.copy_(torch.take(own[number], at))
        return values

    def _padding(self, size: int) -> int:
        # Were the buckets of two steps of different lengths, then processes that come with different steps would not
        # get an error but a broken connection. Six standard deviations are enough for all steps of any run.
        length = self._room_for
        while length < size:
            length *= 2
        return length - size

    def _apply(self, sums: list[torch.Tensor], step: int) -> None:
        parts = (sums[0] / self._num_members).split([len(at) for _, at in self._chosen])
        for own in self._tensors:
            for (number, at), part in zip(self._chosen, parts, strict=True):
                own[number].put_(at, part.to(own[number].dtype))
