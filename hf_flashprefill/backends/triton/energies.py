"""The published rule's scores: energies of block means, float32 in base-2 logarithms.

The product is taken transposed, means x queries: energies then reduce along a row of the accumulator, inside a warp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...geometry import PrefillGeometry
from .primitives import compute_capability, launch_context, padded_head_dim, row_span
from .tuning import energy_tiles


class EnergyCall(NamedTuple):
    """What a kernel needs to score the blocks before each query block's own.

    Attributes:
        query: [B, Hq, Sq, D], last dimension dense.
        means: [B, Hkv, N, D], mean key of each block, in the queries' dtype.
        geometry: Of the prefill call.
        energies: float32 [B, Hq, T, K] to write, log2; entries from a query block's own on stay as they are.
        first_query_block: Which of the geometry's query blocks is the first of the T.
        scale_log2: What makes base-2 logits of products of queries and means.
    """

    query: torch.Tensor
    means: torch.Tensor
    geometry: PrefillGeometry
    energies: torch.Tensor
    first_query_block: int
    scale_log2: float

    def lengths(self) -> tuple[int, ...]:
        """kv_len, query_len, query_offset in tokens, first query block and number of key blocks, as the kernels take them."""
        geometry = self.geometry
        return (geometry.kv_len, geometry.query_len, geometry.query_offset, self.first_query_block, geometry.key_blocks)


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


@triton.jit(do_not_specialize=["kv_len", "query_len", "query_offset", "first_query_block", "key_blocks", "width"])
def _energies_kernel(
    query_ptr,
    means_ptr,
    means_desc,
    ranges_ptr,
    energies_ptr,
    scale_log2,
    kv_len,
    query_len,
    query_offset,
    first_query_block,
    key_blocks,
    width,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qs: tl.int64,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
):
    """One program: the energies of the blocks that one query block of one head sees whole."""
    head, tile, batch = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    heads, tiles = tl.num_programs(0), tl.num_programs(1)
    start, query_begin, query_end, _ = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    own = query_begin // BLOCK + first_query_block + tile
    if (own * BLOCK < query_end) & (query_end > query_begin):
        energies_ptr += ((batch * heads + head).to(tl.int64) * tiles + tile) * width
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
        lower_bias = tl.where(is_lower, 0.0, float("-inf"))
        upper_bias = tl.where(is_upper, 0.0, float("-inf"))
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
            tl.store(energies_ptr + blocks, energies, mask=blocks < own)


def find_energies(call: EnergyCall) -> None:
    """Write ``call.energies`` with the portable kernel."""
    batch, heads, _, head_dim = call.query.shape
    block_d = padded_head_dim(head_dim)
    tiles = energy_tiles(compute_capability(call.query), block_d, call.query.dtype)
    described = None
    if tiles.copy_engine and head_dim == block_d:
        described = TensorDescriptor.from_tensor(call.means.view(-1, head_dim), [tiles.block_n, head_dim])
    with launch_context(call.query):
        _energies_kernel[heads, call.energies.shape[2], batch](
            call.query,
            call.means,
            described,
            call.geometry.valid_ranges,
            call.energies,
            call.scale_log2,
            *call.lengths(),
            call.energies.shape[3],
            *call.query.stride()[:3],
            GROUP=heads // call.means.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK=call.geometry.block_size,
            BLOCK_N=tiles.block_n,
            HAS_RANGES=call.geometry.valid_ranges is not None,
            HAS_DESCRIPTORS=described is not None,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            enable_fp_fusion=True,
        )
