"""Block means of the keys: one pass over the keys, bound by memory bandwidth."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...geometry import PrefillGeometry
from .primitives import launch_context, row_span


@triton.jit(do_not_specialize=["kv_len"])
def _block_means_kernel(
    key_ptr,
    ranges_ptr,
    means_ptr,
    kv_len,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_ks: tl.int64,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RANGES: tl.constexpr,
):
    """One program: the mean of one key block of one head. Blocks after the row's end become zeros."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, _, _, key_end = row_span(ranges_ptr, batch, 0, 0, kv_len, HAS_RANGES)
    positions = block * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, BLOCK_D)
    rows = (start + positions).to(tl.int64)
    keys = tl.load(
        key_ptr + batch * stride_kb + head * stride_kh + rows[:, None] * stride_ks + channels[None, :],
        mask=(positions < key_end)[:, None] & (channels < HEAD_DIM)[None, :],
        other=0.0,
    )
    count = tl.minimum(tl.maximum(key_end - block * BLOCK, 1), BLOCK)
    mean = tl.sum(keys.to(tl.float32), 0) / count
    row = (batch * tl.num_programs(1) + head).to(tl.int64) * tl.num_programs(0) + block
    tl.store(means_ptr + row * HEAD_DIM + channels, mean.to(means_ptr.dtype.element_ty), mask=channels < HEAD_DIM)


def block_means(key: torch.Tensor, geometry: PrefillGeometry) -> torch.Tensor:
    """Mean key of each block: [B, Hkv, Skv, D] -> [B, Hkv, N, D] in the keys' dtype, summed in float32."""
    key = key if key.stride(-1) == 1 else key.contiguous()
    batch, heads, kv_len, head_dim = key.shape
    means = torch.empty(batch, heads, geometry.key_blocks, head_dim, dtype=key.dtype, device=key.device)
    with launch_context(key):
        _block_means_kernel[geometry.key_blocks, heads, batch](
            key,
            geometry.valid_ranges,
            means,
            kv_len,
            *key.stride()[:3],
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK=geometry.block_size,
            HAS_RANGES=geometry.valid_ranges is not None,
            num_warps=4,
        )
    return means
