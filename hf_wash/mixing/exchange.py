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


@dataclass(frozen=True)
class Route:
    """
    What a plan means for the members of one process.

    The process gathers, member after member and tensor after tensor, the values that it gives away. In a population a
    member receives exactly where it gives, so the same places are written afterwards.

    Attributes:
        pieces (`list[list[tuple[int, int, int, numpy.ndarray]]]`):
            For each local member: the tensor, where its values start and stop among the gathered ones, and which
            coordinates of the tensor they are.
        bounds (`list[int]`):
            Where each local member's values start among the gathered ones, of length `num_local + 1`.
        send_order (`numpy.ndarray`, *optional*):
            The order in which the gathered values leave: by process of destination, then source member, destination
            member and coordinate. `None`: as they were gathered.
        arrival_order (`numpy.ndarray`, *optional*):
            For each place to be written, the number of its value among those that arrive in the order of `send_order`.
            `None`: as they arrive.
        sent (`list[int]`), received (`list[int]`):
            How many values go to and come from each process, this one included, of length `num_processes`.
    """

    pieces: list[list[tuple[int, int, int, np.ndarray]]]
    bounds: list[int]
    send_order: np.ndarray | None
    arrival_order: np.ndarray | None
    sent: list[int]
    received: list[int]


def route(plan: Plan, tensors: Sequence[int], members: range, num_processes: int) -> Route:
    """
    Works out what a plan means for the members of one process.

    Args:
        plan ([`Plan`]):
            The plan.
        tensors (`Sequence[int]`):
            The tensors to be carried, ascending.
        members (`range`):
            The members that live in this process; every process hosts as many, in the order of the processes.
        num_processes (`int`):
            The number of processes, W.

    Returns:
        [`Route`]: The route of these tensors.
    """
    num_local = len(members)
    starts = np.array([plan.offsets[tensor] for tensor in tensors], dtype=np.int64)
    stops = np.array([plan.offsets[tensor + 1] for tensor in tensors], dtype=np.int64)
    whole = len(tensors) == len(plan.offsets) - 1
    if whole:
        picked, cuts = None, [0, *stops.tolist()]
    else:
        picked = np.concatenate([np.arange(0), *map(np.arange, starts, stops)])
        cuts = [0, *np.cumsum(stops - starts).tolist()]
    coordinates = plan.coordinates if whole else plan.coordinates[picked]

    pieces, bounds, send_keys, arrival_keys = [], [0], [], []
    for member in members:
        sources, destinations = plan.sources(member), plan.destinations(member)
        if not whole:
            sources, destinations = sources[picked], destinations[picked]
        if plan.num_members == 2:
            # With two members every moved coordinate is swapped: no fixed points to leave out.
            given, given_cuts = coordinates, cuts
        else:
            moved = np.flatnonzero(sources != member)
            given, given_cuts = coordinates[moved], np.searchsorted(moved, cuts).tolist()
            sources, destinations = sources[moved], destinations[moved]
        begin = bounds[-1]
        pieces.append(
            [
                (tensor, begin + start, begin + stop, given[start:stop])
                for tensor, start, stop in zip(tensors, given_cuts[:-1], given_cuts[1:], strict=True)
                if start < stop
            ]
        )
        bounds.append(begin + len(given))
        send_keys.append(_pair_keys(sources=member, destinations=destinations, first="to", num_local=num_local))
        arrival_keys.append(_pair_keys(sources=sources, destinations=member, first="from", num_local=num_local))

    if num_processes == plan.num_members == 2:
        other = 1 - members.start
        counts = [bounds[-1] if process == other else 0 for process in range(2)]
        return Route(pieces, bounds, None, None, counts, counts)
    send_keys, arrival_keys = np.concatenate(send_keys), np.concatenate(arrival_keys)
    send_order = np.argsort(send_keys, kind="stable")
    arrival_order = np.empty_like(send_order)
    arrival_order[np.argsort(arrival_keys, kind="stable")] = np.arange(len(arrival_order))
    pairs = num_local * num_local
    return Route(
        pieces,
        bounds,
        send_order,
        arrival_order,
        np.bincount(send_keys // pairs, minlength=num_processes).tolist(),
        np.bincount(arrival_keys // pairs, minlength=num_processes).tolist(),
    )


def _pair_keys(*, sources, destinations, first: str, num_local: int) -> np.ndarray:
    """Numbers (other process, source, destination) in this order. What is equal keeps the order of its coordinates."""
    dtype = np.int64
    sources, destinations = np.asarray(sources, dtype), np.asarray(destinations, dtype)
    process = (destinations if first == "to" else sources) // num_local
    keys = (process * num_local + sources % num_local) * num_local + destinations % num_local
    # 16 bits get NumPy's radix sort. More than 65,536 pairs would be a large population in few processes.
    return (
        keys.astype(np.uint16) if num_local * num_local * 256 <= 65536 and int(keys.max(initial=0)) < 65536 else keys
    )


def storage_offsets(coordinates: np.ndarray, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """
    Where coordinates of a strided tensor lie in its storage.

    Args:
        coordinates (`numpy.ndarray`):
            Indices into the flattened tensor, in logical (row-major) order.
        shape (`Sequence[int]`), strides (`Sequence[int]`):
            The tensor's shape and its strides in elements, of equal length.

    Returns:
        `numpy.ndarray`: Elements from the tensor's first, int64, of the shape of `coordinates`.
    """
    rest = coordinates
    offsets = np.zeros_like(coordinates)
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1:
            rest, index = np.divmod(rest, size)
            offsets += index * stride
    return offsets


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether two coordinates of a tensor may share their memory, as they do in an expanded one."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _storage(tensor: torch.Tensor) -> torch.Tensor:
    """The memory between a tensor's first and last element, as integers of shape `(span,)`."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach().as_strided((span,), (1,), tensor.storage_offset())
    return flat.view(_BITS[tensor.element_size()])


class HostTensors:
    """
    Reads and writes the members' tensors on a CPU, by NumPy views of their memory.

    NumPy takes and puts a few dozen elements of each of a hundred tensors three to ten times faster than torch, whose
    cost per call is larger. Views are kept from one shuffle to the next; a tensor that has got other memory since
    (`load_state_dict`, a change of the memory format) is noticed by its address.

    Args:
        tensor (`Callable`):
            Gives the tensor of a plane's slot, a local member and a parameter's number; `None` where there is none.
    """

    def __init__(self, tensor: Callable[[str | None, int, int], torch.Tensor | None]):
        self._tensor = tensor
        self._views: dict[tuple[str | None, int, int], tuple] = {}

    def _view(self, slot: str | None, member: int, number: int) -> tuple[np.ndarray | None, tuple | None]:
        tensor = self._tensor(slot, member, number)
        if tensor is None:
            return None, None
        key = (slot, member, number)
        known = self._views.get(key)
        if known is not None and known[0] == tensor.data_ptr():
            return known[1], known[2]
        # A view keeps the memory it shows alive, so that no other tensor can have got the same address.
        view = _storage(tensor).numpy()
        strides = None if tensor.is_contiguous() else (tuple(tensor.shape), tensor.stride())
        self._views[key] = (tensor.data_ptr(), view, strides)
        return view, strides

    def gather(self, plane: Plane, path: Route) -> torch.Tensor:
        """Returns the values that the local members give, bits of shape `(bounds[-1],)`, zeros where a tensor is missing."""
        values = np.empty(path.bounds[-1], dtype=f"i{plane.dtype.itemsize}" if plane.dtype.itemsize > 1 else "u1")
        for member, pieces in enumerate(path.pieces):
            for number, start, stop, coordinates in pieces:
                view, strides = self._view(plane.slot, member, number)
                if view is None:
                    values[start:stop] = 0
                    continue
                if strides is not None:
                    coordinates = storage_offsets(coordinates, *strides)
                # Any mode but "raise" lets NumPy write into `out` without a copy. Coordinates are in range by construction.
                view.take(coordinates, out=values[start:stop], mode="clip")
        return torch.from_numpy(values)

    def scatter(self, plane: Plane, path: Route, values: torch.Tensor) -> None:
        """Writes values, in the order of [`HostTensors.gather`], where the local members gave theirs."""
        new = values.numpy()
        for member, pieces in enumerate(path.pieces):
            for number, start, stop, coordinates in pieces:
                view, strides = self._view(plane.slot, member, number)
                if view is None:
                    continue
                if strides is not None:
                    coordinates = storage_offsets(coordinates, *strides)
                view[coordinates] = new[start:stop]


class DeviceTensors:
    """
    Reads and writes the members' tensors with torch, wherever they are.

    Args:
        tensor (`Callable`):
            As for [`HostTensors`].
        device (`torch.device`):
            Where the tensors are.
    """

    def __init__(self, tensor: Callable[[str | None, int, int], torch.Tensor | None], device: torch.device):
        self._tensor = tensor
        self._device = device

    def _places(self, plane: Plane, path: Route) -> list[tuple[torch.Tensor | None, int, int, torch.Tensor]]:
        places, offsets = [], np.empty(path.bounds[-1], dtype=np.int64)
        for member, pieces in enumerate(path.pieces):
            for number, start, stop, coordinates in pieces:
                tensor = self._tensor(plane.slot, member, number)
                if tensor is not None and not tensor.is_contiguous():
                    coordinates = storage_offsets(coordinates, tensor.shape, tensor.stride())
                offsets[start:stop] = coordinates
                places.append((None if tensor is None else _storage(tensor), start, stop))
        # One copy for all tensors: a hundred small ones would cost more than the shuffle itself.
        offsets = to_device(offsets, self._device)
        return [(storage, start, stop, offsets[start:stop]) for storage, start, stop in places]

    def gather(self, plane: Plane, path: Route) -> torch.Tensor:
        """As [`HostTensors.gather`]."""
        values = torch.zeros(path.bounds[-1], dtype=_BITS[plane.dtype.itemsize], device=self._device)
        for storage, start, stop, offsets in self._places(plane, path):
            if storage is not None:
                torch.index_select(storage, 0, offsets, out=values[start:stop])
        return values

    def scatter(self, plane: Plane, path: Route, values: torch.Tensor) -> None:
        """As [`HostTensors.scatter`]."""
        for storage, start, stop, offsets in self._places(plane, path):
            if storage is not None:
                storage.index_copy_(0, offsets, values[start:stop])


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to a device; to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def non_finite(plane: Plane, path: Route, values: torch.Tensor) -> torch.Tensor:
    """
    Which local members give a value that is NaN or infinite.

    Returns:
        `torch.Tensor`: Of shape `(num_local,)`, bool, on the device of `values`.
    """
    flags = []
    for start, stop in zip(path.bounds[:-1], path.bounds[1:], strict=True):
        numbers = values[start:stop].view(plane.dtype)
        if plane.dtype.itemsize == 1:
            numbers = numbers.float()
        flags.append(~numbers.isfinite().all())
    return torch.stack(flags)


def order(values: torch.Tensor, indices: np.ndarray | None) -> torch.Tensor:
    """`values[indices]`, or `values` themselves where there is nothing to reorder."""
    if indices is None:
        return values
    return values.index_select(0, to_device(indices, values.device))


class Wire:
    """
    The collective: one all-to-all of bytes, in which each pair of processes exchanges a header and values.

    Over gloo the receiving side of each pair gets room for more than it expects, since a message that is larger than
    the room for it makes gloo abort the process (seen with torch 2.15), and processes whose plans differ are to find
    that out by the header. What is sent has exactly the length of its content.

    Args:
        group (`torch.distributed.ProcessGroup`):
            The processes.
        device (`torch.device`):
            Where buffers are: what the group's backend can send from.
        header_words (`int`):
            The length of a header in 64-bit words.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, header_words: int):
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.device = device
        self._header_bytes = 8 * header_words
        self._roomy = device.type == "cpu" and "gloo" in str(dist.get_backend(group))
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2)]

    def _buffer(self, which: int, size: int) -> torch.Tensor:
        if len(self._buffers[which]) < size:
            self._buffers[which] = torch.empty(size + size // 8, dtype=torch.uint8, device=self.device)
        return self._buffers[which][:size]

    def exchange(
        self,
        header: torch.Tensor,
        outgoing: Sequence[tuple[torch.Tensor, Route]],
        room: int,
    ) -> tuple[torch.Tensor, list[torch.Tensor], int, float]:
        """
        Sends every process its header and its values, and receives theirs.

        Args:
            header (`torch.Tensor`):
                int64 of shape `(header_words,)`, the same for every process.
            outgoing (`Sequence[tuple[torch.Tensor, Route]]`):
                For each plane, the values to be sent, in the order of the route's `send_order`, and the route.
            room (`int`):
                How many bytes of values a process may send this one if its plan differs from ours.

        Returns:
            `tuple`: The headers by process, int64 of shape `(num_processes, header_words)`; for each plane the values
            that arrived, this process's own among them; the bytes sent; the seconds spent waiting for the collective.
        """
        widths = [values.element_size() for values, _ in outgoing]
        send_sizes, receive_sizes = [], []
        for process in range(self.size):
            if process == self.rank:
                send_sizes.append(0)
                receive_sizes.append(0)
                continue
            sent = sum(width * path.sent[process] for width, (_, path) in zip(widths, outgoing, strict=True))
            expected = sum(width * path.received[process] for width, (_, path) in zip(widths, outgoing, strict=True))
            send_sizes.append(self._header_bytes + sent)
            receive_sizes.append(self._header_bytes + (max(expected, room) if self._roomy else expected))
        send = self._buffer(0, sum(send_sizes))
        receive = self._buffer(1, sum(receive_sizes))
        send_starts, receive_starts = _starts(send_sizes), _starts(receive_sizes)

        header_bytes = header.view(torch.uint8)
        bytes_out = [values.view(torch.uint8) for values, _ in outgoing]
        taken = [0] * len(outgoing)
        for process in range(self.size):
            place = send_starts[process]
            if process != self.rank:
                send[place : place + self._header_bytes] = header_bytes
                # What a header of the last shuffle left here must not be taken for one of this.
                receive[receive_starts[process] : receive_starts[process] + self._header_bytes] = 0
                place += self._header_bytes
            for plane, (_, path) in enumerate(outgoing):
                length = widths[plane] * path.sent[process]
                if process != self.rank and length:
                    send[place : place + length] = bytes_out[plane][taken[plane] : taken[plane] + length]
                    place += length
                taken[plane] += length

        before = time.perf_counter()
        dist.all_to_all_single(receive, send, receive_sizes, send_sizes, group=self.group)
        waited = time.perf_counter() - before

        headers = torch.empty(self.size, len(header), dtype=torch.int64, device=self.device)
        arrived = [torch.empty_like(values) for values, _ in outgoing]
        bytes_in = [values.view(torch.uint8) for values in arrived]
        filled, own = [0] * len(outgoing), [0] * len(outgoing)
        for plane, (_, path) in enumerate(outgoing):
            own[plane] = widths[plane] * sum(path.sent[: self.rank])
        for process in range(self.size):
            place = receive_starts[process]
            if process == self.rank:
                headers[process] = header
            else:
                headers[process].view(torch.uint8).copy_(receive[place : place + self._header_bytes])
                place += self._header_bytes
            for plane, (_, path) in enumerate(outgoing):
                length = widths[plane] * path.received[process]
                if length:
                    came = receive[place : place + length]
                    if process == self.rank:
                        came = bytes_out[plane][own[plane] : own[plane] + length]
                    bytes_in[plane][filled[plane] : filled[plane] + length] = came
                    place += length if process != self.rank else 0
                    filled[plane] += length
        return headers, arrived, sum(send_sizes), waited


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, place = [], 0
    for size in sizes:
        starts.append(place)
        place += size
    return starts


def room_for_values(expected: float, num_local: int, width: int) -> int:
    """
    Bytes that hold what any plan of a run sends from one process to another.

    The number of values is a sum of independent counts, at most `num_local`² for each coordinate: twelve standard
    deviations and a constant for small means are more than any draw will ask for.

    Args:
        expected (`float`):
            The mean number of values.
        num_local (`int`):
            The members in each process.
        width (`int`):
            The bytes that go with one coordinate of one member.

    Returns:
        `int`: The room in bytes.
    """
    return width * math.ceil(expected + 12 * num_local * math.sqrt(expected) + 64 * num_local)
