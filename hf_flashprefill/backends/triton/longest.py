"""Which query of every run probes the keys: the longest, found in one pass over the queries, bound by memory bandwidth."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...geometry import PrefillGeometry
from .primitives import launch_context, padded_head_dim, row_span

# Tokens per program.
TOKENS = 64


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
    TOKENS: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
):
    """One program: where the longest query of every run of TOKENS positions stands, the last of equals; -1 without queries."""
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SLOTS: tl.constexpr = TOKENS // STRIDE
    start, query_begin, query_end, _ = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    position = (query_begin // BLOCK + first_query_block) * BLOCK + part * TOKENS + tl.arange(0, TOKENS)
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
    # Eight significant bits, as reference.probe.comparable_lengths.
    lengths = (squares.to(tl.int32, bitcast=True) + 0x8000) >> 16
    lengths = tl.where(is_query, lengths, -1).reshape(SLOTS, STRIDE)
    is_longest = lengths == tl.max(lengths, 1)[:, None]
    candidates = tl.where(is_query, position, -1).reshape(SLOTS, STRIDE)
    chosen = tl.max(tl.where(is_longest, candidates, -1), 1)
    row = (batch * tl.num_programs(1) + head).to(tl.int64) * tl.num_programs(0) + part
    tl.store(positions_ptr + row * SLOTS + tl.arange(0, SLOTS), chosen)


def longest_queries(
    query: torch.Tensor, geometry: PrefillGeometry, query_stride: int, first_query_block: int, query_blocks: int
) -> torch.Tensor:
    """Positions of reference.longest_queries by query block and run: int32 [B, Hq, T, runs], -1 for a run without queries."""
    # A pass of its own: found by the few warps of each probing program they made the selection take 0.55 instead of 0.42 ms at
    # 32K tokens (H200, 32 query and 8 key-value heads, head_dim 128, bfloat16). By whole blocks, with four warps, it takes 88
    # us there and 298 at 128K; by 64 tokens, with eight, 72 and 251.
    batch, heads, query_len, head_dim = query.shape
    shape, block_d = (batch, heads, query_blocks, geometry.block_size // query_stride), padded_head_dim(head_dim)
    positions = torch.empty(shape, dtype=torch.int32, device=query.device)
    with launch_context(query):
        _longest_queries_kernel[query_blocks * (geometry.block_size // TOKENS), heads, batch](
            query,
            geometry.valid_ranges,
            positions,
            geometry.kv_len,
            query_len,
            geometry.query_offset,
            first_query_block,
            *query.stride()[:3],
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK=geometry.block_size,
            TOKENS=TOKENS,
            STRIDE=query_stride,
            HAS_RANGES=geometry.valid_ranges is not None,
            num_warps=min(max(TOKENS * block_d // 1024, 1), 8),
            enable_fp_fusion=True,
        )
    return positions
