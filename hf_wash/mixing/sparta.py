"""[`SpartaMixer`]: a few weights, drawn anew in each step, become their mean over all members."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .averaging import TRAILER, AveragingMixer, check_steps
from .drafts import Ahead, Draft, Load
from .exchange import DeviceShipment, HostShipment, Route, route_of_means
from .memory import Selection, Views, look, planes_of
from .outcome import MixStats
from .plan import Planner
from .schedule import check_probability
from .wire import BAD


class SpartaMixer(AveragingMixer):
    """
    After every step a few weights, drawn anew each time, become their mean: SPARTA (Exo Labs 2025,
    https://github.com/exo-explore/gym).

    Every scalar i is selected with one probability at all depths, the same scalars for all members, and θ_n[i] ← (1/N)
    Σ_m θ_m[i]; of d parameters that is probability·d values a member and exchange, on average. Every process derives
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
        # Were the buckets of two steps of different lengths, then processes that come with different steps would not
        # get an error but a broken connection. Six standard deviations are enough for all steps of any run.
        expected = float(probability) * sum(sizes)
        self._room_for = math.ceil(expected + 6 * math.sqrt(expected) + 6)
        self._ahead: Ahead[_SpartaDraft] = Ahead()
        self._planes = planes_of([[(None, tensor.dtype)] for tensor in self._tensors[0]])
        self._views: list[Views] = []
        self._look()
        carrier = HostShipment if self._device.type == "cpu" else DeviceShipment
        self._header_words = BAD + -(-len(self._members) // 64)
        self._load = functools.partial(carrier, wire=None, header_words=self._header_words, room=0)

    def _check(self) -> None:
        check_probability(self.probability)
        check_steps(self.interval, "interval")
        Planner(self._seed, [], [], 0)

    def is_due(self, step: int) -> bool:
        """Whether members exchange after a step, counted from 1."""
        return step % self.interval == 0

    def prepare(self, step: int) -> None:
        """
        Draws what a step selects and returns when it is there, so that [`SpartaMixer.mix`] has only to carry values.

        Not needed in a loop: it is drawn in a thread while the caller computes, going by the distance between the last
        two steps. It serves where the next step is another one.

        Args:
            step (`int`): The step of the next exchange.
        """
        if self._num_members > 1:
            self._ahead.prepare(step, self._outline())

    def _exchange(self, step: int, stop: bool) -> MixStats:
        draft = self._ahead.take(step) or self._outline()(step)
        shipment = draft.shipment(self._views, self._load)
        if shipment.stale():
            self._look()
            shipment = draft.shipment(self._views, self._load)
        header = shipment.gather(np.zeros(self._header_words, dtype=np.int64))
        # Of each dtype, the values of each local member.
        num_local = len(self._members)
        held = [values.view(num_local, len(values) // num_local) for values in shipment.held()]
        sizes = [values.shape[1] for values in held]
        length = self._room_for
        while length < sum(sizes):
            length *= 2
        bucket = self._bucket(length + TRAILER)
        bucket[sum(sizes) :] = 0
        sums = bucket[: sum(sizes)].split(sizes)
        for values, total in zip(held, sums, strict=True):
            torch.sum(values, 0, dtype=self._dtype, out=total)
        bucket[length:] = self._trailer(step, stop)
        if any(view.exists is not None for view in self._views):
            bucket[-1] = 1
        else:
            bucket[-1] = self._too_large(torch.aminmax(bucket[:length]))
        waited = self._wait([self._reduce(bucket)])
        stop = self._judge(bucket[length:], step, lambda: self._finite_ones(header))
        for values, total in zip(held, sums, strict=True):
            values.copy_(total.div_(self._num_members))
        shipment.scatter()
        nbytes = sum(values.nbytes for values in held)
        stats = self._stats(num_local * sum(sizes), nbytes, self._sent(bucket), stop, waited)
        # Last of all: the thread that draws would take the interpreter away from what this one has yet to do.
        self._ahead.expect(step, self._outline())
        return stats

    def _look(self) -> None:
        """Looks where the tensors lie."""
        before: Sequence[Views | None] = self._views or [None] * len(self._planes)
        self._views = [
            look(
                plane,
                [own[number] for own in self._tensors for number in plane.tensors],
                [self._shapes[number] for number in plane.tensors],
                self._device,
                seen,
            )
            for plane, seen in zip(self._planes, before, strict=True)
        ]

    def _finite_ones(self, header: np.ndarray | torch.Tensor) -> list[bool] | str:
        """Which local members gave finite values only, by the bits that gathering has set; or what could not be read."""
        for view in self._views:
            if view.exists is not None:
                local, place = divmod(int(np.flatnonzero(~view.exists)[0]), len(view.plane.tensors))
                return self._changed(self._members[local], view.plane.tensors[place])
        bits = header[BAD:].tolist()
        return [not bits[local // 64] >> local % 64 & 1 for local in range(len(self._members))]

    def _outline(self) -> Callable[[int], "_SpartaDraft"]:
        """What makes a draft, and refers to the mixer in nothing."""
        return functools.partial(_SpartaDraft, self._planner, self._views, self._load)


class _SpartaDraft(Draft):
    """What a step selects, and where it lies in this process's members."""

    def __init__(self, planner: Planner, views: Sequence[Views], load: Load, step: int):
        self._selected = planner.select(step)
        super().__init__(views, load)

    def _route(self, selection: Selection) -> Route:
        return route_of_means(*self._selected, selection)
