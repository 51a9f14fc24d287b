"""
Carrying the values of a plan: out of the tensors, from process to process, and into the tensors again.

`plan.py` says what moves, and `wash.py` when and whether; nothing here decides anything. Three things are kept apart:

- a [`Route`] is the plan as one process sees it: which values its members give, in what order they leave, and in what
  order the new ones arrive. Index arithmetic only, prepared ahead together with the plan.
- [`HostTensors`] and [`DeviceTensors`] read and write the values of the members' tensors, on a CPU and elsewhere.
- [`Wire`] is the one collective: for each pair of processes a header and, behind it, the bytes of the values that go
  from members of the one to members of the other.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from .plan import Plan


# `numpy.ndarray` where the values are on a CPU, else `torch.Tensor`: slices, views and assignments read alike in both,
# and a NumPy call costs a microsecond less than one of torch, where dozens of calls are needed for a shuffle.
Array = Any

# Values travel as integers of their width: whatever the dtype, a value arrives bit for bit, NaN payloads included.
_NUMPY_FLOATS = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
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

    def __hash__(self):
        # Planes are looked up often, and few differ in the tensors alone.
        return hash((self.slot, self.dtype))


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
        given, given_cuts = coordinates, cuts
        if num_processes < 2 or plan.num_members > 2:
            sources, destinations = plan.sources(member), plan.destinations(member)
            if picked is not None:
                sources, destinations = sources[picked], destinations[picked]
            if plan.num_members > 2:
                # Fixed points stay out. With two members there are none: every moved coordinate is swapped.
                moved = np.flatnonzero(sources != member)
                given, sources, destinations = coordinates[moved], sources[moved], destinations[moved]
                given_cuts = np.searchsorted(moved, cuts).tolist()
            # Numbers for (other process, source, destination): a stable sort leaves coordinates ascending in each.
            to, origin = destinations.astype(np.int64), sources.astype(np.int64)
            to_others.append((to // num_local * num_local + member % num_local) * num_local + to % num_local)
            from_others.append((origin // num_local * num_local + origin % num_local) * num_local + member % num_local)
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

    if not to_others:
        # Two members in two processes: all that is given goes to the other one, in the order of the coordinates.
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
            addresses = [tensor.data_ptr() if tensor is not None else 0 for tensor in tensors]
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
        # By the number of the parameter, None for one that is not in the plane or is missing.
        self._arrays: dict[tuple[Plane, int], list[np.ndarray | None]] = {}

    def _changed(self, plane: Plane, local: int) -> None:
        arrays: list[np.ndarray | None] = [None] * (plane.tensors[-1] + 1)
        for number, view in self._views[plane, local].items():
            arrays[number] = view.numpy().view(f"u{plane.dtype.itemsize}")
        self._arrays[plane, local] = arrays

    def gather(self, plane: Plane, path: Route) -> tuple[np.ndarray, np.ndarray]:
        """
        Reads the values that the local members give.

        Returns:
            `tuple`: The values' bits, of shape `(bounds[-1],)`, zeros where a tensor is missing; and, for each local
            member, whether one of its values is NaN or infinite, of shape `(num_local,)`.
        """
        values = np.empty(path.bounds[-1], dtype=f"u{plane.dtype.itemsize}")
        for local, pieces in enumerate(path.pieces):
            arrays = self._arrays[plane, local]
            for number, start, stop, places in pieces:
                array = arrays[number]
                if array is None:
                    values[start:stop] = 0
                else:
                    # Any mode but "raise" lets NumPy write into `out` without a copy; no place is out of range.
                    array.take(places, out=values[start:stop], mode="clip")
        if plane.dtype in _NUMPY_FLOATS:
            finite = np.isfinite(values.view(_NUMPY_FLOATS[plane.dtype]))
        else:
            finite = _isfinite(torch.from_numpy(values).view(plane.dtype)).numpy()
        pairs = zip(path.bounds[:-1], path.bounds[1:], strict=True)
        return values, np.array([not finite[start:stop].all() for start, stop in pairs])

    def scatter(self, plane: Plane, path: Route, values: np.ndarray) -> None:
        """Writes values, of the shape and order that were gathered, to where those came from."""
        for local, pieces in enumerate(path.pieces):
            arrays = self._arrays[plane, local]
            for number, start, stop, places in pieces:
                array = arrays[number]
                if array is not None:
                    array[places] = values[start:stop]


class DeviceTensors(_MemberTensors):
    """Reads and writes the members' tensors with torch alone, on any device. Methods are those of [`HostTensors`]."""

    def gather(self, plane: Plane, path: Route) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.zeros(path.bounds[-1], dtype=_BITS[plane.dtype.itemsize], device=self._device)
        for storage, places, piece in self._pieces(plane, path, values):
            torch.index_select(storage, 0, places, out=piece)
        finite = _isfinite(values.view(plane.dtype))
        pairs = zip(path.bounds[:-1], path.bounds[1:], strict=True)
        return values, torch.stack([~finite[start:stop].all() for start, stop in pairs])

    def scatter(self, plane: Plane, path: Route, values: torch.Tensor) -> None:
        for storage, places, piece in self._pieces(plane, path, values):
            storage.index_copy_(0, places, piece)

    def _pieces(
        self, plane: Plane, path: Route, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
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


def _isfinite(values: torch.Tensor) -> torch.Tensor:
    # torch 2.15 has no isfinite for 8-bit floats.
    return (values.float() if values.element_size() == 1 else values).isfinite()


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to a device; to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def reorder(values: Array, indices: np.ndarray | None) -> Array:
    """`values[indices]`, or the values themselves where there is nothing to reorder."""
    if indices is None:
        return values
    if isinstance(values, np.ndarray):
        return values.take(indices)
    return values.index_select(0, to_device(indices, values.device))


@dataclass(frozen=True)
class Cargo:
    """
    A plane's values on their way.

    Attributes:
        plane ([`Plane`]), path ([`Route`]):
            What they are, and where they come from and go to.
        values (`numpy.ndarray` or `torch.Tensor`):
            Their bits, as gathered, of shape `(path.bounds[-1],)`.
    """

    plane: Plane
    path: Route
    values: Array


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
        self._host = device.type == "cpu"
        self._roomy = self._host and "gloo" in str(dist.get_backend(group))

    def exchange(self, header: Array, cargos: Sequence[Cargo], room: int) -> tuple[Array, list[Array], int, float]:
        """
        Sends every process this one's header and the values for its members, and receives the same.

        Args:
            header (`numpy.ndarray` or `torch.Tensor`):
                int64, of shape `(header_words,)`; an array if the wire is on a CPU.
            cargos (`Sequence[Cargo]`):
                What is to be carried.
            room (`int`):
                How many bytes of values another process may send if its plan differs from this one's.

        Returns:
            `tuple`: The headers, int64 of shape `(num_processes, header_words)`, this process's own among them; for
            each cargo the values that its members get, as they are to be scattered; the bytes sent; and the seconds
            spent in the collective.
        """
        header_bytes = self._bytes(header)
        head = len(header_bytes)
        processes = range(self.size)
        leaving, expected = [], [head] * self.size
        for cargo in cargos:
            width = cargo.plane.dtype.itemsize
            content = self._bytes(reorder(cargo.values, cargo.path.send_order))
            ends = list(itertools.accumulate((width * count for count in cargo.path.sent), initial=0))
            leaving.append([content[start:end] for start, end in itertools.pairwise(ends)])
            expected = [size + width * count for size, count in zip(expected, cargo.path.received, strict=True)]
        outgoing = [[] if p == self.rank else [header_bytes, *(pieces[p] for pieces in leaving)] for p in processes]
        send_sizes = [sum(map(len, message)) for message in outgoing]
        receive_sizes = [max(size, head + room) if self._roomy else size for size in expected]
        receive_sizes[self.rank] = 0
        send = self._cat([piece for message in outgoing for piece in message])
        receive = self._empty(sum(receive_sizes))
        starts = list(itertools.accumulate(receive_sizes, initial=0))
        for process in processes:
            if process != self.rank:
                # Should nothing arrive, then what this memory held before must not pass for a header.
                receive[starts[process] : starts[process] + head] = 0

        before = time.perf_counter()
        if self._host:
            receive_tensor, send_tensor = torch.from_numpy(receive), torch.from_numpy(send)
        else:
            receive_tensor, send_tensor = receive, send
        dist.all_to_all_single(receive_tensor, send_tensor, receive_sizes, send_sizes, group=self.group)
        waited = time.perf_counter() - before

        headers = [header_bytes if p == self.rank else receive[starts[p] : starts[p] + head] for p in processes]
        places = [start + head for start in starts[:-1]]
        arrived = []
        for cargo, pieces in zip(cargos, leaving, strict=True):
            coming = []
            for process, count in enumerate(cargo.path.received):
                length = count * cargo.plane.dtype.itemsize
                if process == self.rank:
                    coming.append(pieces[process])
                else:
                    coming.append(receive[places[process] : places[process] + length])
                    places[process] += length
            # The copy also aligns the values: those of 16 bits may begin and end anywhere.
            arrived.append(reorder(self._ashore(self._cat(coming), cargo), cargo.path.arrival_order))
        return self._cat(headers).view(header.dtype).reshape(self.size, -1), arrived, sum(send_sizes), waited

    def _bytes(self, values: Array) -> Array:
        if self._host:
            # Values on a GPU whose processes can only send from a CPU are waited for here.
            return (values.cpu().numpy() if isinstance(values, torch.Tensor) else values).view(np.uint8)
        return values.view(torch.uint8)

    def _empty(self, size: int) -> Array:
        return np.empty(size, np.uint8) if self._host else torch.empty(size, dtype=torch.uint8, device=self.device)

    def _cat(self, pieces: Sequence[Array]) -> Array:
        return np.concatenate(pieces) if self._host else torch.cat(list(pieces))

    def _ashore(self, content: Array, cargo: Cargo) -> Array:
        if isinstance(cargo.values, torch.Tensor) and isinstance(content, np.ndarray):
            content = to_device(content, cargo.values.device)
        return content.view(cargo.values.dtype)


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
