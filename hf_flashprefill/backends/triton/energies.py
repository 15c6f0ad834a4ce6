"""Scores and lists in one kernel: each program owns one query block of one head, so nothing is reduced across programs.

The product is taken transposed, means x queries: energies then reduce along a row of the accumulator, inside a warp. The
program keeps one log2 energy per key block, finds their maximum on the way, and walks its own scores once more to write
the list. No sort, no second tensor, no wait for the host.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...block_index import BlockIndex
from ...geometry import PrefillGeometry
from .primitives import append_kept, compute_capability, launch_context, row_span
from .tuning import energy_tiles


@triton.jit
def _log_energy(products, bias, scale_log2):
    """log2 of the energies of some means: products [means, queries] -> [means]; -inf if no column is a query.

    ``bias`` is 0 for queries and -inf for other columns: one fused multiply-add in place of a mask.
    """
    logits = products * scale_log2 + bias[None, :]
    largest = tl.max(logits, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    return largest + tl.log2(tl.sum(tl.exp2(logits - largest[:, None]), 1))


@triton.jit
def _log_add(first, second):
    """log2(2**first + 2**second), not both -inf."""
    largest = tl.maximum(first, second)
    return largest + tl.log2(tl.exp2(first - largest) + tl.exp2(second - largest))


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
def _select_energies_kernel(
    query_ptr,
    means_ptr,
    means_desc,
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
    BLOCK_N: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
):
    """One program: scores of all key blocks for one query block and head, and the list of those kept."""
    head, tile, batch = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    heads, tiles = tl.num_programs(0), tl.num_programs(1)
    start, query_begin, query_end, key_end = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    own = query_begin // BLOCK + first_query_block + tile
    list_row = (batch * heads + head).to(tl.int64) * tiles + tile
    energies_ptr += list_row * width
    indices_ptr += list_row * width
    if (own * BLOCK >= query_end) | (query_end <= query_begin):
        tl.store(counts_ptr + list_row, 0)
    else:
        # Two halves of the queries one after the other: half the accumulators, so that more programs share a
        # multiprocessor and one's exponentials run beside another's products.
        HALF: tl.constexpr = BLOCK // 2
        channels = tl.arange(0, BLOCK_D)
        in_head = channels < HEAD_DIM
        query_ptr += batch * stride_qb + head * stride_qh
        lower = own * BLOCK + tl.arange(0, HALF)
        upper = lower + HALF
        is_lower = (lower >= query_begin) & (lower < query_end)
        is_upper = (upper >= query_begin) & (upper < query_end)
        row_shift = start - query_offset
        lower_queries = tl.load(
            query_ptr + (row_shift + lower).to(tl.int64)[None, :] * stride_qs + channels[:, None],
            mask=is_lower[None, :] & in_head[:, None],
            other=0.0,
        )
        upper_queries = tl.load(
            query_ptr + (row_shift + upper).to(tl.int64)[None, :] * stride_qs + channels[:, None],
            mask=is_upper[None, :] & in_head[:, None],
            other=0.0,
        )
        mean_row = (batch * (heads // GROUP) + head // GROUP) * key_blocks
        means_ptr += mean_row.to(tl.int64) * HEAD_DIM
        # Its own block only the query at that block's last key sees whole.
        last_key = tl.minimum((own + 1) * BLOCK, key_end) - 1
        own_mean = tl.load(means_ptr + own * HEAD_DIM + channels, mask=in_head, other=0.0)
        last_row = tl.minimum(tl.maximum(row_shift + last_key, 0), query_len - 1).to(tl.int64)
        is_last_query = (last_key >= query_begin) & (last_key < query_end)
        last_query = tl.load(query_ptr + last_row * stride_qs + channels, mask=in_head, other=0.0)
        own_energy = tl.sum(own_mean.to(tl.float32) * last_query.to(tl.float32), 0) * scale_log2
        own_energy = tl.where(is_last_query, own_energy, float("-inf"))
        tl.store(energies_ptr + own, own_energy)

        lower_bias = tl.where(is_lower, 0.0, float("-inf"))
        upper_bias = tl.where(is_upper, 0.0, float("-inf"))
        # One running maximum per row of the step: reducing to a single number in every step costs two barriers each.
        best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        # Every query of the block sees the blocks before its own whole.
        for first in range(0, own, BLOCK_N):
            blocks = first + tl.arange(0, BLOCK_N)
            if HAS_DESCRIPTORS:
                means = means_desc.load([mean_row + first, 0])
            else:
                means = tl.load(
                    means_ptr + blocks[:, None] * HEAD_DIM + channels[None, :],
                    mask=(blocks < own)[:, None] & in_head[None, :],
                    other=0.0,
                )
            lower_products = tl.dot(means, lower_queries, input_precision="ieee")
            lower_energies = _log_energy(lower_products, lower_bias, scale_log2)
            upper_products = tl.dot(means, upper_queries, input_precision="ieee")
            energies = _log_add(lower_energies, _log_energy(upper_products, upper_bias, scale_log2))
            best = tl.maximum(best, tl.where(blocks < own, energies, float("-inf")))
            tl.store(energies_ptr + blocks, energies, mask=blocks < own)

        # Other threads of this program wrote the energies read next.
        tl.debug_barrier()
        one = tl.zeros((1,), tl.int32)
        threshold = one + tl.maximum(tl.max(best, 0), own_energy) + log2_alpha
        keep_all = one + own >= tl.cdiv(query_end, BLOCK) - dense_tail_blocks
        count = one
        for first in range(0, own + 1, BLOCK_LIST):
            blocks = first + tl.arange(0, BLOCK_LIST)
            scores = tl.load(energies_ptr + blocks, mask=blocks <= own, other=float("-inf"))[None, :]
            list_ptrs = indices_ptr + one
            count = append_kept(scores, blocks, threshold, one + own, sink_blocks, window_blocks, keep_all, list_ptrs, count)
        tl.store(counts_ptr + list_row + one, count)


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
    batch, heads, query_len, head_dim = query.shape
    width = geometry.visible_blocks_bound(first_query_block + query_blocks - 1)
    shape = (batch, heads, query_blocks)
    energies = torch.empty(*shape, width, dtype=torch.float32, device=query.device)
    indices = torch.empty(*shape, width, dtype=torch.int32, device=query.device)
    counts = torch.empty(shape, dtype=torch.int32, device=query.device)
    block_d = triton.next_power_of_2(head_dim)
    tiles = energy_tiles(compute_capability(query), block_d, query.dtype)
    described = None
    if tiles.copy_engine and head_dim == block_d:
        described = TensorDescriptor.from_tensor(means.view(-1, head_dim), [tiles.block_n, head_dim])
    with launch_context(query):
        _select_energies_kernel[heads, query_blocks, batch](
            query,
            means,
            described,
            geometry.valid_ranges,
            energies,
            indices,
            counts,
            scale * math.log2(math.e),
            math.log2(alpha) if alpha > 0 else -math.inf,
            geometry.kv_len,
            query_len,
            geometry.query_offset,
            first_query_block,
            geometry.key_blocks,
            width,
            sink_blocks,
            window_blocks,
            dense_tail_blocks,
            *query.stride()[:3],
            GROUP=heads // means.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK=geometry.block_size,
            BLOCK_N=tiles.block_n,
            BLOCK_LIST=512,
            HAS_RANGES=geometry.valid_ranges is not None,
            HAS_DESCRIPTORS=described is not None,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            enable_fp_fusion=True,
        )
    return BlockIndex(indices, counts, geometry, first_query_block)
