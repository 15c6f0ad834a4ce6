"""What the warps of the Hopper attend kernel do: the computing warpgroups and the loading warp, turn after turn, in two passes.

Both work through the same turns, each with its steps in the same order: what one loads into a buffer, the others find there.
The second pass takes those turns again whose sums or results overflowed, with a running maximum.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .attend_hopper_steps import MEANS, compute_step, first_step, last_product, load_means, load_step, partial_sums
from .attend_hopper_turns import (
    BLOCK,
    announce,
    announce_noted,
    await_noted,
    await_turn,
    direction_of,
    draw_retake,
    draw_turn,
    next_number,
    note_retake,
    number_of,
    place_of,
)
from .hopper_primitives import copy_to_shared
from .primitives import LARGEST_TOTAL

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
        own, key_end = block[0], span[3]
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
def compute(
    warpgroup,
    shared,
    last_noted,
    last_noted_full,
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
        announce_noted(last_noted, last_noted_full, warpgroup, noted)
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
def load(
    loaded,
    last_noted,
    last_noted_full,
    MAY_RETAKE: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """The loading warp."""
    turn, done = _load_turns(loaded, (-1, -1), 0, 0, 0, GROUP, HAS_RANGES, HAS_MEANS)
    if MAY_RETAKE:
        noted = await_noted(last_noted, last_noted_full)
        _load_turns(loaded, noted, turn, done, 1, GROUP, HAS_RANGES, HAS_MEANS)
