"""What the Gluon kernels for Hopper GPUs share, and names that differ between Triton's versions."""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...probe_constants import QUERY_LEVELS, SMALLEST_STEP
from .primitives import ROUNDING

_ROUNDING, _QUERY_LEVELS, _SMALLEST_STEP = (gl.constexpr(number) for number in (ROUNDING.value, QUERY_LEVELS, SMALLEST_STEP))

# Triton renamed the copy; 3.6 knows the one name only, 3.9 the other.
copy_to_shared = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@functools.cache
def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How the copy engine lays out such a block. Kept, because asking anew for every launch takes the host longer than the
    launch."""
    names = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8}
    return gl.NVMMASharedLayout.get_default_for(list(block), names[dtype])


def describe_rows(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """For copies of ``rows`` tokens of a tensor [B, H, S, D]."""
    block = (1, 1, rows, tensor.shape[-1])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), shared_layout(block, tensor.dtype))


@gluon.jit
def integer_queries(queries):
    """``primitives.integer_queries``."""
    queries = queries.to(gl.float32)
    sizes = gl.abs(queries)
    sizes = gl.where(sizes < float("inf"), sizes, float("inf"))
    steps = gl.maximum(gl.max(sizes, 1) / _QUERY_LEVELS, _SMALLEST_STEP)
    integers = (queries * (1.0 / steps)[:, None] + _ROUNDING).to(gl.int32, bitcast=True)
    return integers.to(gl.int8), gl.where(steps < float("inf"), steps, float("nan"))


@gluon.jit
def row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES: gl.constexpr):
    """(start, query_begin, query_end, key_end) of one batch row, as geometry.RowSpan defines them."""
    if HAS_RANGES:
        start = gl.load(ranges_ptr + 2 * batch)
        end = gl.load(ranges_ptr + 2 * batch + 1)
        query_begin = gl.maximum(query_offset - start, 0)
        query_end = gl.maximum(gl.minimum(end, query_offset + query_len) - start, 0)
        key_end = gl.maximum(end - start, 0)
    else:
        start = query_offset * 0
        query_begin = query_offset
        query_end = query_offset + query_len
        key_end = kv_len
    return start, query_begin, query_end, key_end


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that each open when ARRIVALS have arrived."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def finish_loads():
    """By a warpgroup that has read a buffer with loads, not with products, before it arrives at the barrier that lets the copy
    engine overwrite it: a barrier alone does not order loads with what the copy engine writes.

    Without this, queries of the turn after next came before the last of a turn's had been read: 1.4 % of the bfloat16
    calls with head_dim 64, means and no listed block but the own had wrong rows, by up to 1.05. With it, none of 27 579
    (H200, benchmarks/results/unfenced-loads-2026-11-28-h200.txt).
    """
    fence_async_shared()


@gluon.jit
def not_before(numbers):
    """The same int32 numbers, with which nothing is computed before this: what follows from constants alone the compiler
    computes once per program, and keeps in registers that loops need. At head_dim 256 it spilled 372 bytes so."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bounded_sums(sums):
    """``primitives.bounded_sums``."""
    sums = gl.where(sums < 0.5, 1.0, sums)
    return gl.where(sums > 2147483648.0, 2147483648.0, sums)


@gluon.jit
def rounded_product(numbers, factor):
    """``primitives.rounded_product``."""
    return gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [numbers, factor], dtype=gl.float32, is_pure=True, pack=1
    )
