"""Which query of every run probes the keys: the longest, found in one pass over the queries, bound by memory bandwidth."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...geometry import PrefillGeometry
from .primitives import launch_context, row_span


@triton.jit(do_not_specialize=["kv_len", "query_len", "query_offset", "first_query_block"])
def _longest_queries_kernel(
    query_ptr,
    ranges_ptr,
    positions_ptr,
    kv_len,
    query_len,
    query_offset,
    first_query_block,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qs: tl.int64,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
):
    """One program: where the longest query of every run of one query block stands, the last of equals; -1 without queries."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SLOTS: tl.constexpr = BLOCK // STRIDE
    start, query_begin, query_end, _ = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    own = query_begin // BLOCK + first_query_block + tile
    position = own * BLOCK + tl.arange(0, BLOCK)
    is_query = (position >= query_begin) & (position < query_end)
    channels = tl.arange(0, BLOCK_D)
    rows = (start - query_offset + position).to(tl.int64)
    queries = tl.load(
        query_ptr + batch * stride_qb + head * stride_qh + rows[:, None] * stride_qs + channels[None, :],
        mask=is_query[:, None] & (channels < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    squares = tl.sum(queries * queries, 1)
    # What has no length is NaN, and must show.
    squares = tl.where(squares == squares, squares, float("inf"))
    # Eight significant bits, as reference.comparable_lengths.
    lengths = (squares.to(tl.int32, bitcast=True) + 0x8000) >> 16
    lengths = tl.where(is_query, lengths, -1).reshape(SLOTS, STRIDE)
    is_longest = lengths == tl.max(lengths, 1)[:, None]
    candidates = tl.where(is_query, position, -1).reshape(SLOTS, STRIDE)
    chosen = tl.max(tl.where(is_longest, candidates, -1), 1)
    list_row = (batch * tl.num_programs(1) + head).to(tl.int64) * tl.num_programs(0) + tile
    tl.store(positions_ptr + list_row * SLOTS + tl.arange(0, SLOTS), chosen)


def longest_queries(
    query: torch.Tensor, geometry: PrefillGeometry, query_stride: int, first_query_block: int, query_blocks: int
) -> torch.Tensor:
    """Positions of reference.longest_queries by query block and run: int32 [B, Hq, T, runs], -1 for a run without queries."""
    # A pass of its own: found by the few warps of each probing program they made the selection take 0.55 instead of 0.42 ms at
    # 32K tokens (H200, 32 query and 8 key-value heads, head_dim 128, bfloat16).
    batch, heads, query_len, head_dim = query.shape
    shape = (batch, heads, query_blocks, geometry.block_size // query_stride)
    positions = torch.empty(shape, dtype=torch.int32, device=query.device)
    with launch_context(query):
        _longest_queries_kernel[query_blocks, heads, batch](
            query,
            geometry.valid_ranges,
            positions,
            geometry.kv_len,
            query_len,
            geometry.query_offset,
            first_query_block,
            *query.stride()[:3],
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK=geometry.block_size,
            STRIDE=query_stride,
            HAS_RANGES=geometry.valid_ranges is not None,
            num_warps=4,
        )
    return positions
