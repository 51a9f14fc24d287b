"""
Carrying the values of a plan: out of the tensors, from process to process, and into the tensors again.

`plan.py` says what moves, and `wash.py` when and whether; nothing here decides anything. Three things are kept apart:

- a [`Route`] is the plan as one process sees it: which values its members give, in what order they leave, and in what
  order the new ones arrive. Index arithmetic only, prepared ahead together with the plan.
- [`HostTensors`] and [`DeviceTensors`] read and write the values of the members' tensors, on a CPU and elsewhere.
- [`Wire`] is the one collective: for each pair of processes a header and, behind it, the bytes of the values that go
  from members of the one to members of the other.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from .plan import Plan


# Values travel as integers of their width: whatever the dtype, a value arrives bit for bit, NaN payloads included.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Plane:
    """
    Tensors that are carried in one run: the weights, or one slot of the optimizer's state, of one dtype.

    Attributes:
        slot (`str`, *optional*):
            The key in the optimizer's state, or `None` for the weights.
        dtype (`torch.dtype`):
            The dtype of the values.
        tensors (`tuple[int, ...]`):
            Which of the shuffled parameters have it, ascending.
    """

    slot: str | None
    dtype: torch.dtype
    tensors: tuple[int, ...]


class Selection(NamedTuple):
    """
    What a route depends on beside the plan: the tensors to be carried, and how they lie in memory.

    Attributes:
        tensors (`tuple[int, ...]`):
            Which of the shuffled parameters, ascending.
        strided (`tuple`):
            For each local member, the tensors that are not contiguous (channels_last, say): their number, shape and
            strides in elements.
    """

    tensors: tuple[int, ...]
    strided: tuple[tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...], ...]


@dataclass(frozen=True)
class Route:
    """
    What a plan means for the members of one process.

    The process gathers, member after member and tensor after tensor, the values that it gives away. In a population a
    member receives exactly where it gives, so the same places are written afterwards.

    Attributes:
        pieces (`list[list[tuple[int, int, int, numpy.ndarray]]]`):
            For each local member: the tensor, where its values start and stop among the gathered ones, and where they
            lie in the tensor's memory, in elements from its first.
        bounds (`list[int]`):
            Where each local member's values start among the gathered ones, of length `num_local + 1`.
        send_order (`numpy.ndarray`, *optional*):
            The order in which the gathered values leave: by process of destination, then source member, destination
            member and coordinate. `None`: as they were gathered.
        arrival_order (`numpy.ndarray`, *optional*):
            For each place to be written, the number of its value among those that arrive. They arrive by process of
            origin, then as they left. `None`: in the order of the places.
        sent (`list[int]`), received (`list[int]`):
            How many values go to and come from each process, this one included, of length `num_processes`.
    """

    pieces: list[list[tuple[int, int, int, np.ndarray]]]
    bounds: list[int]
    send_order: np.ndarray | None
    arrival_order: np.ndarray | None
    sent: list[int]
    received: list[int]


def route(plan: Plan, selection: Selection, members: range, num_processes: int) -> Route:
    """
    Works out what a plan means for the members of one process.

    Args:
        plan ([`Plan`]):
            The plan.
        selection ([`Selection`]):
            The tensors to be carried.
        members (`range`):
            The members that live in this process; every process hosts as many, in the order of the processes.
        num_processes (`int`):
            The number of processes, W.

    Returns:
        [`Route`]: The route of these tensors.
    """
    tensors = selection.tensors
    coordinates, cuts, picked = plan.coordinates, plan.offsets, None
    if len(tensors) < len(plan.offsets) - 1:
        ranges = [np.arange(plan.offsets[tensor], plan.offsets[tensor + 1]) for tensor in tensors]
        picked = np.concatenate(ranges)
        cuts = [0, *np.cumsum([len(numbers) for numbers in ranges]).tolist()]
        coordinates = coordinates[picked]

    num_local = len(members)
    pieces, bounds, to_others, from_others = [], [0], [], []
    for member, strided in zip(members, selection.strided, strict=True):
        sources, destinations = plan.sources(member), plan.destinations(member)
        if picked is not None:
            sources, destinations = sources[picked], destinations[picked]
        given, given_cuts = coordinates, cuts
        if plan.num_members > 2:
            # Fixed points stay out. With two members there are none: every moved coordinate is swapped.
            moved = np.flatnonzero(sources != member)
            given, sources, destinations = coordinates[moved], sources[moved], destinations[moved]
            given_cuts = np.searchsorted(moved, cuts).tolist()
        begin = bounds[-1]
        layouts = {tensor: layout for tensor, *layout in strided}
        pieces.append(
            [
                (
                    tensor,
                    begin + start,
                    begin + stop,
                    storage_offsets(given[start:stop], *layouts[tensor]) if tensor in layouts else given[start:stop],
                )
                for tensor, start, stop in zip(tensors, given_cuts[:-1], given_cuts[1:], strict=True)
                if start < stop
            ]
        )
        bounds.append(begin + len(given))
        # Numbers for (other process, source, destination), so that a stable sort leaves coordinates ascending in each.
        source, destination = sources.astype(np.int64), destinations.astype(np.int64)
        to_others.append(
            (destination // num_local * num_local + member % num_local) * num_local + destination % num_local
        )
        from_others.append((source // num_local * num_local + source % num_local) * num_local + member % num_local)

    if num_processes == num_local * 2 == 2:
        counts = [0 if process == members.start else bounds[-1] for process in range(2)]
        return Route(pieces, bounds, None, None, counts, counts)
    leaving, arriving = np.concatenate(to_others), np.concatenate(from_others)
    send_order, arrival_order = _stable_order(leaving), np.empty(len(arriving), dtype=np.int64)
    arrival_order[_stable_order(arriving)] = np.arange(len(arriving))
    sent = np.bincount(leaving // num_local**2, minlength=num_processes).tolist()
    received = np.bincount(arriving // num_local**2, minlength=num_processes).tolist()
    if num_processes == 1:
        # Nothing leaves, so one reordering does for both.
        return Route(pieces, bounds, None, send_order[arrival_order], sent, received)
    return Route(pieces, bounds, send_order, arrival_order, sent, received)


def _stable_order(keys: np.ndarray) -> np.ndarray:
    # For 16 bits NumPy has a radix sort. Larger keys need more than 65,536 pairs of members.
    return np.argsort(keys.astype(np.uint16) if int(keys.max(initial=0)) < 2**16 else keys, kind="stable")


def storage_offsets(coordinates: np.ndarray, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """
    Where coordinates of a strided tensor lie in its memory.

    Args:
        coordinates (`numpy.ndarray`):
            Indices into the flattened tensor, in logical (row-major) order.
        shape (`Sequence[int]`), strides (`Sequence[int]`):
            The tensor's shape and its strides in elements, of equal length.

    Returns:
        `numpy.ndarray`: Elements from the tensor's first, int64, of the shape of `coordinates`.
    """
    rest, offsets = coordinates, np.zeros_like(coordinates)
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1:
            quotient = rest // size
            offsets += (rest - quotient * size) * stride
            rest = quotient
    return offsets


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether two coordinates of a tensor may share their memory, as they do in an expanded one."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _storage(tensor: torch.Tensor) -> torch.Tensor:
    """The memory between a tensor's first and last element, as integers of shape `(span,)`."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=_BITS[tensor.element_size()], device=tensor.device)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((span,), (1,), tensor.storage_offset()).view(_BITS[tensor.element_size()])


# Gives, for a plane and a local member, the tensors in the plane's order; None for one that does not exist (yet).
TensorsOf = Callable[[Plane, int], list[torch.Tensor | None]]


class _MemberTensors:
    """
    Views of the memory of the local members' tensors, kept from one shuffle to the next.

    Args:
        tensors_of (`Callable`):
            Gives, for a plane and a local member, the tensors in the plane's order; `None` for one that is missing.
        num_local (`int`):
            The number of members in this process.
        device (`torch.device`):
            Where the tensors are.
    """

    def __init__(self, tensors_of: TensorsOf, num_local: int, device: torch.device):
        self._tensors_of = tensors_of
        self._num_local = num_local
        self._device = device
        self._addresses: dict[tuple[Plane, int], list[int]] = {}
        self._views: dict[tuple[Plane, int], dict[int, torch.Tensor]] = {}
        self._strided: dict[tuple[Plane, int], tuple] = {}

    def select(self, plane: Plane) -> Selection:
        """
        Brings the views of a plane's tensors up to date, and says how the tensors lie in memory.

        A tensor that has got other memory since the last shuffle (a changed memory format, a state that was loaded) is
        noticed by its address. The view keeps the old memory alive until then, so nothing else can get that address.
        """
        for local in range(self._num_local):
            tensors = self._tensors_of(plane, local)
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            if self._addresses.get((plane, local)) != addresses:
                present = [(n, t) for n, t in zip(plane.tensors, tensors, strict=True) if t is not None]
                self._views[plane, local] = {number: _storage(tensor) for number, tensor in present}
                self._strided[plane, local] = tuple(
                    (number, tuple(tensor.shape), tensor.stride())
                    for number, tensor in present
                    if not tensor.is_contiguous()
                )
                self._addresses[plane, local] = addresses
                self._changed(plane, local)
        return Selection(plane.tensors, tuple(self._strided[plane, local] for local in range(self._num_local)))

    def _changed(self, plane: Plane, local: int) -> None:
        """Called when the views of a plane of a local member are new."""


class HostTensors(_MemberTensors):
    """
    Reads and writes the members' tensors on a CPU.

    NumPy takes and puts a few dozen elements of each of a hundred tensors four to ten times faster than torch does,
    whose cost per call is larger.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._arrays: dict[tuple[Plane, int], dict[int, np.ndarray]] = {}

    def _changed(self, plane: Plane, local: int) -> None:
        self._arrays[plane, local] = {number: view.numpy() for number, view in self._views[plane, local].items()}

    def gather(self, plane: Plane, path: Route) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Reads the values that the local members give.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The values' bits, of shape `(bounds[-1],)`, zeros where a tensor is
            missing; and, for each local member, whether one of its values is NaN or infinite, of shape `(num_local,)`.
        """
        values = torch.empty(path.bounds[-1], dtype=_BITS[plane.dtype.itemsize])
        out = values.numpy()
        for local, pieces in enumerate(path.pieces):
            arrays = self._arrays[plane, local]
            for number, start, stop, places in pieces:
                if number in arrays:
                    # Any mode but "raise" lets NumPy write into `out` without a copy; no place is out of range.
                    arrays[number].take(places, out=out[start:stop], mode="clip")
                else:
                    out[start:stop] = 0
        return values, _non_finite(plane, path, values)

    def scatter(self, plane: Plane, path: Route, values: torch.Tensor) -> None:
        """Writes values, of the shape and order that were gathered, to where those came from."""
        new = values.numpy()
        for local, pieces in enumerate(path.pieces):
            arrays = self._arrays[plane, local]
            for number, start, stop, places in pieces:
                if number in arrays:
                    arrays[number][places] = new[start:stop]


class DeviceTensors(_MemberTensors):
    """Reads and writes the members' tensors with torch alone, on any device. Methods are those of [`HostTensors`]."""

    def gather(self, plane: Plane, path: Route) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.zeros(path.bounds[-1], dtype=_BITS[plane.dtype.itemsize], device=self._device)
        for storage, places, piece in self._pieces(plane, path, values):
            torch.index_select(storage, 0, places, out=piece)
        return values, _non_finite(plane, path, values)

    def scatter(self, plane: Plane, path: Route, values: torch.Tensor) -> None:
        for storage, places, piece in self._pieces(plane, path, values):
            storage.index_copy_(0, places, piece)

    def _pieces(self, plane: Plane, path: Route, values: torch.Tensor):
        # One copy to the device for all tensors: a hundred small ones would cost more than the shuffle itself.
        places = [place for pieces in path.pieces for *_, place in pieces]
        if not places:
            return
        uploaded = to_device(np.concatenate(places), self._device)
        for local, pieces in enumerate(path.pieces):
            views = self._views[plane, local]
            for number, start, stop, _ in pieces:
                if number in views:
                    yield views[number], uploaded[start:stop], values[start:stop]


def _non_finite(plane: Plane, path: Route, values: torch.Tensor) -> torch.Tensor:
    flags = []
    for start, stop in zip(path.bounds[:-1], path.bounds[1:], strict=True):
        numbers = values[start:stop].view(plane.dtype)
        if plane.dtype.itemsize == 1:
            # torch 2.15 has no isfinite for 8-bit floats.
            numbers = numbers.float()
        # A sum is finite unless a value is not, or it overflows: then every value is looked at. One pass instead of four.
        if values.device.type == "cpu" and math.isfinite(numbers.sum(dtype=torch.float64)):
            flags.append(torch.tensor(False))
        else:
            flags.append(~numbers.isfinite().all())
    return torch.stack(flags)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to a device; to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def reorder(values: torch.Tensor, indices: np.ndarray | None) -> torch.Tensor:
    """`values[indices]`, or the values themselves where there is nothing to reorder."""
    return values if indices is None else values.index_select(0, to_device(indices, values.device))


@dataclass(frozen=True)
class Cargo:
    """
    A plane's values on their way.

    Attributes:
        plane ([`Plane`]), path ([`Route`]):
            What they are, and where they come from and go to.
        values (`torch.Tensor`):
            Their bits, as gathered, of shape `(path.bounds[-1],)`.
    """

    plane: Plane
    path: Route
    values: torch.Tensor


class Wire:
    """
    The collective: one all-to-all of bytes, in which each pair of processes exchanges a header and values.

    Over gloo the receiver posts room for more than it expects, since a message larger than that makes gloo abort the
    process (torch 2.15), and processes whose plans differ are to find out by the header. What is sent is exactly the
    headers and the values.

    Args:
        group (`torch.distributed.ProcessGroup`):
            The processes.
        device (`torch.device`):
            Where the group's backend sends from.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.device = device
        self._roomy = device.type == "cpu" and "gloo" in str(dist.get_backend(group))

    def exchange(
        self, header: torch.Tensor, cargos: Sequence[Cargo], room: int
    ) -> tuple[torch.Tensor, list[torch.Tensor], int, float]:
        """
        Sends every process this one's header and the values for its members, and receives the same.

        Args:
            header (`torch.Tensor`):
                int64, of shape `(header_words,)`, on the wire's device.
            cargos (`Sequence[Cargo]`):
                What is to be carried.
            room (`int`):
                How many bytes of values another process may send if its plan differs from this one's.

        Returns:
            `tuple`: The headers, int64 of shape `(num_processes, header_words)`, this process's own among them; for
            each cargo the values that its members get, as they are to be scattered; the bytes sent; and the seconds
            spent in the collective.
        """
        head = 8 * len(header)
        header_bytes = header.view(torch.uint8)
        others = [process for process in range(self.size) if process != self.rank]
        leaving, expected = [], [head] * self.size
        for cargo in cargos:
            width = cargo.values.element_size()
            values = reorder(cargo.values, cargo.path.send_order).to(self.device)
            leaving.append(values.view(torch.uint8).split([width * count for count in cargo.path.sent]))
            expected = [size + width * count for size, count in zip(expected, cargo.path.received, strict=True)]
        send = torch.cat([p for other in others for p in (header_bytes, *(pieces[other] for pieces in leaving))])
        send_sizes = [head + sum(len(pieces[process]) for pieces in leaving) for process in range(self.size)]
        receive_sizes = [max(size, head + room) if self._roomy else size for size in expected]
        send_sizes[self.rank] = receive_sizes[self.rank] = 0
        receive = torch.empty(sum(receive_sizes), dtype=torch.uint8, device=self.device)
        messages = receive.split(receive_sizes)
        for other in others:
            # Should nothing arrive, then what this memory held before must not pass for a header.
            messages[other][:head].zero_()

        before = time.perf_counter()
        dist.all_to_all_single(receive, send, receive_sizes, send_sizes, group=self.group)
        waited = time.perf_counter() - before

        headers = [header_bytes if process == self.rank else messages[process][:head] for process in range(self.size)]
        read = [head] * self.size
        arrived = []
        for cargo, pieces in zip(cargos, leaving, strict=True):
            coming = []
            for process, count in enumerate(cargo.path.received):
                length = cargo.values.element_size() * count
                message = messages[process][read[process] : read[process] + length]
                coming.append(pieces[process] if process == self.rank else message)
                read[process] += length
            # A copy, which also aligns the values: a message of 16-bit values may end anywhere.
            values = torch.cat(coming).view(cargo.values.dtype).to(cargo.values.device)
            arrived.append(reorder(values, cargo.path.arrival_order))
        return torch.cat(headers).view(torch.int64).view(self.size, -1), arrived, sum(send_sizes), waited


def room_for_values(expected: float, num_local: int, width: int) -> int:
    """
    Bytes that hold what any plan of a run sends from one process to another.

    The number of values is a sum of independent counts of at most `num_local` each: twelve standard deviations and a
    constant for small means are more than any draw will ask for.

    Args:
        expected (`float`):
            The mean number of values.
        num_local (`int`):
            The number of members in each process.
        width (`int`):
            The bytes of a value.

    Returns:
        `int`: The room in bytes.
    """
    return width * math.ceil(expected + 12 * num_local * math.sqrt(expected) + 64 * num_local)
