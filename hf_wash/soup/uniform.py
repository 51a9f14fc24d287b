"""The uniform soup: the mean of the members' weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .weights import (
    WeightSource,
    check_alike,
    check_finite,
    check_is_a_collection,
    is_finite,
    not_finite,
    open_member,
)


# Numbers that are summed at a time: 2 MiB in float64. VGG keeps three quarters of its weights in one tensor, so whole
# tensors would be too much. On a device, which is waited for once a block, 128 MiB.
BLOCK, BLOCK_ON_DEVICE = 2**18, 2**24


def uniform_soup(members: Iterable[nn.Module | Mapping[str, torch.Tensor] | str | Path]) -> dict[str, torch.Tensor]:
    """
    Averages the weights of several models of one architecture, `θ̄ = (1/N) Σ θ_n`.

    Floating-point (and complex) tensors are summed in float64 in the order given, divided by the number of members and
    cast back, so that the result does not depend on how the members are handed over. Integer and boolean tensors,
    `num_batches_tracked` among them, have no mean and are kept from the first member. Nothing of the members is
    changed, and the result shares no memory with them.

    Args:
        members (iterable of `torch.nn.Module`, `Mapping[str, torch.Tensor]`, `str` or `Path`):
            Models, state dicts, or paths of folders or safetensors files (sharded ones too). A list is worked through
            tensor by tensor, large ones in blocks: beside the members that are already in memory it takes that of the
            result and a few blocks, so 50 models on disk need the memory of little more than one. A generator is
            drawn from once and holds a float64 sum (twice a float32 model) beside the member at hand.

    Returns:
        `dict[str, torch.Tensor]`: the soup's state dict, in the first member's order, dtypes and devices. Names that
        share their memory in every member share it in the soup.

    Raises:
        ValueError: for no members at all, for members whose tensors differ (the first difference is named), for
            members that hold NaN or infinite values (all are named; of a generator the first), and for folders
            without safetensors.

    Source: "uniform soup" of [Model soups](https://hf.co/papers/2203.05482); the averaged model of
    [WASH](https://hf.co/papers/2405.17517).

    Example:

    ```python
    >>> from hf_wash.soup import uniform_soup

    >>> model.load_state_dict(uniform_soup([member_0, member_1, member_2]))
    >>> soup = uniform_soup(["run/_members/member_0", "run/_members/member_1"])
    ```
    """
    check_is_a_collection(members)
    if isinstance(members, (Sequence, nn.ModuleList)):
        sources = [open_member(member, index) for index, member in enumerate(members)]
        return mean_of_sources(sources)
    return _mean_of_stream(members)


def mean_of_sources(sources: Sequence[WeightSource]) -> dict[str, torch.Tensor]:
    """The uniform soup of members that can be read again and again: one tensor of all of them at a time."""
    if not sources:
        raise ValueError("A soup needs at least one member, and the list of members is empty.")
    first = sources[0]
    for other in sources[1:]:
        check_alike(first, other)
    # The whole result is allocated before the first sum: results and sums in turn would leave holes in the heap that
    # fit neither, and take up to twice the memory.
    soup: dict[str, torch.Tensor] = {}
    averaged = []
    for name in first.specs:
        value = first.read(name)
        tied_to = first.ties.get(name)
        if tied_to is not None and all(source.ties.get(name) == tied_to for source in sources):
            soup[name] = soup[tied_to]
        elif _has_mean(value):
            soup[name] = torch.empty_like(value)
            averaged.append(name)
        else:
            soup[name] = _copy(value)
    for name in averaged:
        for rows in _blocks(soup[name].shape, BLOCK if soup[name].device.type == "cpu" else BLOCK_ON_DEVICE):
            total = _wide(first.read(name, rows))
            for source in sources[1:]:
                total += source.read(name, rows).to(device=total.device, dtype=total.dtype)
            if not is_finite(total):
                check_finite(sources)
            target = soup[name] if rows is None else soup[name][rows]
            target.copy_(total.div_(len(sources)))
    return soup


def _blocks(shape: tuple[int, ...], block: int) -> list[slice | None]:
    """Slices of rows, each of about `block` numbers; `[None]` for what fits in one."""
    numbers = math.prod(shape)
    if numbers <= block:
        return [None]
    rows = max(1, block // (numbers // shape[0]))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def _mean_of_stream(members: Iterable) -> dict[str, torch.Tensor]:
    first, count = None, 0
    ties: dict[str, str] = {}
    totals: dict[str, torch.Tensor] = {}
    kept: dict[str, Any] = {}
    likeness: dict[str, torch.Tensor] = {}
    for member in members:
        source = open_member(member, count)
        if first is None:
            # Only names, shapes and dtypes outlive the turn of the first member: its weights may be gone by then.
            first = WeightSource(source.description, source.specs, source.ties)
            ties = dict(source.ties)
            for name in source.specs:
                if name in ties:
                    continue
                value = source.read(name)
                _refuse(source, name, value)
                if _has_mean(value):
                    totals[name] = _wide(value)
                    likeness[name] = torch.empty(0, dtype=value.dtype, device=value.device)
                else:
                    kept[name] = _copy(value)
        else:
            check_alike(first, source)
            for name, tied_to in list(ties.items()):
                if source.ties.get(name) != tied_to and tied_to in totals:
                    # Tied until here, so the sums so far are the same: from now on each goes its own way.
                    totals[name], likeness[name] = totals[tied_to].clone(), likeness[tied_to]
                    del ties[name]
            for name, total in totals.items():
                value = source.read(name)
                _refuse(source, name, value)
                total += value.to(device=total.device, dtype=total.dtype)
        count += 1
        # Let go of this member before the next one is drawn.
        del source, member
    if first is None:
        raise ValueError("A soup needs at least one member, and there is none to draw from the iterable.")
    soup: dict[str, torch.Tensor] = {}
    for name in first.specs:
        if name in ties:
            soup[name] = soup[ties[name]]
        elif name in totals:
            soup[name] = _finish(totals.pop(name), count, likeness[name])
        else:
            soup[name] = kept[name]
    return soup


def _refuse(source: WeightSource, name: str, value: Any) -> None:
    # At once: a member that was drawn is gone afterwards.
    if not is_finite(value):
        raise ValueError(not_finite([(source.description, name)]))


def _has_mean(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _wide(value: torch.Tensor) -> torch.Tensor:
    """A copy of `value` in the dtype sums are kept in."""
    dtype = torch.complex128 if value.is_complex() else torch.float64
    # Apple's GPUs have no float64: there the sum is kept by the CPU, and only the result goes back.
    device = "cpu" if value.device.type == "mps" else value.device
    return value.to(device=device, dtype=dtype, copy=True)


def _finish(total: torch.Tensor, count: int, like: torch.Tensor) -> torch.Tensor:
    return total.div_(count).to(device=like.device, dtype=like.dtype, copy=True)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
