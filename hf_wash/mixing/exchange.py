"""
Carrying the values of a plan: out of the tensors, from process to process, and into the tensors again.

`plan.py` says what moves, and `wash.py` when and whether; nothing here decides anything. Two things are kept apart:

- a [`Route`] is the plan as one process sees it: which values its members give, in what order they leave, and where
  those that come are to land. Index arithmetic only, prepared ahead together with the plan.
- a [`HostShipment`] or [`DeviceShipment`] reads the values out of the members' tensors, on a CPU or elsewhere, hands
  them over and writes what came. Where the tensors lie, `memory.py` knows; how bytes get to other processes, `wire.py`.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from .memory import BITS, Selection, Views, storage_offsets
from .plan import Plan
from .wire import BAD, DIGEST, FLAGS, MISSING, Messages, Wire


# From so many on, indices are kept in 32 bits.
_MANY = 2**18

_NUMPY_FLOATS = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


@dataclass(frozen=True)
class Route:
    """
    What a plan means for the members of one process.

    The process gathers, member after member and tensor after tensor, the values that it gives away. In a population a
    member receives exactly where it gives, so the same places are written afterwards.

    Attributes:
        offsets (`numpy.ndarray`):
            Where the values lie in their tensors' memory, in elements from the first, of shape `(num_values,)`.
        counts (`numpy.ndarray`):
            How many there are of each tensor, member after member, int64 of shape `(num_local · num_tensors,)`.
        leaving (`numpy.ndarray`, *optional*):
            The order in which the gathered values leave: by process of destination, then source member, destination
            member and coordinate. `None`: as they were gathered.
        landing (`numpy.ndarray`, *optional*):
            Which of the places to be written each value is for, in the order in which the values come: by process of
            origin, then as they left. `None`: in the order of the places. With one process `leaving` is chosen so.
        sent (`list[int]`), received (`list[int]`):
            How many values go to and come from each process, this one included, of length `num_processes`.
        moved (`int`):
            How many values of these tensors change owner, over all members of the population.
    """

    offsets: np.ndarray
    counts: np.ndarray
    leaving: np.ndarray | None
    landing: np.ndarray | None
    sent: list[int]
    received: list[int]
    moved: int


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
    coordinates, cuts, picked = _of_tensors(plan.coordinates, plan.offsets, selection.tensors)
    num_local = len(members)
    offsets, counts, to_others, from_others = [], [], [], []
    for member, strided in zip(members, selection.strided, strict=True):
        given, given_cuts = coordinates, cuts
        if num_processes < 2 or plan.num_members > 2:
            sources, destinations = plan.sources(member), plan.destinations(member)
            if picked is not None:
                sources, destinations = sources[picked], destinations[picked]
            if plan.num_members > 2:
                # Fixed points stay out. With two members there are none: every moved coordinate is swapped.
                others = np.flatnonzero(sources != member)
                given, sources, destinations = coordinates[others], sources[others], destinations[others]
                given_cuts = np.searchsorted(others, cuts)
            # Numbers for (other process, source, destination): a stable sort leaves coordinates ascending in each.
            other = np.arange(plan.num_members, dtype=_key_type(plan.num_members * num_local))
            process, place = np.divmod(other, other.dtype.type(num_local))
            own = member % num_local
            to_others.append(((process * num_local + own) * num_local + place).take(destinations))
            from_others.append(((process * num_local + place) * num_local + own).take(sources))
        offsets.append(_compact(_in_memory(given, given_cuts, strided)))
        counts.append(given_cuts[1:] - given_cuts[:-1])

    where = offsets[0] if num_local == 1 else np.concatenate(offsets)
    how_many = counts[0] if num_local == 1 else np.concatenate(counts)
    all_moved = plan.values_moved(picked)
    if not to_others:
        # Two members in two processes: all that is given goes to the other one, in the order of the coordinates.
        by_process = [0 if process == members.start else len(where) for process in range(2)]
        return Route(where, how_many, None, None, by_process, by_process, all_moved)
    (leaving, sent), (landing, received) = (
        _sorted_by_process(np.concatenate(keys), num_local, num_processes) for keys in (to_others, from_others)
    )
    if num_processes == 1:
        # Nothing leaves, so one reordering does for both.
        order = np.empty_like(leaving)
        order[landing] = leaving
        return Route(where, how_many, order, None, sent, received, all_moved)
    return Route(where, how_many, leaving, landing, sent, received, all_moved)


def route_of_means(coordinates: np.ndarray, cuts: np.ndarray, selection: Selection) -> Route:
    """
    The route of values that every local member gives at the same coordinates, and gets back at these.

    Args:
        coordinates (`numpy.ndarray`), cuts (`numpy.ndarray`):
            As [`Planner.select`] gives them.
        selection ([`Selection`]):
            The tensors to be carried.

    Returns:
        [`Route`]: The route of these tensors. Nothing leaves the process by it.
    """
    given, cuts, _ = _of_tensors(coordinates, cuts, selection.tensors)
    offsets = [_compact(_in_memory(given, cuts, strided)) for strided in selection.strided]
    num_local, counts = len(offsets), cuts[1:] - cuts[:-1]
    if num_local == 1:
        return Route(offsets[0], counts, None, None, [len(given)], [len(given)], len(given))
    values = num_local * len(given)
    return Route(np.concatenate(offsets), np.tile(counts, num_local), None, None, [values], [values], values)


def _of_tensors(
    coordinates: np.ndarray, cuts: np.ndarray, tensors: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The coordinates of some tensors, where each tensor's start among them, and which they are: `None` for all."""
    if len(tensors) == len(cuts) - 1:
        return coordinates, cuts, None
    ranges = [np.arange(cuts[tensor], cuts[tensor + 1]) for tensor in tensors]
    picked = np.concatenate(ranges)
    return coordinates[picked], np.cumsum([0, *map(len, ranges)]), picked


def _in_memory(coordinates: np.ndarray, cuts: np.ndarray, strided: Sequence[tuple]) -> np.ndarray:
    """Where coordinates lie in the memory of their tensors, of which some are not contiguous."""
    if strided:
        coordinates = coordinates.copy()
        for tensor, *layout in strided:
            piece = coordinates[cuts[tensor] : cuts[tensor + 1]]
            piece[:] = storage_offsets(piece, *layout)
    return coordinates


def _key_type(num_keys: int) -> type[np.integer]:
    # For 16 bits NumPy has a radix sort. More than 65,536 pairs of members need more.
    return np.uint16 if num_keys <= 2**16 else np.int64


def _sorted_by_process(keys: np.ndarray, num_local: int, num_processes: int) -> tuple[np.ndarray, list[int]]:
    """The numbers of the keys in their order, and how many keys each process has: `num_local²` in a row are of one."""
    counts = [len(keys)]
    if num_processes > 1:
        counts = np.bincount(keys // num_local**2, minlength=num_processes).tolist()
    return _compact(np.argsort(keys, kind="stable")), counts


def _compact(numbers: np.ndarray) -> np.ndarray:
    """The same numbers in 32 bits where there are many, to save memory."""
    if len(numbers) > _MANY and int(numbers.max()) < 2**31:
        return numbers.astype(np.int32)
    return numbers


class HostShipment:
    """
    What one shuffle carries between tensors on a CPU.

    All that does not depend on the values is worked out when it is made, together with the plan: buffers, and what is
    read from and written to where.

    Args:
        views (`Sequence[Views]`):
            The planes.
        paths (`Sequence[Route]`):
            Their routes.
        wire ([`Wire`], *optional*):
            The way to the other processes, if there are any.
        header_words (`int`):
            The length of a header, in int64.
        room (`int`):
            See [`Messages`].
    """

    def __init__(
        self, views: Sequence[Views], paths: Sequence[Route], wire: Wire | None, header_words: int, room: int
    ):
        self.views = tuple(views)
        self.volumes = [_volume(view, path) for view, path in zip(views, paths, strict=True)]
        self._wire = wire
        self._paths = list(paths)
        self._touched = _touched(views, paths)
        # For each plane: places in the space, and the values that are read there, and written there.
        self._reads: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in views]
        self._writes: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in views]
        places = [view.places(path.offsets, path.counts) for view, path in zip(views, paths, strict=True)]
        if wire is None:
            for plane, (view, path, here) in enumerate(zip(views, paths, places, strict=True)):
                values = np.empty(len(here), dtype=_unsigned(view))
                self._reads[plane].append((here if path.leaving is None else here[path.leaving], values))
                self._writes[plane].append((here, values))
            return
        layout = Messages(wire, 8 * header_words, _loads(views, paths), room)
        self._sizes = layout.receive_sizes, layout.send_sizes
        sent, received = (np.empty(sum(sizes), np.uint8) for sizes in (layout.send_sizes, layout.receive_sizes))
        self._buffers = torch.from_numpy(received), torch.from_numpy(sent)
        self._headers_out = [sent[place].view(np.int64) for place in layout.headers_out.values()]
        self._headers_in = {process: received[place].view(np.int64) for process, place in layout.headers_in.items()}
        for header in self._headers_in.values():
            # Should nothing arrive, then what this memory held before must not pass for a header.
            header[:] = 0
        for plane, (view, path, here) in enumerate(zip(views, paths, places, strict=True)):
            sources, destinations = (
                _by_process(here, order, counts)
                for order, counts in ((path.leaving, path.sent), (path.landing, path.received))
            )
            for process in range(wire.size):
                if process == wire.rank:
                    own = np.empty(path.sent[process], dtype=_unsigned(view))
                    outgoing, incoming = own, own
                else:
                    outgoing = sent[layout.values_out[plane][process]].view(_unsigned(view))
                    incoming = received[layout.values_in[plane][process]].view(_unsigned(view))
                if len(outgoing):
                    self._reads[plane].append((sources[process], outgoing))
                if len(incoming):
                    self._writes[plane].append((destinations[process], incoming))

    def stale(self) -> bool:
        """Whether one of the tensors that are read has got other memory since it was looked at."""
        return _stale(*self._touched)

    def gather(self, header: np.ndarray) -> np.ndarray:
        """
        Reads the values that the local members give.

        Args:
            header (`numpy.ndarray`):
                int64, of shape `(header_words,)`, with no bit set from `BAD` on.

        Returns:
            `numpy.ndarray`: The header, with the bits set of the members of whose values one is NaN or infinite.
        """
        for view, path, reads in zip(self.views, self._paths, self._reads, strict=True):
            for places, values in reads:
                # Any mode but "raise" lets NumPy write into `out`; no place is out of range.
                view.space.take(places, out=values, mode="clip")
                finite = _are_finite(values, view.plane.dtype)
                if np.count_nonzero(finite) < len(finite):
                    for member in view.members_at(places[~finite], path.offsets, path.counts).tolist():
                        header[BAD + member // 64] |= np.int64(np.uint64(1 << member % 64).view(np.int64))
        return header

    def exchange(self, header: np.ndarray) -> tuple[list[list[int]], int, float]:
        """
        Sends every process this one's header and the values for its members, and receives the same.

        Args:
            header (`numpy.ndarray`):
                int64, of shape `(header_words,)`.

        Returns:
            `tuple`: The headers of all processes, this one's among them; the bytes sent; and the seconds spent in the
            collective.
        """
        if self._wire is None:
            return [header.tolist()], 0, 0.0
        for place in self._headers_out:
            place[:] = header
        waited = self._wire.exchange(*self._buffers, *self._sizes)
        rank = self._wire.rank
        headers = [
            (header if process == rank else self._headers_in[process]).tolist() for process in range(self._wire.size)
        ]
        return headers, sum(self._sizes[1]), waited

    def ship(self, header: np.ndarray) -> tuple[list[list[int]], int, float]:
        """[`HostShipment.gather`] and [`HostShipment.exchange`]."""
        return self.exchange(self.gather(header))

    def keep_only(self, num_planes: int) -> None:
        """Leaves all but the first planes as they are."""
        self.views, self.volumes = self.views[:num_planes], self.volumes[:num_planes]
        self._paths, self._writes = self._paths[:num_planes], self._writes[:num_planes]

    def held(self) -> list[torch.Tensor]:
        """
        Where nothing leaves the process, the values of each plane between gathering and scattering, of shape
        `(num_values,)`: what is written into them is what [`HostShipment.scatter`] writes.
        """
        planes = zip(self.views, self._writes, strict=True)
        return [torch.from_numpy(values.view(f"i{view.plane.dtype.itemsize}")).view(view.plane.dtype)
                for view, ((_, values),) in planes]  # fmt: skip

    def scatter(self) -> None:
        """Writes what has arrived to where as much was gathered."""
        for view, writes in zip(self.views, self._writes, strict=True):
            for places, values in writes:
                view.space[places] = values


class DeviceShipment:
    """
    As [`HostShipment`], for tensors on any device.

    On a GPU one kernel reads and one writes all values of a plane (`fused.py`). Elsewhere torch goes from tensor to tensor.
    Headers are tensors on the wire's device, so that nothing needs to be waited for.
    """

    def __init__(
        self, views: Sequence[Views], paths: Sequence[Route], wire: Wire | None, header_words: int, room: int
    ):
        self.views = tuple(views)
        self.volumes = [_volume(view, path) for view, path in zip(views, paths, strict=True)]
        self._paths = list(paths)
        self._wire = wire
        self._touched = _touched(views, paths)
        self._itineraries = [_itinerary(view, path) for view, path in zip(views, paths, strict=True)]
        self._uploaded: list[dict[str, torch.Tensor]] = []
        self._values: list[torch.Tensor] = []
        self._arrived: list[torch.Tensor] = []
        if wire is not None:
            self._messages = Messages(wire, 8 * header_words, _loads(views, paths), room)

    def stale(self) -> bool:
        return _stale(*self._touched)

    def gather(self, header: np.ndarray) -> torch.Tensor:
        wired = self._wire.device if self._wire is not None else torch.device("cpu")
        sent_header = to_device(header, self.views[0].device if self.views else wired)
        self._values, self._uploaded = [], []
        for view, path, itinerary in zip(self.views, self._paths, self._itineraries, strict=True):
            # One copy to the device for each plane: a hundred small ones would cost more than the shuffle itself.
            parts = to_device(np.concatenate(list(itinerary.values())), view.device)
            lengths = [len(array) for array in itinerary.values()]
            uploaded = dict(zip(itinerary, parts.split(lengths), strict=True))
            values = torch.zeros(len(path.offsets), dtype=BITS[view.plane.dtype.itemsize], device=view.device)
            fused = kernels(view.device)
            if fused is not None and "places" in uploaded:
                longest = int(np.diff(itinerary["bounds"]).max())
                fused.gather(
                    uploaded["places"], uploaded["bounds"], longest, values, sent_header[BAD:], view.plane.dtype
                )
            else:
                for storage, offsets, piece in _pieces(view, path, uploaded["offsets"], values):
                    torch.index_select(storage, 0, offsets, out=piece)
                _note_bad(sent_header[BAD:], values.view(view.plane.dtype), itinerary["bounds"].tolist())
            self._values.append(values)
            self._uploaded.append(uploaded)
        return sent_header.to(wired) if self._wire is not None else sent_header

    def exchange(self, header: torch.Tensor) -> tuple[torch.Tensor, int, float]:
        if self._wire is None:
            self._arrived = self._values
            return header[None], 0, 0.0
        wire, layout = self._wire, self._messages
        pieces = []
        for values, path, uploaded in zip(self._values, self._paths, self._uploaded, strict=True):
            leaving = values.index_select(0, uploaded["leaving"]) if "leaving" in uploaded else values
            pieces.append(leaving.view(torch.uint8).split([values.element_size() * count for count in path.sent]))
        sent = torch.cat(
            [
                piece.to(wire.device)
                for process in layout.headers_out
                for piece in (header.view(torch.uint8), *(by_process[process] for by_process in pieces))
            ]
        )
        received = torch.zeros(sum(layout.receive_sizes), dtype=torch.uint8, device=wire.device)
        waited = wire.exchange(received, sent, layout.receive_sizes, layout.send_sizes)
        self._arrived = []
        for values, places, own in zip(self._values, layout.values_in, pieces, strict=True):
            coming = [
                own[process] if process == wire.rank else received[places[process]].to(values.device)
                for process in range(wire.size)
            ]
            # The copy also aligns the values: those of 16 bits may begin and end anywhere.
            self._arrived.append(torch.cat(coming).view(values.dtype))
        headers = [
            header if process == wire.rank else received[layout.headers_in[process]].clone().view(torch.int64)
            for process in range(wire.size)
        ]
        return torch.stack(headers), sum(layout.send_sizes), waited

    def held(self) -> list[torch.Tensor]:
        self._arrived = self._values
        return [values.view(view.plane.dtype) for view, values in zip(self.views, self._values, strict=True)]

    def ship(self, header: np.ndarray) -> tuple[torch.Tensor, int, float]:
        return self.exchange(self.gather(header))

    def keep_only(self, num_planes: int) -> None:
        self.views, self.volumes = self.views[:num_planes], self.volumes[:num_planes]
        self._paths, self._arrived = self._paths[:num_planes], self._arrived[:num_planes]
        self._values, self._uploaded = self._values[:num_planes], self._uploaded[:num_planes]

    def scatter(self, headers: torch.Tensor | None = None) -> None:
        """
        As [`HostShipment.scatter`]. With headers, on the device, nothing is written if they do not allow it, and
        nothing of the optimizer's state if some of it is missing anywhere.
        """
        fine: dict[int, torch.Tensor] = {}
        loads = zip(self.views, self._paths, self._uploaded, self._values, self._arrived, strict=True)
        for view, path, uploaded, values, arrived in loads:
            withheld = 0 if view.plane.slot is None else MISSING
            # With one process the values still have the order of the places that they were read from.
            order = uploaded.get("leaving") if self._wire is None else None
            fused = kernels(view.device)
            if fused is not None and "places" in uploaded:
                landing = uploaded.get("landing", uploaded["places"])
                fused.scatter(landing, order, arrived, headers, FLAGS, withheld, BAD)
                continue
            if order is not None:
                arrived = arrived.index_select(0, order)
            elif "landing" in uploaded:
                arrived = torch.empty_like(arrived).index_copy_(0, uploaded["landing"], arrived)
            if headers is not None:
                if withheld not in fine:
                    same, allowed = headers[:, DIGEST] == headers[0, DIGEST], headers[:, FLAGS] & withheld == 0
                    fine[withheld] = same.all() & allowed.all() & (headers[:, BAD:] == 0).all()
                arrived = torch.where(fine[withheld], arrived, values)
            for storage, offsets, piece in _pieces(view, path, uploaded["offsets"], arrived):
                storage.index_copy_(0, offsets, piece)


@functools.cache
def kernels(device: torch.device) -> ModuleType | None:
    """`fused.py`, if it is of use for a device."""
    if device.type != "cuda":
        return None
    try:
        from . import fused
    except ImportError:
        return None
    return fused if fused.works(device) else None


def _itinerary(view: Views, path: Route) -> dict[str, np.ndarray]:
    """
    What a device has to know to carry a plane, int64: where each member's values start, where they are (`places`, for
    the kernels, or else `offsets` in their tensors), in what order they leave, and where those that come are to land.
    """
    by_member = path.counts.reshape(-1, len(view.plane.tensors)).sum(axis=1)
    found = {"bounds": np.concatenate([[0], np.cumsum(by_member)])}
    if path.leaving is not None:
        found["leaving"] = path.leaving
    fused = kernels(view.device)
    if fused is not None and view.plane.dtype in fused.EXPONENTS:
        found["places"] = view.places(path.offsets, path.counts) + view.origin
        if path.landing is not None:
            found["landing"] = found["places"][path.landing]
    else:
        found["offsets"] = path.offsets
        if path.landing is not None:
            found["landing"] = path.landing
    return {name: array.astype(np.int64, copy=False) for name, array in found.items()}


def _pieces(
    view: Views, path: Route, offsets: torch.Tensor, values: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each tensor that there is and of which something moves: its memory, where in it, and the values."""
    counts = path.counts.tolist()
    for tensor, storage, where, piece in zip(
        view.tensors, view.storages, offsets.split(counts), values.split(counts), strict=True
    ):
        if tensor is not None and len(piece):
            yield storage, where, piece


def _note_bad(words: torch.Tensor, values: torch.Tensor, bounds: list[int]) -> None:
    """Sets the bits of the members that give NaN or infinite values; on the device, so that nothing is waited for."""
    finite = _isfinite(values)
    flags = torch.stack([~finite[start:stop].all() for start, stop in itertools.pairwise(bounds)]).to(torch.int64)
    bits = flags << torch.arange(len(flags), device=words.device) % 64
    words |= torch.nn.functional.pad(bits, (0, -len(bits) % 64)).view(-1, 64).sum(dim=1)


def _unsigned(view: Views) -> str:
    return f"u{view.plane.dtype.itemsize}"


def _loads(views: Sequence[Views], paths: Sequence[Route]) -> list[tuple[int, list[int], list[int]]]:
    return [(view.plane.dtype.itemsize, path.sent, path.received) for view, path in zip(views, paths, strict=True)]


def _volume(view: Views, path: Route) -> tuple[int, int, int, int]:
    """The values and bytes that members of this process get from others, and those that all members get."""
    width = view.plane.dtype.itemsize
    return len(path.offsets), len(path.offsets) * width, path.moved, path.moved * width


def _by_process(places: np.ndarray, order: np.ndarray | None, counts: list[int]) -> list[np.ndarray]:
    """Splits places, in the order in which their values travel, by process."""
    ordered = places if order is None else places[order]
    return [ordered[start:stop] for start, stop in itertools.pairwise(itertools.accumulate(counts, initial=0))]


def _touched(views: Sequence[Views], paths: Sequence[Route]) -> tuple[list[torch.Tensor], list[int]]:
    """The tensors that are read and written, and where they were when they were looked at."""
    tensors: list[torch.Tensor] = []
    addresses: list[int] = []
    for view, path in zip(views, paths, strict=True):
        used = (path.counts if view.exists is None else path.counts * view.exists).tolist()
        tensors += [tensor for tensor, count in zip(view.tensors, used, strict=True) if tensor is not None and count]
        addresses += itertools.compress(view.addresses, used)
    return tensors, addresses


def _stale(tensors: list[torch.Tensor], addresses: list[int]) -> bool:
    return [tensor.data_ptr() for tensor in tensors] != addresses


def _are_finite(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype in _NUMPY_FLOATS:
        return np.isfinite(values.view(_NUMPY_FLOATS[dtype]))
    # The copy is aligned, which torch needs.
    return _isfinite(torch.from_numpy(values.copy()).view(dtype)).numpy()


def _isfinite(values: torch.Tensor) -> torch.Tensor:
    # torch 2.15 has no isfinite for 8-bit floats.
    return (values.float() if values.element_size() == 1 else values).isfinite()


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to a device; to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
