"""
Reading and writing scattered values on a GPU with one kernel each, wherever in memory their tensors are.

The kernels are Triton's, which torch brings for CUDA; this module needs it, and is imported when there is a GPU. Without
it, or on another device, `exchange.py` goes from tensor to tensor with torch: the same result, with two kernels for each.
"""

import functools
import warnings

import torch
import triton
import triton.language as tl

from .memory import BITS


_BLOCK = 512

# The bits of a value that are all set if it is NaN or infinite.
EXPONENTS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


@triton.jit
def _gather_kernel(places, bounds, values, bad, WIDTH: tl.constexpr, EXPONENT: tl.constexpr, BLOCK: tl.constexpr):
    member = tl.program_id(1)
    end = tl.load(bounds + member + 1)
    numbers = tl.load(bounds + member) + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < end
    addresses = tl.load(places + numbers, mask=inside, other=0) * WIDTH
    bits = tl.load(addresses.to(tl.pointer_type(values.dtype.element_ty)), mask=inside, other=0)
    tl.store(values + numbers, bits, mask=inside)
    if tl.max(((bits & EXPONENT) == EXPONENT).to(tl.int32)) > 0:
        tl.atomic_or(bad + member // 64, tl.full((), 1, tl.int64) << (member % 64))


# A count of 1 would become a constant, which the loop may not replace.
@triton.jit(do_not_specialize=["count"])
def _scatter_kernel(
    places,
    order,
    values,
    headers,
    count,
    WIDTH: tl.constexpr,
    ORDERED: tl.constexpr,
    HEADERS: tl.constexpr,
    WORDS: tl.constexpr,
    FLAGS: tl.constexpr,
    WITHHELD: tl.constexpr,
    BAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if HEADERS > 0:
        digest = tl.load(headers)
        for process in range(HEADERS):
            count = tl.where(tl.load(headers + process * WORDS) == digest, count, 0)
            count = tl.where((tl.load(headers + process * WORDS + FLAGS) & WITHHELD) == 0, count, 0)
            for word in range(BAD, WORDS):
                count = tl.where(tl.load(headers + process * WORDS + word) == 0, count, 0)
    inside = numbers < count
    if ORDERED:
        sources = tl.load(order + numbers, mask=inside, other=0)
    else:
        sources = numbers
    bits = tl.load(values + sources, mask=inside, other=0)
    addresses = tl.load(places + numbers, mask=inside, other=0) * WIDTH
    tl.store(addresses.to(tl.pointer_type(values.dtype.element_ty)), bits, mask=inside)


def gather(
    places: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    values: torch.Tensor,
    bad: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """
    Reads values, and notes which members have one that is NaN or infinite.

    Args:
        places (`torch.Tensor`):
            The addresses divided by the size of a value, int64 of shape `(num_values,)`.
        bounds (`torch.Tensor`):
            Where each member's values start, int64 of shape `(num_members + 1,)`.
        longest (`int`):
            The largest number of values of a member.
        values (`torch.Tensor`):
            Where the bits are written to, integers of shape `(num_values,)`.
        bad (`torch.Tensor`):
            One bit for each member, set where a value is not finite: int64 of shape `(ceil(num_members / 64),)`.
        dtype (`torch.dtype`):
            The dtype of the values; one of `EXPONENTS`.
    """
    if longest:
        grid = (triton.cdiv(longest, _BLOCK), len(bounds) - 1)
        with _on(values.device):
            _gather_kernel[grid](places, bounds, values, bad, values.element_size(), EXPONENTS[dtype], _BLOCK)


def scatter(
    places: torch.Tensor,
    order: torch.Tensor | None,
    values: torch.Tensor,
    headers: torch.Tensor | None,
    flags_word: int,
    withheld: int,
    first_bad_word: int,
) -> None:
    """
    Writes values, unless the headers forbid it.

    Args:
        places (`torch.Tensor`):
            The addresses divided by the size of a value, int64 of shape `(num_values,)`.
        order (`torch.Tensor`, *optional*):
            Which value goes to each place, int64 of shape `(num_values,)`. `None`: in this order.
        values (`torch.Tensor`):
            The bits, integers of shape `(num_values,)`.
        headers (`torch.Tensor`, *optional*):
            int64 of shape `(num_processes, header_words)`. Nothing is written if their first words differ, if one
            has a bit of `withheld` in its word `flags_word`, or if one of the words from `first_bad_word` on is not 0.
        flags_word (`int`), withheld (`int`), first_bad_word (`int`):
            See above.
    """
    count = len(values)
    if not count:
        return
    processes, words = headers.shape if headers is not None else (0, 0)
    with _on(values.device):
        _scatter_kernel[(triton.cdiv(count, _BLOCK),)](
            places,
            places if order is None else order,
            values,
            places if headers is None else headers,
            count,
            values.element_size(),
            order is not None,
            processes,
            words,
            flags_word,
            withheld,
            first_bad_word,
            _BLOCK,
        )


def _on(device: torch.device):
    """Kernels go to the current device, which need not be that of the tensors."""
    return torch.cuda.device(device)


@functools.cache
def works(device: torch.device) -> bool:
    """
    Whether the kernels do on a device what they should, tried out on a few values of our own.

    Args:
        device (`torch.device`):
            The device.

    Returns:
        `bool`: `False`, with a warning, where they fail.
    """
    try:
        right = all(_try_out(device, dtype) for dtype in EXPONENTS)
    except Exception as failure:
        right, reason = False, f"{type(failure).__name__}: {failure}"
    else:
        reason = "wrong values"
    if not right:
        warnings.warn(
            f"The fused kernels of the shuffle do not work on {device} ({reason}); it goes from tensor to tensor instead, "
            f"which is slower.",
            stacklevel=2,
        )
    return right


def _try_out(device: torch.device, dtype: torch.dtype) -> bool:
    bits = BITS[dtype.itemsize]
    tensors = [(torch.arange(10, device=device) * scale).to(dtype) for scale in (1.0, 3.0)]
    tensors[1][5] = float("inf")
    first = [tensor.data_ptr() // dtype.itemsize for tensor in tensors]
    places = torch.tensor([first[0] + 2, first[0] + 7, first[1] + 4, first[1] + 5], device=device)
    bounds = torch.tensor([0, 2, 4], device=device)
    values = torch.zeros(4, dtype=bits, device=device)
    bad, flagged = (torch.zeros(1, 3, dtype=torch.int64, device=device) for _ in range(2))
    gather(places, bounds, 2, values, bad[0, 2:], dtype)
    expected = torch.stack([tensors[0][2], tensors[0][7], tensors[1][4], tensors[1][5]])
    order = torch.tensor([2, 3, 0, 1], device=device)
    before = torch.stack(tensors)
    flagged[0, 1] = 4
    scatter(places, order, values, bad, 1, 0, 2)
    scatter(places, order, values, flagged, 1, 4, 2)
    kept = torch.equal(torch.stack(tensors), before)
    scatter(places, order, values, flagged, 1, 3, 2)
    swapped = torch.stack([tensors[0][2], tensors[0][7], tensors[1][4], tensors[1][5]])
    return (
        torch.equal(values.view(dtype), expected)
        and bad.tolist() == [[0, 0, 2]]
        and kept
        and torch.equal(swapped, expected[order])
    )
