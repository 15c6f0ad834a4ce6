"""Exact attention over listed key blocks for Hopper GPUs, in Gluon: the schedule of FlashAttention-3, driven by block lists.

One warp loads with the bulk tensor copy engine (TMA); two warpgroups compute, 64 queries each. While a warpgroup's weights
of one step multiply values on the tensor cores, it takes the exponentials of the next step, and the two warpgroups fill
each other's gaps. A program stays on its multiprocessor and takes turn after turn, a query block of one head each: the loading
warp fetches the next one's queries and keys while the last one's result is still being written, which a program per turn would
leave idle.

The softmax has no running maximum. Weights in bfloat16 have the range of float32, so they are taken relative to the largest
logit of the query block's own keys, which come first: nothing is compared and no result shrinks in the steps that follow, and
a query's sum stays with the threads until the end. Where a logit is so far above (by about 83 in natural units, or less if the
values are huge) that a sum or a result overflows, the turn is taken again after the program's last one, with a running
maximum. float16, which ends at 65504, always has one. Time against a running maximum throughout, in one process, without and
with means: head_dim 128 .89 and .91 at 32K tokens, .91 and .92 at 128K, .96 and .93 at 256K, .88 and .88 with every block of
16K tokens listed; there, head_dim 64 .86 and .87, 256 .85 and .86 (H200, 32 query and 8 key-value heads, bfloat16, published
densities).

Against a program per query block and up to four heads, which multiplied its next head's first tile beside its last head's
last, a variant of this one took .96 of the time at 16K tokens, .99 at 32K (with means) and 64K and .95 at 128K (H100, 32 query
and 8 key-value heads, head_dim 128, bfloat16, published densities, one process).
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...block_index import BlockIndex
from .attend_hopper_steps import (
    MEAN_WEIGHTS_LAYOUT,
    MEANS,
    compute_step,
    first_step,
    last_product,
    load_means,
    load_step,
    partial_sums,
)
from .attend_hopper_turns import (
    ANNOUNCEMENTS,
    BLOCK,
    SHARED_NUMBER,
    announce,
    await_retakes,
    await_turn,
    direction_of,
    draw_retake,
    draw_turn,
    hand_over_retakes,
    make_announcements,
    next_number,
    note_retake,
    number_of,
    place_of,
)
from .hopper_primitives import copy_to_shared, describe_rows, make_barriers
from .means import RunMeans, weigh_means
from .primitives import LARGEST_TOTAL, copy_engine_takes, launch_context, multiprocessors
from .tuning import hopper_tiles

# Queries of a warpgroup.
ROWS = gl.constexpr(64)
LOG2_E = gl.constexpr(math.log2(math.e))


@gluon.jit
def _mean_steps(own, mean_blocks, HAS_MEANS: gl.constexpr):
    """Steps of means of the query block with the key block ``own``. The first query block reads means that weigh nothing: every
    turn ends with a step of means."""
    steps = own * 0
    if HAS_MEANS:
        steps = gl.maximum(gl.cdiv(gl.cdiv(own, mean_blocks), MEANS), 1)
    return steps


@gluon.jit
def _take_turns(
    warpgroup,
    shared,
    turn,
    done,
    ONLINE: gl.constexpr,
    PASS: gl.constexpr,
    QUERY_IN_REGISTERS: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """Turns from the program's ``turn``-th on until there are no more, ``done`` counts steps. Returns both and the last turn
    noted to be taken again, of which there are none if ONLINE."""
    buffers, barriers, announcements, pointers, strides, shape, mean_blocks, scale_log2 = shared
    query_tiles, key_tiles, _, _ = buffers
    query_full, query_empty, _, _, _, _, turn_full = barriers
    output_ptr, ranges_ptr, _, retakes_ptr, _, _, spoiled_ptr, sinks_ptr = pointers
    stride_b, stride_h, stride_s = strides
    QUERY_STAGES: gl.constexpr = query_tiles.shape[0] // 2
    STEP: gl.constexpr = key_tiles.shape[3]
    HEAD_DIM: gl.constexpr = key_tiles.shape[4]
    PARTS: gl.constexpr = BLOCK // STEP
    dtype: gl.constexpr = query_tiles.dtype
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    result_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, logits_layout)
    result_row_layout: gl.constexpr = gl.SliceLayout(1, result_layout)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    mean_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MEANS, 16])
    mean_row_layout: gl.constexpr = gl.SliceLayout(1, mean_layout)

    zeros = gl.zeros([ROWS, STEP], gl.float32, logits_layout)
    mean_zeros = gl.zeros([ROWS, MEANS], gl.float32, mean_layout)
    own_row = warpgroup * ROWS
    sums_layout: gl.constexpr = partial_sums(zeros).type.layout
    mean_sums_layout: gl.constexpr = partial_sums(mean_zeros).type.layout
    turn, done, noted = gl.to_tensor(turn), gl.to_tensor(done), gl.to_tensor(-1)
    # Before pass 1 one announcement was of no turn.
    number, listed = await_turn(announcements, turn_full, turn + PASS)
    while number >= 0:
        place, block, span = place_of(number, shape, ranges_ptr, HAS_RANGES)
        batch, head, tile = place
        own, first_row = block
        start, query_begin, query_end, key_end = span
        keys_left = key_end - own * BLOCK
        listed_steps = listed * PARTS
        steps = listed_steps + _mean_steps(own, mean_blocks, HAS_MEANS)
        buffer = turn % QUERY_STAGES * 2 + warpgroup
        mbarrier.wait(query_full.index(buffer), (turn // QUERY_STAGES) & 1)
        query = query_tiles.index(buffer).reshape([ROWS, HEAD_DIM])
        if QUERY_IN_REGISTERS:
            query = query.load(gl.DotOperandLayout(0, logits_layout, 2))
            mbarrier.arrive(query_empty.index(buffer), count=1)
        weights, running_max, running_sum = first_step(
            query, zeros, buffers, barriers, done, own_row, scale_log2, result_layout
        )
        result = gl.zeros([ROWS, HEAD_DIM], gl.float32, result_layout)
        # The own block's other part, where a block takes two steps; only the own block needs the causal mask.
        for step in range(1, PARTS):
            weights, result, running_max, running_sum = compute_step(
                query, weights, result, running_max, running_sum, zeros, buffers, barriers, done + step, step + 1 == steps,
                step * STEP, own_row, keys_left - (step - 1) * STEP, scale_log2, "own", ONLINE, HAS_RANGES,
            )  # fmt: skip
        for step in range(PARTS, listed_steps):
            unused_from = gl.where(step == PARTS, keys_left - (PARTS - 1) * STEP, STEP)
            weights, result, running_max, running_sum = compute_step(
                query, weights, result, running_max, running_sum, zeros, buffers, barriers, done + step, step + 1 == steps,
                0, 0, unused_from, scale_log2, "listed", ONLINE, HAS_RANGES,
            )  # fmt: skip
        unused_from = gl.where(listed_steps == PARTS, keys_left - (PARTS - 1) * STEP, STEP)
        last_weights = weights
        if HAS_MEANS:
            is_spoiled = gl.load(spoiled_ptr) != 0
            # One step at least, so that the shape of the last weights is known.
            mean_max = gl.convert_layout(running_max, mean_row_layout)
            mean_sum = gl.convert_layout(running_sum, mean_sums_layout)
            last_weights, result, mean_max, mean_sum = compute_step(
                query, weights, result, mean_max, mean_sum, mean_zeros, buffers, barriers, done + listed_steps,
                listed_steps + 1 == steps, 0, 0, unused_from, scale_log2, "means", ONLINE, HAS_RANGES,
            )  # fmt: skip
            for step in range(listed_steps + 1, steps):
                last_weights, result, mean_max, mean_sum = compute_step(
                    query, last_weights, result, mean_max, mean_sum, mean_zeros, buffers, barriers, done + step,
                    step + 1 == steps, 0, 0, MEANS, scale_log2, "means", ONLINE, False,
                )  # fmt: skip
            running_max = gl.convert_layout(mean_max, row_layout)
            running_sum = gl.convert_layout(mean_sum, sums_layout)
            # The last step's means may be of later blocks. Their weights are zero, but a value that is not finite is not.
            in_last_step = gl.cdiv(own, mean_blocks) - (steps - listed_steps - 1) * MEANS
            unused_from = gl.where(is_spoiled, in_last_step, MEANS)
        if not QUERY_IN_REGISTERS:
            mbarrier.arrive(query_empty.index(buffer), count=1)
        done += steps
        # Asked anew, so that the steps have the registers.
        number = number_of(announcements, turn + PASS)
        place, block, span = place_of(number, shape, ranges_ptr, HAS_RANGES)
        batch, head, tile = place
        own, first_row = block
        start, query_begin, query_end, key_end = span
        result = last_product(last_weights, result, buffers, barriers, done - 1, unused_from, HAS_RANGES or HAS_MEANS)
        total = gl.convert_layout(gl.sum(running_sum, 1), result_row_layout)
        if HAS_SINKS:
            sink = gl.load(sinks_ptr + head) * LOG2_E
            running_max = gl.convert_layout(running_max, result_row_layout)
            largest = gl.maximum(running_max, sink)
            # An infinite sink must show, as NaN; one so far above all logits that this overflows leaves nothing of the result.
            total += gl.exp2(sink - largest) / gl.exp2(running_max - largest)
        if not ONLINE:
            position = own * BLOCK + own_row + gl.arange(0, ROWS, layout=result_row_layout)
            is_query = (position >= query_begin) & (position < query_end)
            # What is not finite anywhere makes a sum of zeros NaN.
            is_finite = (gl.sum(result * 0.0, 1) == 0) & (total < LARGEST_TOTAL)
            is_kept = gl.min((is_finite | (is_query == 0)).to(gl.int32), 0)
            noted = note_retake(retakes_ptr, warpgroup, shape, number, noted, is_kept)
        result = result / total[:, None]
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, store_layout))
        column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, store_layout))
        position = own * BLOCK + own_row + row
        is_query = (position >= query_begin) & (position < query_end)
        target = output_ptr + batch * stride_b + head * stride_h + (first_row + own_row).to(gl.int64) * stride_s
        target += row[:, None] * stride_s.to(gl.int32) + column[None, :]
        gl.store(target, gl.convert_layout(result.to(dtype), store_layout), mask=is_query[:, None])
        turn += 1
        number, listed = await_turn(announcements, turn_full, turn + PASS)
    return turn, done, noted


@gluon.jit
def _compute(
    warpgroup,
    shared,
    handed,
    handed_over,
    MAY_RETAKE: gl.constexpr,
    QUERY_IN_REGISTERS: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """One of the two computing warpgroups: its 64 queries of the query block, turn after turn."""
    turn, done, noted = _take_turns(
        warpgroup, shared, 0, 0, not MAY_RETAKE, 0, QUERY_IN_REGISTERS, HAS_RANGES, HAS_SINKS, HAS_MEANS
    )
    if MAY_RETAKE:
        hand_over_retakes(handed, handed_over, warpgroup, noted)
        _take_turns(warpgroup, shared, turn, done, True, 1, QUERY_IN_REGISTERS, HAS_RANGES, HAS_SINKS, HAS_MEANS)


@gluon.jit
def _load_turns(
    loaded,
    noted,
    turn,
    done,
    PASS: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """What ``_take_turns`` computes with: of each turn the queries, then the listed keys and values, which are computed with in
    the order they are loaded, then the means."""
    buffers, barriers, announcements, descriptors, pointers, shape, width, mean_blocks = loaded
    query_tiles, key_tiles, _, _ = buffers
    query_full, query_empty, _, _, _, _, turn_full = barriers
    query_desc, key_desc, value_desc, _, _, _ = descriptors
    _, ranges_ptr, next_turn_ptr, retakes_ptr, counts_ptr, indices_ptr, _, _ = pointers
    heads, _, tiles, _, _, _, _ = shape
    STAGES: gl.constexpr = key_tiles.shape[0]
    QUERY_STAGES: gl.constexpr = query_tiles.shape[0] // 2
    STEP: gl.constexpr = key_tiles.shape[3]
    PARTS: gl.constexpr = BLOCK // STEP
    turn, done = gl.to_tensor(turn), gl.to_tensor(done)
    if PASS == 1:
        number, listed, noted = draw_retake(noted, shape, ranges_ptr, retakes_ptr, counts_ptr, HAS_RANGES)
    else:
        number, listed = draw_turn(gl.program_id(0), shape, ranges_ptr, next_turn_ptr, counts_ptr, HAS_RANGES)
    while number >= 0:
        announce(announcements, turn_full, turn + PASS, number, listed)
        place, own_block, span = place_of(number, shape, ranges_ptr, HAS_RANGES)
        batch, head, tile = place
        own, first_row = own_block
        start = span[0]
        list_row = (batch * heads + head) * tiles + tile
        list_ptr = indices_ptr + list_row.to(gl.int64) * width
        for warpgroup in gl.static_range(2):
            buffer = turn % QUERY_STAGES * 2 + warpgroup
            mbarrier.wait(query_empty.index(buffer), ((turn // QUERY_STAGES) & 1) ^ 1)
            mbarrier.expect(query_full.index(buffer), query_desc.block_type.nbytes)
            coordinates = [batch, head, first_row + warpgroup * ROWS, 0]
            copy_to_shared(query_desc, coordinates, query_full.index(buffer), query_tiles.index(buffer))
        key_head = head // GROUP
        # The list ends with the block's own number, which is computed first.
        for part in gl.static_range(PARTS):
            coordinates = [batch, key_head, start + own * BLOCK + part * STEP, 0]
            load_step(key_desc, value_desc, coordinates, buffers, barriers, done + part)
        done += PARTS
        steps = (listed - 1) * PARTS
        first_entry, direction = direction_of(own, listed)
        list_ptr += first_entry
        first_steps = gl.minimum(steps, STAGES - PARTS)
        for step in range(first_steps):
            block = gl.load(list_ptr + direction * (step // PARTS))
            coordinates = [batch, key_head, start + block * BLOCK + step % PARTS * STEP, 0]
            load_step(key_desc, value_desc, coordinates, buffers, barriers, done + step)
        # Now that the buffers are full there is time to ask what comes next.
        if PASS == 1:
            number, listed, noted = draw_retake(noted, shape, ranges_ptr, retakes_ptr, counts_ptr, HAS_RANGES)
        else:
            number, listed = draw_turn(next_number(next_turn_ptr), shape, ranges_ptr, next_turn_ptr, counts_ptr, HAS_RANGES)
        for step in range(first_steps, steps):
            block = gl.load(list_ptr + direction * (step // PARTS))
            coordinates = [batch, key_head, start + block * BLOCK + step % PARTS * STEP, 0]
            load_step(key_desc, value_desc, coordinates, buffers, barriers, done + step)
        done += steps
        if HAS_MEANS:
            mean_set = gl.where(own > 0, (own + mean_blocks - 1) % mean_blocks, 0)
            mean_head = [batch, mean_set + key_head * mean_blocks]
            mean_steps = _mean_steps(own, mean_blocks, HAS_MEANS)
            for step in range(mean_steps):
                load_means(descriptors, mean_head, list_row, step * MEANS, buffers, barriers, done + step)
            done += mean_steps
        turn += 1
    announce(announcements, turn_full, turn + PASS, number, listed)
    return turn, done


@gluon.jit
def _load(
    loaded,
    handed,
    handed_over,
    MAY_RETAKE: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """The loading warp."""
    turn, done = _load_turns(loaded, (-1, -1), 0, 0, 0, GROUP, HAS_RANGES, HAS_MEANS)
    if MAY_RETAKE:
        noted = await_retakes(handed, handed_over)
        _load_turns(loaded, noted, turn, done, 1, GROUP, HAS_RANGES, HAS_MEANS)


@gluon.jit(
    do_not_specialize=[
        "kv_len",
        "query_len",
        "query_offset",
        "first_query_block",
        "tiles",
        "width",
        "mean_blocks",
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
    next_turn_ptr,
    retakes_ptr,
    counts_ptr,
    indices_ptr,
    spoiled_ptr,
    sinks_ptr,
    scale_log2,
    kv_len,
    query_len,
    query_offset,
    first_query_block,
    tiles,
    width,
    mean_blocks,
    batch_heads,
    heads,
    stride_ob: gl.int64,
    stride_oh: gl.int64,
    stride_os: gl.int64,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    QUERY_STAGES: gl.constexpr,
    QUERY_IN_REGISTERS: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """One program of as many as there are multiprocessors: turns until there are no more."""
    HEAD_DIM: gl.constexpr = key_desc.block_type.shape[3]
    # Weights above 65504 are infinite in float16; a prompt's first tokens may have logits 11 (natural units) above others.
    MAY_RETAKE: gl.constexpr = key_desc.dtype == gl.bfloat16
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
        make_barriers(ANNOUNCEMENTS, 1),
    )
    announcements = make_announcements()
    handed = gl.allocate_shared_memory(gl.int32, [2, 1], SHARED_NUMBER)
    handed_over = make_barriers(1, 2)
    fence_async_shared()

    shape = (heads, batch_heads, tiles, first_query_block, query_offset, query_len, kv_len)
    pointers = (output_ptr, ranges_ptr, next_turn_ptr, retakes_ptr, counts_ptr, indices_ptr, spoiled_ptr, sinks_ptr)
    strides = (stride_ob, stride_oh, stride_os)
    descriptors = (query_desc, key_desc, value_desc, key_means_desc, value_means_desc, mean_weights_desc)
    shared = (buffers, barriers, announcements, pointers, strides, shape, mean_blocks, scale_log2)
    loaded = (buffers, barriers, announcements, descriptors, pointers, shape, width, mean_blocks)
    gl.warp_specialize(
        [
            (_compute, (0, shared, handed, handed_over, MAY_RETAKE, QUERY_IN_REGISTERS, HAS_RANGES, HAS_SINKS, HAS_MEANS)),
            (_compute, (1, shared, handed, handed_over, MAY_RETAKE, QUERY_IN_REGISTERS, HAS_RANGES, HAS_SINKS, HAS_MEANS)),
            (_load, (loaded, handed, handed_over, MAY_RETAKE, GROUP, HAS_RANGES, HAS_MEANS)),
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
    sinks: torch.Tensor | None = None,
    means: RunMeans | None = None,
) -> None:
    """Write the attention of the index's query blocks into ``output`` [B, Hq, Sq, D]; other rows are left alone.

    ``sinks`` are float32 [Hq]; ``means`` come from ``run_means``, and dropped blocks take part through them.
    """
    geometry = index.geometry
    batch, heads, query_len, head_dim = query.shape
    tiles = hopper_tiles(head_dim)
    programs = min(multiprocessors(query), index.counts.numel())
    # Every program's first turn is its own number.
    next_turn = torch.full((1,), programs, dtype=torch.int32, device=query.device)
    retakes = torch.empty((2, index.counts.numel()), dtype=torch.int32, device=query.device)
    mean_blocks = 1 if means is None else means.key.shape[2]
    of_means = [None] * 3 if means is None else _mean_descriptors(means, weigh_means(index, mean_blocks))
    with launch_context(query):
        _attend_hopper_kernel[(programs,)](
            describe_rows(query, ROWS.value),
            describe_rows(key, tiles.step),
            describe_rows(value, tiles.step),
            *of_means,
            output,
            geometry.valid_ranges,
            next_turn,
            retakes,
            index.counts,
            index.indices,
            None if means is None else means.spoiled,
            sinks,
            scale * LOG2_E.value,
            geometry.kv_len,
            query_len,
            geometry.query_offset,
            index.first_query_block,
            index.query_blocks,
            index.indices.shape[-1],
            mean_blocks,
            batch * heads,
            heads,
            *output.stride()[:3],
            GROUP=heads // key.shape[1],
            STEP=tiles.step,
            STAGES=tiles.stages,
            QUERY_STAGES=tiles.query_stages,
            QUERY_IN_REGISTERS=tiles.query_in_registers,
            HAS_RANGES=geometry.valid_ranges is not None,
            HAS_SINKS=sinks is not None,
            HAS_MEANS=means is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
