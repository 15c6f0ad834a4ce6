"""Exact attention over listed key blocks, in plain Triton for every supported GPU.

The query block's own key block comes first, in a loop with run-time bounds; then one flat loop without masks runs over
the list. In the other order, or with the own block as straight-line code, ptxas serialises every wgmma of the kernel on
Hopper (warning C7515).

The loop over the list has no running maximum: weights are taken relative to the largest logit of the own keys, and those at the
window's edge. float16, which ends at 65504, always has a running maximum. If a sum or a result overflows or a sum is lost, the
program starts again with a running maximum and with logits that are rounded before it is taken away, which a fused multiply-add
does not do. Time against a running maximum throughout, in one process, without and with means: .93 and .96 at 32K tokens, .93
and .97 at 128K, .92 and .95 with every block of 16K tokens listed (H200, 32 query and 8 key-value heads, head_dim 128,
bfloat16, published densities).

Sliding windows, attention sinks and the means of dropped blocks are further terms of the same softmax; each costs nothing
where it is not asked for.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...block_index import BlockIndex
from .means import RunMeans, first_weight, weigh_means
from .primitives import (
    LARGEST_TOTAL,
    SMALLEST_TOTAL,
    compute_capability,
    copy_engine_takes,
    launch_context,
    not_before,
    padded_head_dim,
    rounded_product,
    row_span,
)
from .tuning import AttendTiles, attend_tiles


@triton.jit
def _online_softmax(logits, scale_log2, running_max, running_sum, accumulator):
    """Weights [BLOCK_M, BLOCK_N] of one step's logits, which ``scale_log2`` makes base 2, and the maximum, sum and accumulator
    that earlier steps shrink to."""
    new_max = tl.maximum(running_max, tl.max(logits, 1) * scale_log2)
    weights = tl.exp2(logits * scale_log2 - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    return weights, new_max, running_sum * rescale + tl.sum(weights, 1), accumulator * rescale[:, None]


@triton.jit
def _attend(
    queries,
    positions,
    place,
    pointers,
    strides,
    scale_log2,
    sliding_window,
    ONLINE: tl.constexpr,
    ROUNDED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_MEANS: tl.constexpr,
) -> tuple:
    """Sums of weights [BLOCK_M] and of weighted values [BLOCK_M, BLOCK_D], float32, of ``queries`` [BLOCK_M, BLOCK_D] at
    ``positions`` [BLOCK_M], in tokens, over the list and the softmax's further terms.

    ONLINE: the maximum that weights are relative to rises with the logits, and what came before shrinks. Otherwise it stays
    that of the query block's own keys, and weights beyond what float32 holds come out as infinity or NaN. ROUNDED: so do logits
    whose rounding is worth more than that, or they are lost, unless the product is rounded first (``rounded_product``).
    """
    batch, head, own, first_position, start, key_end, list_row = place
    key_ptr, value_ptr, key_desc, value_desc, indices_ptr, counts_ptr, sinks_ptr, of_means = pointers
    key_means_ptr, value_means_ptr, mean_weights_ptr, mean_blocks, mean_rows, weights_width = of_means
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, width = strides
    SUBTILES: tl.constexpr = BLOCK // BLOCK_N
    channels = tl.arange(0, BLOCK_D)
    in_head = channels < HEAD_DIM
    columns = tl.arange(0, BLOCK_N)
    row_keys = (start + columns).to(tl.int64)
    key_tile = key_ptr + batch * stride_kb + (head // GROUP) * stride_kh
    key_tile += row_keys[None, :] * stride_ks + channels[:, None]
    value_tile = value_ptr + batch * stride_vb + (head // GROUP) * stride_vh
    value_tile += row_keys[:, None] * stride_vs + channels[None, :]

    key_head = head // GROUP
    # A finite start keeps a row whose first columns are all masked free of inf - inf.
    running_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    listed = indices_ptr + list_row * width
    # The list's last entry is the block's own.
    others = tl.load(counts_ptr + list_row) - 1
    own_steps = tl.cdiv(tl.minimum(first_position + BLOCK_M, key_end) - own * BLOCK, BLOCK_N)
    edge_steps = 0
    if HAS_WINDOW:
        # Blocks whose first keys the last query no longer sees; a window's list is a run of blocks.
        passed = tl.cdiv(first_position + BLOCK_M - sliding_window, BLOCK) - tl.load(listed)
        edge_steps = tl.minimum(tl.maximum(passed, 0), others) * SUBTILES

    for step in range(own_steps + edge_steps):
        first_key = own * BLOCK + step * BLOCK_N
        if HAS_WINDOW:
            edge = tl.maximum(step - own_steps, 0)
            edge_key = tl.load(listed + edge // SUBTILES) * BLOCK + edge % SUBTILES * BLOCK_N
            first_key = tl.where(step < own_steps, first_key, edge_key)
        offset = tl.full((), first_key, tl.int64)
        key_positions = first_key + columns
        is_key = key_positions < key_end
        if HAS_DESCRIPTORS:
            keys = key_desc.load([batch, key_head, start + first_key, 0]).reshape(BLOCK_N, BLOCK_D).T
        else:
            keys = tl.load(key_tile + offset * stride_ks, mask=is_key[None, :] & in_head[:, None], other=0.0)
        logits = rounded_product(tl.dot(queries, keys, input_precision="ieee"), scale_log2)
        distance = positions[:, None] - key_positions[None, :]
        if HAS_WINDOW:
            # One comparison: below zero is far beyond every window.
            is_seen = distance.to(tl.uint32) < sliding_window.to(tl.uint32)
        else:
            is_seen = distance >= 0
        logits = tl.where(is_seen, logits, float("-inf"))
        weights, running_max, running_sum, accumulator = _online_softmax(logits, 1.0, running_max, running_sum, accumulator)
        if HAS_DESCRIPTORS:
            values = value_desc.load([batch, key_head, start + first_key, 0]).reshape(BLOCK_N, BLOCK_D)
            if HAS_RANGES:
                # Weight 0 times a NaN in padding would still be NaN; after the buffer's end the engine fills in zeros.
                values = tl.where(is_key[:, None], values, 0.0)
        else:
            values = tl.load(value_tile + offset * stride_vs, mask=is_key[:, None] & in_head[None, :], other=0.0)
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")

    for step in range(edge_steps, others * SUBTILES):
        first_key = tl.load(listed + step // SUBTILES) * BLOCK + step % SUBTILES * BLOCK_N
        offset = first_key.to(tl.int64)
        if HAS_DESCRIPTORS:
            keys = key_desc.load([batch, key_head, start + first_key, 0]).reshape(BLOCK_N, BLOCK_D).T
        elif HEAD_DIM == BLOCK_D:
            keys = tl.load(key_tile + offset * stride_ks)
        else:
            keys = tl.load(key_tile + offset * stride_ks, mask=in_head[:, None], other=0.0)
        logits = tl.dot(queries, keys, input_precision="ieee")
        if ROUNDED:
            logits = rounded_product(logits, scale_log2)
            weights, running_max, running_sum, accumulator = _online_softmax(logits, 1.0, running_max, running_sum, accumulator)
        elif ONLINE:
            weights, running_max, running_sum, accumulator = _online_softmax(
                logits, scale_log2, running_max, running_sum, accumulator
            )
        else:
            weights = tl.exp2(logits * scale_log2 - running_max[:, None])
            running_sum += tl.sum(weights, 1)
        if HAS_DESCRIPTORS:
            values = value_desc.load([batch, key_head, start + first_key, 0]).reshape(BLOCK_N, BLOCK_D)
        elif HEAD_DIM == BLOCK_D:
            values = tl.load(value_tile + offset * stride_vs)
        else:
            values = tl.load(value_tile + offset * stride_vs, mask=in_head[None, :], other=0.0)
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")

    if HAS_MEANS:
        runs = tl.cdiv(own, mean_blocks)
        mean_set = (batch * (tl.num_programs(0) // GROUP) + key_head) * mean_blocks + (own + mean_blocks - 1) % mean_blocks
        first_mean = mean_set.to(tl.int64) * mean_rows * HEAD_DIM
        mean_weights_row = mean_weights_ptr + list_row * weights_width + first_weight(own, mean_blocks)
        # Whole steps of wider heads spill.
        MEANS_N: tl.constexpr = BLOCK_N if BLOCK_D <= 256 else 16
        # A pipeline of its own would spill on compute capability 8.0, and there are few steps to fill it.
        for first_run in tl.range(0, runs, MEANS_N, num_stages=1):
            run = first_run + tl.arange(0, MEANS_N)
            is_mean = run < runs
            mean_tile = run[:, None] * HEAD_DIM + channels[None, :]
            is_value = is_mean[:, None] & in_head[None, :]
            keys = tl.load(key_means_ptr + first_mean + mean_tile, mask=is_value, other=0.0)
            logits = tl.dot(queries, keys.T, input_precision="ieee")
            log2_tokens = tl.load(mean_weights_row + run, mask=is_mean, other=float("-inf"))
            # NaN, of keys that are not finite, must not come back from a mean that stands for nothing.
            logits = tl.where(log2_tokens[None, :] >= 0, logits * scale_log2 + log2_tokens[None, :], float("-inf"))
            if ONLINE:
                weights, running_max, running_sum, accumulator = _online_softmax(
                    logits, 1.0, running_max, running_sum, accumulator
                )
            else:
                weights = tl.exp2(logits - running_max[:, None])
                running_sum += tl.sum(weights, 1)
            values = tl.load(value_means_ptr + first_mean + mean_tile, mask=is_value, other=0.0)
            accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")

    if HAS_SINKS:
        sink = rounded_product(tl.load(sinks_ptr + head), 1.4426950408889634)
        largest = tl.maximum(running_max, sink)
        # An infinite sink must show, as NaN; one so far above all logits that this overflows leaves nothing of the result.
        running_sum += tl.exp2(sink - largest) / tl.exp2(running_max - largest)
    return running_sum, accumulator


@triton.jit(
    do_not_specialize=[
        "kv_len",
        "query_len",
        "query_offset",
        "first_query_block",
        "tiles",
        "width",
        "sliding_window",
        "mean_blocks",
        "mean_rows",
        "weights_width",
    ]
)
def _attend_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_desc,
    value_desc,
    output_ptr,
    ranges_ptr,
    indices_ptr,
    counts_ptr,
    sinks_ptr,
    key_means_ptr,
    value_means_ptr,
    mean_weights_ptr,
    scale_log2,
    kv_len,
    query_len,
    query_offset,
    first_query_block,
    tiles,
    width,
    sliding_window,
    mean_blocks,
    mean_rows,
    weights_width,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qs: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_ks: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vs: tl.int64,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_os: tl.int64,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_TENSOR_MEMORY: tl.constexpr,
):
    """One program: BLOCK_M queries of one query block and head against the block's list.

    Heads of a group run side by side because they share keys; late query blocks start first because their lists are
    longest.
    """
    PARTS: tl.constexpr = BLOCK // BLOCK_M
    head, batch = tl.program_id(0), tl.program_id(2)
    part = tl.program_id(1) % PARTS
    tile = tiles - 1 - tl.program_id(1) // PARTS
    start, query_begin, query_end, key_end = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    own = query_begin // BLOCK + first_query_block + tile
    first_position = own * BLOCK + part * BLOCK_M
    if (first_position < query_end) & (first_position + BLOCK_M > query_begin) & (query_end > query_begin):
        channels = tl.arange(0, BLOCK_D)
        in_head = channels < HEAD_DIM
        positions = first_position + tl.arange(0, BLOCK_M)
        is_query = (positions >= query_begin) & (positions < query_end)
        query_rows = (start - query_offset + positions).to(tl.int64)
        queries = tl.load(
            query_ptr + batch * stride_qb + head * stride_qh + query_rows[:, None] * stride_qs + channels[None, :],
            mask=is_query[:, None] & in_head[None, :],
            other=0.0,
        )
        list_row = (batch * tl.num_programs(0) + head).to(tl.int64) * tiles + tile
        place = (batch, head, own, first_position, start, key_end, list_row)
        of_means = (key_means_ptr, value_means_ptr, mean_weights_ptr, mean_blocks, mean_rows, weights_width)
        pointers = (key_ptr, value_ptr, key_desc, value_desc, indices_ptr, counts_ptr, sinks_ptr, of_means)
        strides = (stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, width)
        # Weights above 65504 are infinite in float16; a prompt's first tokens may have logits 11 (natural units) above others.
        NEEDS_MAXIMUM: tl.constexpr = key_ptr.dtype.element_ty == tl.float16
        total, accumulator = _attend(
            queries, positions, place, pointers, strides, scale_log2, sliding_window, NEEDS_MAXIMUM, False, GROUP, HEAD_DIM,
            BLOCK_D, BLOCK, BLOCK_M, BLOCK_N, HAS_RANGES, HAS_DESCRIPTORS, HAS_WINDOW, HAS_SINKS, HAS_MEANS,
        )  # fmt: skip
        # What is not finite anywhere makes a sum of zeros NaN.
        is_finite = (tl.sum(accumulator * 0.0, 1) == 0) & (total > SMALLEST_TOTAL) & (total < LARGEST_TOTAL)
        is_right = (is_finite | (is_query == 0)).to(tl.int32)
        if HAS_TENSOR_MEMORY:
            # As a matrix of one row: triton 3.6 and 3.7 cannot compile the minimum of flags that come out of tensor memory.
            # Elsewhere the detour costs up to 1.6 % (H200, head_dim 128, bfloat16, 8K tokens).
            all_right = tl.sum(tl.min(is_right[None, :], 1), 0)
        else:
            all_right = tl.min(is_right, 0)
        if all_right == 0:
            total, accumulator = _attend(
                queries, positions, place, pointers, strides, scale_log2, sliding_window, True, True, GROUP, HEAD_DIM,
                BLOCK_D, BLOCK, BLOCK_M, BLOCK_N, HAS_RANGES, HAS_DESCRIPTORS, HAS_WINDOW, HAS_SINKS, HAS_MEANS,
            )  # fmt: skip
        accumulator = accumulator / total[:, None]
        # Anew: kept through the loops they were spilled.
        positions = first_position + not_before(tl.arange(0, BLOCK_M))
        is_query = (positions >= query_begin) & (positions < query_end)
        query_rows = (start - query_offset + positions).to(tl.int64)
        tl.store(
            output_ptr + batch * stride_ob + head * stride_oh + query_rows[:, None] * stride_os + channels[None, :],
            accumulator.to(output_ptr.dtype.element_ty),
            mask=is_query[:, None] & in_head[None, :],
        )


def _descriptors(key: torch.Tensor, value: torch.Tensor, block_d: int, tiles: AttendTiles) -> tuple | None:
    """Keys and values for the bulk copy engine, or None if it cannot take them or the table says pointers."""
    if not tiles.copy_engine or key.shape[-1] != block_d or not all(copy_engine_takes(tensor) for tensor in (key, value)):
        return None
    block = [1, 1, tiles.block_n, block_d]
    return tuple(TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block) for tensor in (key, value))


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: BlockIndex,
    *,
    scale: float,
    output: torch.Tensor,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    means: RunMeans | None = None,
) -> None:
    """Write the attention of the index's query blocks into ``output`` [B, Hq, Sq, D]; other rows are left alone.

    ``sliding_window`` (tokens) wants the lists of ``BlockIndex.of_window``; ``sinks`` are float32 [Hq]; ``means``
    come from ``run_means``.
    """
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    geometry = index.geometry
    batch, heads, query_len, head_dim = query.shape
    block_d = padded_head_dim(head_dim)
    capability = compute_capability(query)
    tiles = attend_tiles(capability, block_d, query.dtype, geometry.block_size)
    described = _descriptors(key, value, block_d, tiles)
    if described is None:
        tiles = tiles.with_pointers(block_d)
    mean_blocks, mean_rows = (1, 0) if means is None else means.key.shape[2:4]
    mean_weights = None if means is None else weigh_means(index, mean_blocks)
    with launch_context(query):
        _attend_kernel[heads, index.query_blocks * (geometry.block_size // tiles.block_m), batch](
            query,
            key,
            value,
            *(described or (None, None)),
            output,
            geometry.valid_ranges,
            index.indices,
            index.counts,
            sinks,
            *((None, None) if means is None else (means.key, means.value)),
            mean_weights,
            scale * math.log2(math.e),
            geometry.kv_len,
            query_len,
            geometry.query_offset,
            index.first_query_block,
            index.query_blocks,
            index.indices.shape[-1],
            sliding_window or 0,
            mean_blocks,
            mean_rows,
            0 if mean_weights is None else mean_weights.shape[-1],
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *output.stride()[:3],
            GROUP=heads // key.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK=geometry.block_size,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            HAS_RANGES=geometry.valid_ranges is not None,
            HAS_DESCRIPTORS=described is not None,
            HAS_WINDOW=sliding_window is not None,
            HAS_SINKS=sinks is not None,
            HAS_MEANS=means is not None,
            HAS_TENSOR_MEMORY=capability[0] == 10,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            # Fused multiply-adds carry the softmax; Triton 3.10 stops fusing unless told.
            enable_fp_fusion=True,
        )
