"""Exact attention over listed key blocks for Hopper GPUs, in Gluon: the schedule of FlashAttention-3, driven by block lists.

One warp loads with the bulk tensor copy engine (TMA); two warpgroups compute, 64 queries each. While a warpgroup's weights
of one step multiply values on the tensor cores, it takes the exponentials of the next step, and the two warpgroups fill
each other's gaps. A program works through several heads of the same query block: the loader fetches the next head's queries
and keys while the last head's result is still being written, which a launch per head would leave idle.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...block_index import BlockIndex
from .attend_hopper_steps import (
    MEAN_WEIGHTS_LAYOUT,
    MEANS,
    causal,
    compute_step,
    issue_products,
    load_means,
    load_step,
    softmax_step,
)
from .hopper_primitives import copy_to_shared, describe_rows, make_barriers, row_span
from .means import RunMeans, weigh_means
from .primitives import copy_engine_takes, launch_context, multiprocessors
from .tuning import heads_per_program, hopper_tiles

BLOCK = gl.constexpr(128)
ROWS = gl.constexpr(64)
# Query blocks at the end of a call are usually attended in full. They start first, each of its heads by itself, or the last
# to start would run alone.
LONG_TILES = 2


@gluon.jit
def _compute(
    warpgroup,
    shared,
    DIRECT_STORE: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """One of the two computing warpgroups: its 64 queries of the query block, head after head.

    The first step of the next head takes the place that a step of the same head would have: its query-key product runs
    beside the last product with values, and its exponentials hide the wait for that.
    """
    buffers, barriers, pointers, strides, place, work, scale_log2 = shared
    query_tiles, key_tiles, _, _ = buffers
    query_full, query_empty, key_full, key_empty, _, value_empty = barriers
    output_ptr, counts_ptr, _ = pointers
    stride_h, stride_s = strides
    first_row, own, query_begin, query_end, key_end = place
    head_count, list_stride, _, mean_steps, means_unused_from, _, _, _ = work
    STAGES: gl.constexpr = key_tiles.shape[0]
    QUERY_STAGES: gl.constexpr = query_tiles.shape[0] // 2
    STEP: gl.constexpr = key_tiles.shape[3]
    HEAD_DIM: gl.constexpr = key_tiles.shape[4]
    PARTS: gl.constexpr = BLOCK // STEP
    dtype: gl.constexpr = query_tiles.dtype
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    result_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, result_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, logits_layout)
    line_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    store_layout: gl.constexpr = result_layout if DIRECT_STORE else line_layout
    mean_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MEANS, 16])
    mean_row_layout: gl.constexpr = gl.SliceLayout(1, mean_layout)

    zeros = gl.zeros([ROWS, STEP], gl.float32, logits_layout)
    mean_zeros = gl.zeros([ROWS, MEANS], gl.float32, mean_layout)
    no_max = gl.full([ROWS], -1e30, gl.float32, row_layout)
    no_sum = gl.zeros([ROWS], gl.float32, row_layout)
    own_row = warpgroup * ROWS
    keys_left = key_end - own * BLOCK
    output_ptr += (first_row + own_row).to(gl.int64) * stride_s

    if head_count > 0:
        mbarrier.wait(query_full.index(warpgroup), 0)
        query = query_tiles.index(warpgroup).reshape([ROWS, HEAD_DIM])
        mbarrier.wait(key_full.index(0), 0)
        key = key_tiles.index(0).reshape([STEP, HEAD_DIM])
        logits = warpgroup_mma(query, key.permute([1, 0]), zeros, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=[logits])
        mbarrier.arrive(key_empty.index(0), count=1)
        logits = causal(logits, own_row, 0, logits_layout)
        weights, running_max, running_sum, rescale = softmax_step(logits, no_max, no_sum, scale_log2)
        weights = gl.convert_layout(weights.to(dtype), weights_layout)
        result = gl.zeros([ROWS, HEAD_DIM], gl.float32, result_layout)

        done = 0
        for turn in range(head_count):
            listed_steps = gl.load(counts_ptr + turn * list_stride) * PARTS
            steps = listed_steps + mean_steps
            buffer = turn % QUERY_STAGES * 2 + warpgroup
            query = query_tiles.index(buffer).reshape([ROWS, HEAD_DIM])
            # The own block's other part, where a block takes two steps; only the own block needs the causal mask.
            for step in range(1, PARTS):
                weights, result, running_max, running_sum = compute_step(
                    query, weights, result, running_max, running_sum, zeros, buffers, barriers, done + step, step + 1 == steps,
                    step * STEP, own_row, keys_left - (step - 1) * STEP, scale_log2, "own", HAS_RANGES,
                )  # fmt: skip
            for step in range(PARTS, listed_steps):
                unused_from = gl.where(step == PARTS, keys_left - (PARTS - 1) * STEP, STEP)
                weights, result, running_max, running_sum = compute_step(
                    query, weights, result, running_max, running_sum, zeros, buffers, barriers, done + step, step + 1 == steps,
                    0, 0, unused_from, scale_log2, "listed", HAS_RANGES,
                )  # fmt: skip
            unused_from = gl.where(listed_steps == PARTS, keys_left - (PARTS - 1) * STEP, STEP)
            last_weights = weights
            if HAS_MEANS:
                # One step at least, so that the shape of the last weights is known.
                mean_max = gl.convert_layout(running_max, mean_row_layout)
                mean_sum = gl.convert_layout(running_sum, mean_row_layout)
                last_weights, result, mean_max, mean_sum = compute_step(
                    query, weights, result, mean_max, mean_sum, mean_zeros, buffers, barriers, done + listed_steps,
                    mean_steps == 1, 0, 0, unused_from, scale_log2, "means", HAS_RANGES,
                )  # fmt: skip
                for step in range(listed_steps + 1, steps):
                    last_weights, result, mean_max, mean_sum = compute_step(
                        query, last_weights, result, mean_max, mean_sum, mean_zeros, buffers, barriers, done + step,
                        step + 1 == steps, 0, 0, MEANS, scale_log2, "means", False,
                    )  # fmt: skip
                running_sum = gl.convert_layout(mean_sum, row_layout)
                unused_from = means_unused_from
            mbarrier.arrive(query_empty.index(buffer), count=1)
            done += steps

            # After the last head the product below reads old buffers; nothing uses what comes of it.
            is_more = turn + 1 < head_count
            buffer = (turn + 1) % QUERY_STAGES * 2 + warpgroup
            phase = ((turn + 1) // QUERY_STAGES) & 1
            mbarrier.wait(query_full.index(buffer), phase, pred=is_more)
            query = query_tiles.index(buffer).reshape([ROWS, HEAD_DIM])
            logits_in_work, result_in_work = issue_products(
                query, last_weights, result, zeros, buffers, barriers, done, unused_from, HAS_RANGES or HAS_MEANS, is_more
            )
            logits = warpgroup_mma_wait(1, deps=[logits_in_work])
            mbarrier.arrive(key_empty.index(done % STAGES), count=1, pred=is_more)
            logits = causal(logits, own_row, 0, logits_layout)
            next_weights, next_max, next_sum, rescale = softmax_step(logits, no_max, no_sum, scale_log2)
            next_weights = gl.convert_layout(next_weights.to(dtype), weights_layout)
            mbarrier.wait(query_full.index(buffer), phase, pred=is_more)
            result, last_weights = warpgroup_mma_wait(0, deps=[result_in_work, last_weights])
            mbarrier.arrive(value_empty.index((done - 1) % STAGES), count=1)
            result = result / gl.convert_layout(running_sum, gl.SliceLayout(1, result_layout))[:, None]
            row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, store_layout))
            column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, store_layout))
            position = own * BLOCK + own_row + row
            is_query = (position >= query_begin) & (position < query_end)
            target = output_ptr + turn * stride_h + (row[:, None] * stride_s.to(gl.int32) + column[None, :])
            gl.store(target, gl.convert_layout(result.to(dtype), store_layout), mask=is_query[:, None])
            weights, running_max, running_sum = next_weights, next_max, next_sum
            result = gl.zeros([ROWS, HEAD_DIM], gl.float32, result_layout)


@gluon.jit
def _load(
    buffers,
    barriers,
    descriptors,
    pointers,
    place,
    work,
    batch,
    start,
    first_head,
    GROUP: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """The loading warp: queries of each head, then the listed keys and values in the order they are computed with, then the
    means."""
    query_tiles, key_tiles, _, _ = buffers
    query_full, query_empty, _, _, _, _ = barriers
    query_desc, key_desc, value_desc, _, _, _ = descriptors
    _, counts_ptr, indices_ptr = pointers
    first_row, own, _, _, _ = place
    head_count, list_stride, width, mean_steps, _, first_list, mean_set, mean_blocks = work
    QUERY_STAGES: gl.constexpr = query_tiles.shape[0] // 2
    STEP: gl.constexpr = key_tiles.shape[3]
    PARTS: gl.constexpr = BLOCK // STEP
    done = 0
    for turn in range(head_count):
        head = first_head + turn
        listed = indices_ptr + turn * list_stride * width
        steps = gl.load(counts_ptr + turn * list_stride) * PARTS
        for warpgroup in gl.static_range(2):
            buffer = turn % QUERY_STAGES * 2 + warpgroup
            mbarrier.wait(query_empty.index(buffer), ((turn // QUERY_STAGES) & 1) ^ 1)
            mbarrier.expect(query_full.index(buffer), query_desc.block_type.nbytes)
            coordinates = [batch, head, first_row + warpgroup * ROWS, 0]
            copy_to_shared(query_desc, coordinates, query_full.index(buffer), query_tiles.index(buffer))
        for step in range(steps):
            # The list ends with the block's own number, which is computed first.
            block = gl.load(listed + step // PARTS - 1, mask=step >= PARTS, other=own)
            coordinates = [batch, head // GROUP, start + block * BLOCK + step % PARTS * STEP, 0]
            load_step(key_desc, value_desc, coordinates, buffers, barriers, done + step)
        done += steps
        if HAS_MEANS:
            for step in range(mean_steps):
                mean_head = [batch, mean_set + head // GROUP * mean_blocks]
                list_row = first_list + turn * list_stride
                load_means(descriptors, mean_head, list_row, step * MEANS, buffers, barriers, done + step)
            done += mean_steps


@gluon.jit(
    do_not_specialize=[
        "kv_len",
        "query_len",
        "query_offset",
        "first_query_block",
        "tiles",
        "width",
        "mean_blocks",
        "head_count",
        "long_tiles",
        "batch_heads",
    ]
)
def _attend_hopper_kernel(
    query_desc,
    key_desc,
    value_desc,
    key_means_desc,
    value_means_desc,
    mean_weights_desc,
    output_ptr,
    ranges_ptr,
    indices_ptr,
    counts_ptr,
    spoiled_ptr,
    scale_log2,
    kv_len,
    query_len,
    query_offset,
    first_query_block,
    tiles,
    width,
    mean_blocks,
    head_count,
    long_tiles,
    batch_heads,
    heads,
    stride_ob: gl.int64,
    stride_oh: gl.int64,
    stride_os: gl.int64,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    QUERY_STAGES: gl.constexpr,
    DIRECT_STORE: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """One program: one query block of ``head_count`` neighbouring heads against their lists; of the last ``long_tiles`` query
    blocks, of one head."""
    HEAD_DIM: gl.constexpr = key_desc.block_type.shape[3]
    # Programs of one head run together, so that what they read stays in the L2 cache; the longest first.
    number = gl.program_id(0)
    long_programs = long_tiles * batch_heads
    is_long = number < long_programs
    rest, rest_tiles = number - long_programs, gl.maximum(tiles - long_tiles, 1)
    tile = tiles - 1 - gl.where(is_long, number // batch_heads, long_tiles + rest % rest_tiles)
    row_head = gl.where(is_long, number % batch_heads, rest // rest_tiles * head_count)
    head_count = gl.where(is_long, 1, head_count)
    batch, first_head = row_head // heads, row_head % heads

    start, query_begin, query_end, key_end = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    own = query_begin // BLOCK + first_query_block + tile
    is_empty = (own * BLOCK >= query_end) | (query_end <= query_begin)
    first_row = start - query_offset + own * BLOCK
    list_row = (batch * heads + first_head).to(gl.int64) * tiles + tile

    buffers = (
        gl.allocate_shared_memory(query_desc.dtype, [2 * QUERY_STAGES, 1, 1, ROWS, HEAD_DIM], query_desc.layout),
        gl.allocate_shared_memory(key_desc.dtype, [STAGES, 1, 1, STEP, HEAD_DIM], key_desc.layout),
        gl.allocate_shared_memory(value_desc.dtype, [STAGES, 1, 1, STEP, HEAD_DIM], value_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, MEANS], MEAN_WEIGHTS_LAYOUT),
    )
    barriers = (
        make_barriers(2 * QUERY_STAGES, 1),
        make_barriers(2 * QUERY_STAGES, 1),
        make_barriers(STAGES, 1),
        make_barriers(STAGES, 2),
        make_barriers(STAGES, 1),
        make_barriers(STAGES, 2),
    )
    fence_async_shared()

    output_ptr += batch * stride_ob + first_head * stride_oh
    mean_steps = own * 0
    means_unused_from = own * 0
    mean_set = own * 0
    if HAS_MEANS:
        # The first query block reads means that weigh nothing: every head ends with a step of means.
        mean_steps = gl.maximum(gl.cdiv(gl.cdiv(own, mean_blocks), MEANS), 1)
        mean_set = gl.where(own > 0, (own + mean_blocks - 1) % mean_blocks, 0)
        # The step's last means are of later blocks, if of any. Their weights are zero.
        last_means = gl.cdiv(own, mean_blocks) - (mean_steps - 1) * MEANS
        means_unused_from = gl.where(gl.load(spoiled_ptr) == 0, MEANS, last_means)
    pointers = (output_ptr, counts_ptr + list_row, indices_ptr + list_row * width)
    strides = (stride_oh, stride_os)
    place = (first_row, own, query_begin, query_end, key_end)
    work = (
        gl.where(is_empty, 0, head_count),
        tiles,
        width.to(gl.int64),
        mean_steps,
        means_unused_from,
        list_row.to(gl.int32),
        mean_set,
        mean_blocks,
    )
    descriptors = (query_desc, key_desc, value_desc, key_means_desc, value_means_desc, mean_weights_desc)
    shared = (buffers, barriers, pointers, strides, place, work, scale_log2)
    gl.warp_specialize(
        [
            (_compute, (0, shared, DIRECT_STORE, HAS_RANGES, HAS_MEANS)),
            (_compute, (1, shared, DIRECT_STORE, HAS_RANGES, HAS_MEANS)),
            (_load, (buffers, barriers, descriptors, pointers, place, work, batch, start, first_head, GROUP, HAS_MEANS)),
        ],
        [4, 1],
        [240, 24],
    )


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int) -> bool:
    """Whether this kernel can take the tensors: 16-bit, head_dim 64, 128 or 256, strides the copy engine accepts."""
    if block_size != BLOCK or query.dtype == torch.float32 or query.shape[-1] not in (64, 128, 256):
        return False
    return all(copy_engine_takes(tensor) for tensor in (query, key, value))


def _mean_descriptors(means: RunMeans, weights: torch.Tensor) -> list[TensorDescriptor]:
    lists = weights.flatten(0, 2)
    described = [describe_rows(tensor.flatten(1, 2), MEANS.value) for tensor in (means.key, means.value)]
    layout = MEAN_WEIGHTS_LAYOUT.value
    return [*described, TensorDescriptor(lists, list(lists.shape), list(lists.stride()), [1, MEANS.value], layout)]


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: BlockIndex,
    *,
    scale: float,
    output: torch.Tensor,
    means: RunMeans | None = None,
) -> None:
    """Write the attention of the index's query blocks into ``output`` [B, Hq, Sq, D]; other rows are left alone.

    ``means`` come from ``run_means``; dropped blocks take part through them.
    """
    geometry = index.geometry
    batch, heads, query_len, head_dim = query.shape
    tiles = hopper_tiles(head_dim)
    long_tiles = min(LONG_TILES, index.query_blocks)
    other_tiles = batch * (index.query_blocks - long_tiles)
    head_count = heads_per_program(heads, other_tiles, multiprocessors(query), tiles.query_stages)
    mean_blocks = 1 if means is None else means.key.shape[2]
    of_means = [None] * 3 if means is None else _mean_descriptors(means, weigh_means(index, mean_blocks))
    with launch_context(query):
        _attend_hopper_kernel[batch * heads * long_tiles + heads // head_count * other_tiles,](
            describe_rows(query, ROWS.value),
            describe_rows(key, tiles.step),
            describe_rows(value, tiles.step),
            *of_means,
            output,
            geometry.valid_ranges,
            index.indices,
            index.counts,
            None if means is None else means.spoiled,
            scale * math.log2(math.e),
            geometry.kv_len,
            query_len,
            geometry.query_offset,
            index.first_query_block,
            index.query_blocks,
            index.indices.shape[-1],
            mean_blocks,
            head_count,
            long_tiles,
            batch * heads,
            heads,
            *output.stride()[:3],
            GROUP=heads // key.shape[1],
            STEP=tiles.step,
            STAGES=tiles.stages,
            QUERY_STAGES=tiles.query_stages,
            DIRECT_STORE=tiles.direct_store,
            HAS_RANGES=geometry.valid_ranges is not None,
            HAS_MEANS=means is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
