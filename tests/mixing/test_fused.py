"""
The fused kernels, as far as they can be tried without a GPU: that they compile for one.

What they do is tested in `tests/distributed/test_mixing_processes.py`, interpreted, and in `test_wash.py` on a GPU.
"""

import pytest
import torch

from hf_wash.mixing.exchange import kernels


triton = pytest.importorskip("triton", reason="the kernels are Triton's")
from hf_wash.mixing import fused  # noqa: E402


BITS = {torch.float16: "*i16", torch.bfloat16: "*i16", torch.float32: "*i32", torch.float64: "*i64"}


def compiled(kernel, constants, **types):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


@pytest.mark.parametrize("dtype", fused.EXPONENTS, ids=str)
def test_the_kernels_compile_for_a_gpu(dtype):
    values = {"values": BITS[dtype], "places": "*i64"}
    sizes = {"WIDTH": dtype.itemsize, "BLOCK": 512}
    gather = compiled(
        fused._gather_kernel, {**sizes, "EXPONENT": fused.EXPONENTS[dtype]}, **values, bounds="*i64", bad="*i64"
    )
    assert "atom" in gather["ptx"]
    for ordered, headers in ((True, 1), (False, 3), (True, 0)):
        constants = {**sizes, "ORDERED": ordered, "HEADERS": headers, "WORDS": 4, "FLAGS": 2, "WITHHELD": 4, "BAD": 3}
        scatter = compiled(fused._scatter_kernel, constants, **values, order="*i64", headers="*i64", count="i32")
        assert "cubin" in scatter


def test_exponents_are_those_of_values_that_are_not_finite():
    for dtype, exponent in fused.EXPONENTS.items():
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        values = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, torch.finfo(dtype).max], dtype=dtype)
        bits = values.view(whole)
        assert ((bits & exponent) == exponent).tolist() == [True, True, True, False, False]


def test_there_are_no_kernels_on_a_cpu():
    assert kernels(torch.device("cpu")) is None
