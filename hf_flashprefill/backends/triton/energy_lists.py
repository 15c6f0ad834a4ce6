"""Lists by the published rule: one kernel finds the energies of block means (``energies.py``, ``energies_hopper.py``), another
walks over them. No sort, no score per query, no wait for the host.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import triton
import triton.language as tl

from ...block_index import BlockIndex
from ...geometry import PrefillGeometry
from . import energies, hopper
from .primitives import append_kept, launch_context, padded_head_dim, row_span

energies_hopper = hopper.gluon_module("energies_hopper")

# Blocks that one step of a list looks at.
BLOCK_LIST = 256


@triton.jit(
    do_not_specialize=[
        "kv_len",
        "query_len",
        "query_offset",
        "first_query_block",
        "key_blocks",
        "width",
        "sink_blocks",
        "window_blocks",
        "dense_tail_blocks",
    ]
)
def _list_energies_kernel(
    query_ptr,
    means_ptr,
    ranges_ptr,
    energies_ptr,
    indices_ptr,
    counts_ptr,
    scale_log2,
    log2_alpha,
    kv_len,
    query_len,
    query_offset,
    first_query_block,
    key_blocks,
    width,
    sink_blocks,
    window_blocks,
    dense_tail_blocks,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qs: tl.int64,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
    HAS_RANGES: tl.constexpr,
):
    """One program: the list of one query block of one head."""
    head, tile, batch = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    heads, tiles = tl.num_programs(0), tl.num_programs(1)
    start, query_begin, query_end, key_end = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    own = query_begin // BLOCK + first_query_block + tile
    list_row = (batch * heads + head).to(tl.int64) * tiles + tile
    energies_ptr += list_row * width
    zero = tl.zeros((1,), tl.int32)
    count = zero
    if (own * BLOCK < query_end) & (query_end > query_begin):
        # Its own block only the query at that block's last key sees whole.
        channels = tl.arange(0, BLOCK_D)
        in_head = channels < HEAD_DIM
        last_key = tl.minimum((own + 1) * BLOCK, key_end) - 1
        mean_row = (batch * (heads // GROUP) + head // GROUP) * key_blocks + own
        own_mean = tl.load(means_ptr + mean_row.to(tl.int64) * HEAD_DIM + channels, mask=in_head, other=0.0)
        last_row = tl.minimum(tl.maximum(start - query_offset + last_key, 0), query_len - 1).to(tl.int64)
        query_ptr += batch * stride_qb + head * stride_qh + last_row * stride_qs
        last_query = tl.load(query_ptr + channels, mask=in_head, other=0.0)
        own_energy = tl.sum(own_mean.to(tl.float32) * last_query.to(tl.float32), 0) * scale_log2
        own_energy = tl.where((last_key >= query_begin) & (last_key < query_end), own_energy, float("-inf"))

        best = tl.full((BLOCK_LIST,), float("-inf"), tl.float32)
        for first in range(0, own, BLOCK_LIST):
            blocks = first + tl.arange(0, BLOCK_LIST)
            best = tl.maximum(best, tl.load(energies_ptr + blocks, mask=blocks < own, other=float("-inf")))
        threshold = tl.maximum(tl.max(best, 0), own_energy) + log2_alpha
        keep_all = own + zero >= tl.cdiv(query_end, BLOCK) - dense_tail_blocks
        list_ptrs = indices_ptr + list_row * width + zero
        for first in range(0, own + 1, BLOCK_LIST):
            blocks = first + tl.arange(0, BLOCK_LIST)
            scores = tl.load(energies_ptr + blocks, mask=blocks < own, other=float("-inf"))
            # Of a logit from 2^31 on (base 2) a fused multiply-add may leave nothing. What is not known is kept, as NaN is.
            scores = tl.where(scores == float("-inf"), float("nan"), scores)
            scores = tl.where(blocks == own, own_energy, scores)[None, :]
            count = append_kept(
                scores, blocks, threshold + zero, own + zero, sink_blocks, window_blocks, keep_all, list_ptrs, count
            )
    tl.store(counts_ptr + list_row + zero, count)


def _scoring(query: torch.Tensor, block_size: int) -> ModuleType:
    """The module whose kernel scores blocks for such queries."""
    return energies_hopper if hopper.takes(energies_hopper, query, block_size) else energies


def select_energies(
    query: torch.Tensor,
    means: torch.Tensor,
    geometry: PrefillGeometry,
    *,
    scale: float,
    alpha: float,
    sink_blocks: int,
    window_blocks: int,
    dense_tail_blocks: int,
    first_query_block: int,
    query_blocks: int,
) -> BlockIndex:
    """Lists for ``query_blocks`` query blocks from ``first_query_block`` on; the scores are reference.block_energies."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, _, head_dim = query.shape
    width = geometry.visible_blocks_bound(first_query_block + query_blocks - 1)
    shape = (batch, heads, query_blocks)
    scores = torch.empty(*shape, width, dtype=torch.float32, device=query.device)
    indices = torch.empty(*shape, width, dtype=torch.int32, device=query.device)
    counts = torch.empty(shape, dtype=torch.int32, device=query.device)
    call = energies.EnergyCall(query, means, geometry, scores, first_query_block, scale * math.log2(math.e))
    _scoring(query, geometry.block_size).find_energies(call)
    with launch_context(query):
        _list_energies_kernel[heads, query_blocks, batch](
            query,
            means,
            geometry.valid_ranges,
            scores,
            indices,
            counts,
            call.scale_log2,
            math.log2(alpha) if alpha > 0 else -math.inf,
            *call.lengths(),
            width,
            sink_blocks,
            window_blocks,
            dense_tail_blocks,
            *query.stride()[:3],
            GROUP=heads // means.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            BLOCK=geometry.block_size,
            BLOCK_LIST=BLOCK_LIST,
            HAS_RANGES=geometry.valid_ranges is not None,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return BlockIndex(indices, counts, geometry, first_query_block)
