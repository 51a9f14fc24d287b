"""
Where the values of a shuffle lie in memory.

A model has a hundred tensors and more, and a shuffle wants a few dozen values of each. One call for each tensor costs
about as much as the values, so there is none: all tensors of a process are read and written by number in one *space*,
in which the place of a coordinate is the place of its tensor plus an offset. On a CPU the space is one NumPy array from
the lowest of the tensors' addresses to the highest; on a GPU a place is the address itself, and a kernel goes there.
Nothing but the tensors is ever touched, and [`Views`] keep their memory alive.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch


# Values travel as integers of their width: whatever the dtype, a value arrives bit for bit, NaN payloads included.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    What a route depends on beside the plan: the tensors to be carried, and which of them are not contiguous.

    Attributes:
        tensors (`tuple[int, ...]`):
            Which of the shuffled parameters, ascending.
        strided (`tuple`):
            For each local member, the tensors that are not contiguous (channels_last, say): their place in `tensors`,
            shape and strides in elements.
    """

    tensors: tuple[int, ...]
    strided: tuple[tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...], ...]


def planes_of(layout: Sequence[Sequence[tuple[str | None, torch.dtype]]]) -> list[Plane]:
    """Sorts the slots of all parameters into planes, in the same order on every process."""
    tensors: dict[tuple[str | None, torch.dtype], list[int]] = {}
    for number, slots in enumerate(layout):
        for slot in slots:
            tensors.setdefault(slot, []).append(number)
    return [Plane(slot, dtype, tuple(tensors[slot, dtype])) for slot, dtype in sorted(tensors, key=str)]


@dataclass(frozen=True, eq=False)
class Views:
    """
    The memory of the local members' tensors of a plane, as it lay when it was looked at.

    Attributes:
        plane ([`Plane`]):
            The plane.
        tensors (`list[torch.Tensor | None]`):
            The tensors, member after member and in the plane's order; `None` for one that does not exist (yet).
        addresses (`list[int]`):
            Where they were, in bytes; 0 for one that does not exist or is empty.
        storages (`list[torch.Tensor | None]`):
            The memory between a tensor's first and last element, as integers of shape `(span,)`. It is kept alive, so
            that nothing else can get the same address. For a tensor that does not exist, an element to spare.
        space (`numpy.ndarray`):
            On a CPU, the memory of all of them and what lies between, as unsigned integers. It must never be read or
            written but at places of the tensors, nor be copied: most of it may not exist. Elsewhere empty.
        origin (`int`):
            The address in elements at which places are counted from.
        bases (`numpy.ndarray`):
            The place of each tensor's first element, int64.
        exists (`numpy.ndarray`, *optional*):
            Which of the tensors exist, bool. `None`: all of them.
        selection ([`Selection`]):
            What a route depends on.
    """

    plane: Plane
    tensors: list[torch.Tensor | None]
    addresses: list[int]
    storages: list[torch.Tensor]
    space: np.ndarray
    origin: int
    bases: np.ndarray
    exists: np.ndarray | None
    selection: Selection

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.storages[0].device

    def places(self, offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """
        The places of coordinates in the space.

        Args:
            offsets (`numpy.ndarray`):
                In elements from their tensor's first one, tensor after tensor, of shape `(num_values,)`.
            counts (`numpy.ndarray`):
                How many are of each tensor, of the length of `tensors`.

        Returns:
            `numpy.ndarray`: int64 of shape `(num_values,)`. For a tensor that does not exist it is a place that holds
            zero and is there for nothing else.
        """
        places = np.repeat(self.bases, counts)
        if self.exists is not None:
            return np.where(np.repeat(self.exists, counts), places + offsets, places)
        places += offsets
        return places

    def members_at(self, places: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The local members, ascending, that have one of these places among those of [`Views.places`]."""
        by_member = counts.reshape(-1, len(self.plane.tensors)).sum(axis=1)
        owners = np.repeat(np.arange(len(by_member)), by_member)
        return np.unique(owners[np.isin(self.places(offsets, counts), places)])


def look(
    plane: Plane,
    tensors: Sequence[torch.Tensor | None],
    shapes: Sequence[torch.Size],
    device: torch.device,
    before: Views | None,
) -> Views:
    """
    Looks where the tensors of a plane lie.

    Args:
        plane ([`Plane`]):
            The plane.
        tensors (`Sequence[torch.Tensor | None]`):
            The tensors of the local members, member after member and in the plane's order. One that is not of the
            expected shape, dtype and device, or not aligned, counts as one that does not exist: places are worked out
            from what is expected, and would be somebody else's memory.
        shapes (`Sequence[torch.Size]`):
            The shapes that the plan was made for, in the plane's order.
        device (`torch.device`):
            The members' device.
        before ([`Views`], *optional*):
            What was seen the last time.

    Returns:
        [`Views`]: Those of before if everything is where it was. A tensor that has got other memory (a changed memory
        format, a state that was loaded) is noticed by its address.
    """
    num_local = len(tensors) // len(shapes) if shapes else 0
    tensors = [
        tensor if tensor is not None and _is(tensor, shape, plane.dtype, device) else None
        for tensor, shape in zip(tensors, list(shapes) * num_local, strict=True)
    ]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    if before is not None and addresses == before.addresses:
        same = all(old is new for old, new in zip(before.tensors, tensors, strict=True))
        return before if same else replace(before, tensors=tensors)
    spare = torch.zeros(1, dtype=BITS[plane.dtype.itemsize], device=device)
    storages = [spare if tensor is None or tensor.numel() == 0 else _storage(tensor) for tensor in tensors]
    starts = [storage.data_ptr() for storage in storages]
    space, origin = _space(storages) if device.type == "cpu" else (np.empty(0), 0)
    bases = np.array(starts, dtype=np.int64) // plane.dtype.itemsize - origin
    num_tensors = len(plane.tensors)
    strided = tuple(
        tuple(
            (place, tuple(tensor.shape), tensor.stride())
            for place, tensor in enumerate(tensors[local * num_tensors : (local + 1) * num_tensors])
            if tensor is not None and not tensor.is_contiguous()
        )
        for local in range(num_local)
    )
    exists = np.array([tensor is not None for tensor in tensors])
    return Views(
        plane=plane,
        tensors=tensors,
        addresses=addresses,
        storages=storages,
        space=space,
        origin=origin,
        bases=bases,
        exists=None if exists.all() else exists,
        selection=Selection(plane.tensors, strided),
    )


def _is(tensor: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    return tensor.dtype == dtype and tensor.shape == shape and tensor.device == device and aligned(tensor)


def _space(storages: Sequence[torch.Tensor]) -> tuple[np.ndarray, int]:
    """One array over the memory of all tensors, and its address in elements."""
    width = storages[0].element_size()
    lowest = min(storages, key=torch.Tensor.data_ptr)
    end = max(storage.data_ptr() + storage.nbytes for storage in storages)
    span = (end - lowest.data_ptr()) // width
    space = np.lib.stride_tricks.as_strided(lowest.numpy().view(f"u{width}"), shape=(span,), strides=(width,))
    return space, lowest.data_ptr() // width


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
    rest, offsets = coordinates.astype(np.int64, copy=False), np.zeros(coordinates.shape, dtype=np.int64)
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
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((span,), (1,), tensor.storage_offset()).view(BITS[tensor.element_size()])


def aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor starts at a multiple of its elements' size, as all do that torch has made."""
    return tensor.data_ptr() % tensor.element_size() == 0
