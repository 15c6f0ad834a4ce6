"""The finer probe for Hopper GPUs, in Gluon: what ``probe.py`` does, one warpgroup's products under the others' reductions.

One warp loads tiles of pooled keys, a few at a time with the means of their blocks, with the bulk tensor copy engine; four
warpgroups, 64 probing queries each, multiply a tile on the tensor cores and reduce it. The means of 16 blocks are multiplied at
once: a product of fewer columns would wait for its queries. Each warpgroup waits for its own products before it reduces them,
which leaves the registers for a fourth.

Tensor cores take most of the time: at 128K tokens the selection takes 2.61 ms, and 2.09 if the probe multiplies everything but
reduces one tile in 64. In another process it takes 2.63 ms, with tiles loaded one at a time 2.74, and with maxima found two at
a time as well 2.82 (with this loop nested in one over barriers). No gain came there from queries in registers, unrolled loops
over tiles, or all warpgroups in one partition; nor, with tiles loaded one at a time, from three warpgroups that also multiply
the next tile beside each reduction, or from tensor cores that serve one or two warpgroups at a time (H200, 32 query and 8
key-value heads, head_dim 128, bfloat16, benchmarks/results/probe-groups-2026-11-29-h200.txt).
"""

from __future__ import annotations

import torch
from triton import language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_primitives import (
    bounded_sums,
    copy_to_shared,
    integer_queries,
    make_barriers,
    not_before,
    row_span,
    shared_layout,
)
from .pool import TILE
from .primitives import launch_context
from .probe import ProbeCall
from .probe_hopper_steps import BUFFERS, ROWS, largest_of_groups, next_products, reduce_tile, release, sums_of_bytes
from .tuning import ProbeTiles

_TILE = gl.constexpr(TILE)
_WARPGROUPS = gl.constexpr(4)


@gluon.jit
def _probe(
    warpgroup,
    shared,
    HEADS: gl.constexpr,
    QUERY_BLOCKS: gl.constexpr,
    BLOCK: gl.constexpr,
    POOL: gl.constexpr,
    STRIDE: gl.constexpr,
    CENTRE_TILES: gl.constexpr,
):
    """One warpgroup: the part of QUERY_BLOCKS query blocks of HEADS heads, against the program's split of the keys."""
    buffers, barriers, pointers, strides, place, work, scale_log2 = shared
    queries, tiles, centres = buffers
    _, empty = barriers
    query_ptr, positions_ptr, steps_ptr, peaks_ptr, log_sums_ptr = pointers
    stride_h, stride_s = strides
    first_token, first_block, query_blocks, key_end = place
    begin, whole, total, first_part, head_sets, part_size, split, splits = work
    HEAD_DIM: gl.constexpr = tiles.shape[2]
    PER_BLOCK: gl.constexpr = BLOCK // POOL
    TILE_BLOCKS: gl.constexpr = _TILE // PER_BLOCK
    CENTRES: gl.constexpr = centres.shape[1]
    SLOTS: gl.constexpr = BLOCK // STRIDE
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 32])
    centre_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CENTRES, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    part = first_part + warpgroup * head_sets
    log_sums_ptr += (part * splits + split) * ROWS
    # A row without queries or keys: it adds nothing to the normalisers of other splits; alone, it must give no block a share.
    nothing = gl.full([ROWS], 0.0, gl.float32, row_layout) + gl.where(splits == 1, float("inf"), float("-inf"))
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])

    if total > 0:
        query_block = first_block + warpgroup * QUERY_BLOCKS
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, load_layout))
        run = (row // SLOTS % HEADS * query_blocks + query_block + row // (SLOTS * HEADS)) * SLOTS + row % SLOTS
        is_row = (row < QUERY_BLOCKS * HEADS * SLOTS) & (query_block + row // (SLOTS * HEADS) < query_blocks)
        position = gl.load(positions_ptr + run, mask=is_row, other=-1)
        channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, load_layout))
        source = row // SLOTS % HEADS * stride_h + (first_token + position).to(gl.int64) * stride_s
        loaded = gl.load(query_ptr + source[:, None] + channel[None, :], mask=(position >= 0)[:, None], other=0.0)
        numbers, factors = integer_queries(loaded)
        integers = queries.index(warpgroup)
        integers.store(numbers)
        fence_async_shared()
        position = gl.convert_layout(position, row_layout)
        # Where the last pooled key that a query sees begins, counted from the split's first token. That of a row's last query
        # may have fewer tokens than others.
        first_token_of_split = begin * (TILE_BLOCKS * BLOCK)
        last_seen = gl.where(position + 1 == key_end, position, position - (POOL - 1)) - first_token_of_split
        bounds = (last_seen, key_end - first_token_of_split)

        zeros = gl.zeros([ROWS, _TILE], gl.int32, layout)
        centre_zeros = gl.zeros([ROWS, CENTRES], gl.int32, centre_layout)
        block_layout: gl.constexpr = gl.max(largest_of_groups(zeros, PER_BLOCK), 2).type.layout
        state_layout: gl.constexpr = gl.SliceLayout(1, block_layout)
        # A finite start keeps queries that have seen nothing yet free of inf - inf.
        running_max = gl.full([ROWS, 4], -1e30, gl.float32, state_layout)
        running_sum = gl.zeros([ROWS, 4], gl.float32, state_layout)
        factors = gl.convert_layout(factors * scale_log2, gl.SliceLayout(1, gl.SliceLayout(2, block_layout)))
        target_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, block_layout)))
        fours = gl.arange(0, TILE_BLOCKS // 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, block_layout)))
        slot = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, block_layout)))
        targets = peaks_ptr + part.to(gl.int64) * part_size + begin * (ROWS * TILE_BLOCKS)
        targets += target_row[:, None, None] * TILE_BLOCKS + fours[None, :, None] * 4 + slot[None, None, :]
        step_fours = gl.arange(0, TILE_BLOCKS // 4, layout=gl.SliceLayout(1, gl.SliceLayout(0, block_layout)))
        step_slot = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(0, block_layout)))
        steps_ptrs = steps_ptr + begin * TILE_BLOCKS + step_fours[:, None] * 4 + step_slot[None, :]

        centre_state: gl.constexpr = sums_of_bytes(centre_zeros).type.layout
        centre_products = gl.zeros([ROWS, CENTRES // 8, 4], gl.int32, centre_state)
        for number in range(whole):
            centre_products, products, steps = next_products(
                centre_products, integers, number, buffers, barriers, steps_ptrs, zeros, centre_zeros, TILE_BLOCKS, CENTRE_TILES
            )
            running_max, running_sum = reduce_tile(
                products, centre_products, number % CENTRE_TILES, running_max, running_sum, steps, targets, factors, bounds,
                number, True, BLOCK, POOL,
            )  # fmt: skip
            release(empty, number, CENTRE_TILES)
        for number in range(whole, total):
            centre_products, products, steps = next_products(
                centre_products, integers, number, buffers, barriers, steps_ptrs, zeros, centre_zeros, TILE_BLOCKS, CENTRE_TILES
            )
            running_max, running_sum = reduce_tile(
                products, centre_products, number % CENTRE_TILES, running_max, running_sum, steps, targets, factors, bounds,
                number, False, BLOCK, POOL,
            )  # fmt: skip
            release(empty, number, CENTRE_TILES)

        largest = gl.max(running_max, 1)
        normaliser = gl.sum(running_sum * gl.exp2(running_max - largest[:, None]), 1)
        normaliser = gl.convert_layout(normaliser, row_layout)
        largest = gl.convert_layout(largest, row_layout)
        # A query without keys, or a row that is no query, must give no block a share.
        is_voting = (last_seen + first_token_of_split > -POOL) & ((normaliser != 0) | (largest > -1e30))
        log_sum = largest + gl.log2(bounded_sums(normaliser))
        log_sum = gl.where(is_voting, log_sum, nothing)
    else:
        log_sum = nothing
    # Anew: kept through the loop they were spilled.
    gl.store(log_sums_ptr + not_before(gl.arange(0, ROWS, layout=row_layout)), log_sum)


@gluon.jit
def _load(loaded, CENTRE_TILES: gl.constexpr):
    """The loading warp: CENTRE_TILES tiles of pooled keys at a time, with the means of their blocks."""
    descriptors, buffers, barriers, first_row, first_centre, turns = loaded
    tiles_desc, centres_desc = descriptors
    tiles, centres = buffers
    full, empty = barriers
    STAGES: gl.constexpr = centres.shape[0]
    for turn in range(turns):
        stage = turn % STAGES
        mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, centres_desc.block_type.nbytes + CENTRE_TILES * tiles_desc.block_type.nbytes)
        copy_to_shared(centres_desc, [first_centre + turn * centres.shape[1], 0], bar, centres.index(stage))
        for i in gl.static_range(CENTRE_TILES):
            row = first_row + (turn * CENTRE_TILES + i) * _TILE
            copy_to_shared(tiles_desc, [row, 0], bar, tiles.index(stage * CENTRE_TILES + i))


@gluon.jit(
    do_not_specialize=[
        "kv_len",
        "query_len",
        "query_offset",
        "first_query_block",
        "query_blocks",
        "first_part",
        "splits",
        "parts",
        "pooled_rows",
        "score_tiles",
    ]
)
def _probe_hopper_kernel(
    query_ptr,
    positions_ptr,
    tiles_desc,
    centres_desc,
    steps_ptr,
    ranges_ptr,
    peaks_ptr,
    log_sums_ptr,
    scale_log2,
    kv_len,
    query_len,
    query_offset,
    first_query_block,
    query_blocks,
    first_part,
    splits,
    parts,
    pooled_rows,
    score_tiles,
    # Triton knows annotations by their text, and "gl.int64" it takes for none.
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qs: tl.int64,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    QUERY_BLOCKS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    POOL: gl.constexpr,
    STRIDE: gl.constexpr,
    CENTRE_TILES: gl.constexpr,
    HAS_RANGES: gl.constexpr,
):
    """One program: WARPGROUPS neighbouring parts against one of ``splits`` parts of their keys."""
    TILE_BLOCKS: gl.constexpr = _TILE * POOL // BLOCK
    STAGES: gl.constexpr = BUFFERS // CENTRE_TILES
    SLOTS: gl.constexpr = BLOCK // STRIDE
    head_set, batch = gl.program_id(0), gl.program_id(2)
    head_sets = gl.num_programs(0)
    # The longest first, or the last to start would run alone.
    number = gl.num_programs(1) - 1 - gl.program_id(1)
    split = number % splits
    number = number // splits
    start, query_begin, query_end, key_end = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    # Counted from first_query_block.
    first_block = (first_part + number * _WARPGROUPS) * QUERY_BLOCKS
    first_own = query_begin // BLOCK + first_query_block + first_block
    last_own = first_own + gl.minimum(_WARPGROUPS * QUERY_BLOCKS, query_blocks - first_block) - 1
    last_own = gl.minimum(last_own, gl.cdiv(query_end, BLOCK) - 1)
    is_empty = (last_own < first_own) | (query_end <= query_begin)
    # Tiles before the first query block are seen whole by every query.
    tiles_in_all = gl.where(is_empty, 0, last_own // TILE_BLOCKS + 1)
    groups = gl.cdiv(tiles_in_all, CENTRE_TILES)
    begin = groups * split // splits * CENTRE_TILES
    total = gl.minimum(groups * (split + 1) // splits * CENTRE_TILES, tiles_in_all) - begin
    whole = gl.minimum(gl.maximum(first_own // TILE_BLOCKS - begin, 0), total)

    # Queries are swizzled like tiles of pooled keys.
    queries = gl.allocate_shared_memory(gl.int8, [_WARPGROUPS, ROWS, HEAD_DIM], tiles_desc.layout)
    pooled_tiles = gl.allocate_shared_memory(gl.int8, [BUFFERS, _TILE, HEAD_DIM], tiles_desc.layout)
    centres = gl.allocate_shared_memory(gl.int8, [STAGES, 2 * CENTRE_TILES * TILE_BLOCKS, HEAD_DIM], centres_desc.layout)
    barriers = (make_barriers(STAGES, 1), make_barriers(STAGES, _WARPGROUPS))
    fence_async_shared()

    heads = head_sets * HEADS
    key_row = batch * (heads // GROUP) + head_set * HEADS // GROUP
    list_row = (batch * heads + head_set * HEADS).to(gl.int64) * query_blocks
    pointers = (
        query_ptr + batch * stride_qb + head_set * HEADS * stride_qh,
        positions_ptr + list_row * SLOTS,
        steps_ptr + key_row.to(gl.int64) * (pooled_rows * POOL // BLOCK),
        peaks_ptr,
        log_sums_ptr,
    )
    place = (start - query_offset, first_block, query_blocks, key_end)
    program_part = (batch * parts + number * _WARPGROUPS) * head_sets + head_set
    work = (begin, whole, total, program_part, head_sets, score_tiles * (ROWS * TILE_BLOCKS), split, splits)
    shared = ((queries, pooled_tiles, centres), barriers, pointers, (stride_qh, stride_qs), place, work, scale_log2)
    first_centre = (key_row * (pooled_rows // _TILE) + begin) * (2 * TILE_BLOCKS)
    first_row = key_row * pooled_rows + begin * _TILE
    turns = gl.cdiv(total, CENTRE_TILES)
    loaded = ((tiles_desc, centres_desc), (pooled_tiles, centres), barriers, first_row, first_centre, turns)
    gl.warp_specialize(
        [
            (_probe, (0, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE, CENTRE_TILES)),
            (_probe, (1, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE, CENTRE_TILES)),
            (_probe, (2, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE, CENTRE_TILES)),
            (_probe, (3, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE, CENTRE_TILES)),
            (_load, (loaded, CENTRE_TILES)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )


def fits(query: torch.Tensor, block_size: int, query_stride: int) -> bool:
    """Whether this kernel can probe for such queries: 16-bit, head_dim 64 or 128, at most 64 probing queries in a block."""
    is_16_bit = query.dtype != torch.float32
    return is_16_bit and query.shape[-1] in (64, 128) and query_stride > 1 and block_size // query_stride <= ROWS.value


def tiles_for(query: torch.Tensor) -> ProbeTiles:
    """A part for each warpgroup."""
    return ProbeTiles(ROWS.value, parts=_WARPGROUPS.value, resident=1, num_warps=4)


def probe_parts(call: ProbeCall, first_part: int, count: int, splits: int) -> None:
    """``probe.probe_parts`` for what ``fits``; the parts that ``peaks`` has room for are a multiple of those of a program."""
    tiles, centres, steps = call.pooled
    constants = call.constants()
    centre_rows = 2 * constants["CENTRE_TILES"] * TILE * call.pool_size // call.geometry.block_size
    with launch_context(call.query):
        _probe_hopper_kernel[call.grid(count, splits)](
            call.query,
            call.positions,
            _describe(tiles, TILE),
            _describe(centres, centre_rows),
            steps,
            *call.arguments(first_part, splits),
            **constants,
        )


def _describe(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """For copies of ``rows`` rows of a tensor [B, Hkv, R, D]."""
    block = (rows, tensor.shape[3])
    return TensorDescriptor.from_tensor(tensor.view(-1, block[1]), list(block), shared_layout(block, tensor.dtype))
