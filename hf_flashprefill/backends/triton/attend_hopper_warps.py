"""What the warps of the Hopper attend kernel do: the computing warpgroups and the loading warp, turn after turn, in two passes.

Both work through the same turns, each with its steps in the same order: what one loads into a buffer, the others find there.
The second pass takes those turns again whose sums or results overflowed, or whose sums were lost, with a running maximum and
logits that are rounded before it is taken away.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .attend_hopper_steps import (
    clear_values,
    compute_step,
    first_step,
    last_product,
    load_means,
    load_step,
    pack_pairs,
)
from .attend_hopper_turns import (
    BLOCK,
    announce,
    await_noted,
    await_turn,
    direction_of,
    draw_retake,
    draw_turn,
    first_turn,
    next_number,
    note_retake,
    place_of,
    steps_of,
    target_of,
)
from .hopper_primitives import copy_to_shared, finish_loads, not_before, rounded_product
from .means import WIDTH
from .primitives import LARGEST_TOTAL, SMALLEST_TOTAL

# Queries of a warpgroup.
ROWS = gl.constexpr(64)
LOG2_E = gl.constexpr(math.log2(math.e))


@gluon.jit
def _mean_steps(own, mean_blocks, STEP: gl.constexpr, HAS_MEANS: gl.constexpr):
    """Steps of means of the query block with the key block ``own``: none for the first query block."""
    steps = own * 0
    if HAS_MEANS:
        steps = gl.cdiv(gl.cdiv(own, mean_blocks), STEP)
    return steps


@gluon.constexpr_function
def _store_layout(head_dim):
    """Results [ROWS, head_dim] as a warpgroup stores them: of each 32 channels eight to a thread, by the warp and for the two
    rows that the product left them with, so that warps do not wait for each other and a thread has two rows' addresses."""
    wide = [[0, channel] for channel in (32, 64, 128) if channel < head_dim]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *wide, [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, head_dim],
    )


@gluon.jit
def _take_turns(
    warpgroup,
    shared,
    noted,
    turn,
    done,
    PASS: gl.constexpr,
    QUERY_IN_REGISTERS: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """Turns from the program's ``turn``-th on until there are no more, ``done`` counts steps. Returns both. PASS 0 notes in
    ``noted`` the turns that PASS 1 takes again."""
    buffers, barriers, announcements, pointers, strides, scale_log2 = shared
    query_tiles, key_tiles, _, _ = buffers
    query_full, query_empty, _, _, _, _, turn_full = barriers
    output_ptr, retakes_ptr, sinks_ptr = pointers
    stride_b, stride_h, stride_s = strides
    QUERY_STAGES: gl.constexpr = query_tiles.shape[0] // 2
    STEP: gl.constexpr = key_tiles.shape[3]
    HEAD_DIM: gl.constexpr = key_tiles.shape[4]
    PARTS: gl.constexpr = BLOCK // STEP
    dtype: gl.constexpr = query_tiles.dtype
    # Weights above 65504 are infinite in float16; a prompt's first tokens may have logits 11 (natural units) above others.
    ONLINE: gl.constexpr = PASS == 1 or dtype == gl.float16
    ROUNDED: gl.constexpr = PASS == 1
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    result_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    result_row_layout: gl.constexpr = gl.SliceLayout(1, result_layout)
    store_layout: gl.constexpr = _store_layout(HEAD_DIM)

    zeros = gl.zeros([ROWS, STEP], gl.float32, logits_layout)
    own_row = warpgroup * ROWS
    turn, done = gl.to_tensor(turn), gl.to_tensor(done)
    # Before pass 1 one announcement was of no turn.
    while await_turn(announcements, turn_full, turn + PASS) >= 0:
        listed, mean_steps, keys_left = steps_of(announcements, turn + PASS)
        listed_from = PARTS + mean_steps
        steps = listed_from + (listed - 1) * PARTS
        buffer = turn % QUERY_STAGES * 2 + warpgroup
        mbarrier.wait(query_full.index(buffer), (turn // QUERY_STAGES) & 1)
        query = query_tiles.index(buffer).reshape([ROWS, HEAD_DIM])
        if QUERY_IN_REGISTERS:
            query = query.load(gl.DotOperandLayout(0, logits_layout, 2))
            finish_loads()
            mbarrier.arrive(query_empty.index(buffer), count=1)
        weights, running_max, running_sum = first_step(
            query, zeros, buffers, barriers, done, own_row, scale_log2, result_layout, ROUNDED
        )
        if HAS_RANGES:
            # The block may end in padding, and weight 0 times a NaN there would still be NaN.
            for part in gl.static_range(PARTS):
                clear_values(buffers, barriers, done + part, keys_left - part * STEP)
        result = gl.zeros([ROWS, HEAD_DIM], gl.float32, result_layout)
        # The own block's other part, where a block takes two steps; only the own block needs the causal mask.
        for step in gl.static_range(1, PARTS):
            weights, result, running_max, running_sum = compute_step(
                query, weights, result, running_max, running_sum, zeros, buffers, barriers, done + step, step + 1 == steps,
                step * STEP, own_row, False, scale_log2, "own", ONLINE, ROUNDED,
            )  # fmt: skip
        if HAS_MEANS and not ONLINE:
            for step in range(PARTS, listed_from):
                weights, result, running_max, running_sum = compute_step(
                    query, weights, result, running_max, running_sum, zeros, buffers, barriers, done + step,
                    step + 1 == steps, 0, 0, True, scale_log2, "means", ONLINE, ROUNDED,
                )  # fmt: skip
            weights = pack_pairs(weights)
            for step in range(listed_from, steps):
                weights, result, running_max, running_sum = compute_step(
                    query, weights, result, running_max, running_sum, zeros, buffers, barriers, done + step,
                    step + 1 == steps, 0, 0, False, scale_log2, "listed", ONLINE, ROUNDED,
                )  # fmt: skip
        else:
            # One loop for both: with two of them and a running maximum, results of 256 channels find no registers.
            for step in range(PARTS, steps):
                weights, result, running_max, running_sum = compute_step(
                    query, weights, result, running_max, running_sum, zeros, buffers, barriers, done + step,
                    step + 1 == steps, 0, 0, step < listed_from, scale_log2, "either" if HAS_MEANS else "listed", ONLINE,
                    ROUNDED,
                )  # fmt: skip
        if not QUERY_IN_REGISTERS:
            mbarrier.arrive(query_empty.index(buffer), count=1)
        result = last_product(weights, result, buffers, barriers, done + steps - 1)
        done += steps
        # Asked anew, so that the steps have the registers.
        number, batch, head, first_row, first_query, end_query = target_of(announcements, turn + PASS)
        total = gl.convert_layout(gl.sum(running_sum, 1), result_row_layout)
        if HAS_SINKS:
            sink = rounded_product(gl.load(sinks_ptr + head), LOG2_E)
            running_max = gl.convert_layout(running_max, result_row_layout)
            largest = gl.maximum(running_max, sink)
            # An infinite sink must show, as NaN; one so far above all logits that this overflows leaves nothing of the result.
            total += gl.exp2(sink - largest) / gl.exp2(running_max - largest)
        if PASS == 0:
            row = own_row + gl.arange(0, ROWS, layout=result_row_layout)
            is_query = (row >= first_query) & (row < end_query)
            # What is not finite anywhere makes a sum of zeros NaN.
            is_finite = (gl.sum(result * 0.0, 1) == 0) & (total > SMALLEST_TOTAL) & (total < LARGEST_TOTAL)
            # Each warp asks for all rows. A minimum over warps would load a register in some threads only, which ptxas then
            # takes to be in use in the steps.
            is_kept = gl.convert_layout((is_finite | (is_query == 0)).to(gl.int32), gl.BlockedLayout([2], [32], [4], [0]))
            is_kept = gl.min(is_kept, 0)
            note_retake(retakes_ptr, noted, warpgroup, number, is_kept)
        result = result * (1 / total)[:, None]
        row = not_before(gl.arange(0, ROWS, layout=gl.SliceLayout(1, store_layout)))
        column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, store_layout))
        is_query = (own_row + row >= first_query) & (own_row + row < end_query)
        target = output_ptr + batch * stride_b + head * stride_h + (first_row + own_row).to(gl.int64) * stride_s
        target += row[:, None].to(gl.int64) * stride_s + column[None, :]
        gl.store(target, gl.convert_layout(result.to(dtype), store_layout), mask=is_query[:, None])
        turn += 1
    return turn, done


@gluon.jit
def compute(
    warpgroup,
    shared,
    noted,
    pass_done,
    QUERY_IN_REGISTERS: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """One of the two computing warpgroups: its 64 queries of the query block, turn after turn."""
    turn, done = _take_turns(warpgroup, shared, noted, 0, 0, 0, QUERY_IN_REGISTERS, HAS_RANGES, HAS_SINKS, HAS_MEANS)
    mbarrier.arrive(pass_done.index(0), count=1)
    _take_turns(warpgroup, shared, noted, turn, done, 1, QUERY_IN_REGISTERS, HAS_RANGES, HAS_SINKS, HAS_MEANS)


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
    """What ``_take_turns`` computes with: of each turn the queries, then keys and values in the order they are computed with,
    which is the own block, the means, the other listed blocks."""
    buffers, barriers, announcements, descriptors, pointers, shape, width, mean_blocks = loaded
    query_tiles, key_tiles, _, _ = buffers
    query_full, query_empty, _, _, _, _, turn_full = barriers
    query_desc, key_desc, value_desc, _, _, _ = descriptors
    ranges_ptr, next_turn_ptr, retakes_ptr, counts_ptr, indices_ptr = pointers
    heads, _, tiles, _, _, _, _ = shape
    STAGES: gl.constexpr = key_tiles.shape[0]
    QUERY_STAGES: gl.constexpr = query_tiles.shape[0] // 2
    STEP: gl.constexpr = key_tiles.shape[3]
    PARTS: gl.constexpr = BLOCK // STEP
    turn, done = gl.to_tensor(turn), gl.to_tensor(done)
    if PASS == 1:
        number, listed, noted = draw_retake(noted, shape, ranges_ptr, retakes_ptr, counts_ptr, HAS_RANGES)
    else:
        number, listed = first_turn(shape, ranges_ptr, next_turn_ptr, counts_ptr, HAS_RANGES)
    while number >= 0:
        turn_place = place_of(number, shape, ranges_ptr, HAS_RANGES)
        place, own_block, span = turn_place
        mean_steps = _mean_steps(own_block[0], mean_blocks, STEP, HAS_MEANS)
        announce(announcements, turn_full, turn + PASS, number, listed, mean_steps, turn_place)
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
        if HAS_MEANS:
            mean_set = gl.where(own > 0, (own + mean_blocks - 1) % mean_blocks, 0)
            mean_head = [batch, mean_set + key_head * mean_blocks]
            # The last step ends with the last mean that the query block reads, and with its weight.
            means = gl.cdiv(own, mean_blocks)
            last_weight = gl.cdiv(means, WIDTH) * WIDTH
            for step in range(mean_steps):
                back = (mean_steps - step) * STEP
                load_means(descriptors, mean_head, means - back, list_row, last_weight - back, buffers, barriers, done + step)
            done += mean_steps
        steps = (listed - 1) * PARTS
        first_entry, direction = direction_of(own, listed)
        list_ptr += first_entry
        first_steps = gl.minimum(steps, gl.maximum(STAGES - PARTS - mean_steps, 0))
        for step in range(first_steps):
            block = gl.load(list_ptr + direction * (step // PARTS))
            coordinates = [batch, key_head, start + block * BLOCK + step % PARTS * STEP, 0]
            load_step(key_desc, value_desc, coordinates, buffers, barriers, done + step)
        # Now that the buffers are full there is time to ask what comes next.
        if PASS == 1:
            number, listed, noted = draw_retake(noted, shape, ranges_ptr, retakes_ptr, counts_ptr, HAS_RANGES)
        else:
            number, listed = draw_turn(next_number(next_turn_ptr), shape, ranges_ptr, next_turn_ptr, counts_ptr, HAS_RANGES)
        # An entry ahead of the waits for buffers: .98 to 1.00 of the time at 8K to 256K tokens (H200, head_dim 128, published
        # densities, one process), 1.01 where a row of 128K or 256K tokens is padded.
        next_block = gl.load(list_ptr + direction * (first_steps // PARTS), mask=first_steps < steps, other=0)
        for step in range(first_steps, steps):
            block = next_block
            next_block = gl.load(list_ptr + direction * ((step + 1) // PARTS), mask=step + 1 < steps, other=0)
            coordinates = [batch, key_head, start + block * BLOCK + step % PARTS * STEP, 0]
            load_step(key_desc, value_desc, coordinates, buffers, barriers, done + step)
        done += steps
        turn += 1
    announce(announcements, turn_full, turn + PASS, number, listed, 0, place_of(number, shape, ranges_ptr, HAS_RANGES))
    return turn, done


@gluon.jit
def load(
    loaded,
    noted,
    pass_done,
    GROUP: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """The loading warp."""
    turn, done = _load_turns(loaded, (-1, -1), 0, 0, 0, GROUP, HAS_RANGES, HAS_MEANS)
    last_noted = await_noted(noted, pass_done)
    _load_turns(loaded, last_noted, turn, done, 1, GROUP, HAS_RANGES, HAS_MEANS)
