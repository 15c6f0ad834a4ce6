"""The finer probe for Hopper GPUs, in Gluon: what ``probe.py`` does, one warpgroup's products under the others' reductions.

One warp loads tiles of pooled keys, and the means of their blocks, with the bulk tensor copy engine; four warpgroups, 64
probing queries each, multiply a tile on the tensor cores and reduce it. The means of 16 blocks are multiplied at once: a
product of fewer columns would wait for its queries. Each warpgroup waits for its own products before it reduces them, which
leaves the registers for a fourth: with three that also multiplied the next tile beside each reduction, and products of 16
bits, the selection took 0.39 ms instead of 0.36 at 32K tokens and 4.9 instead of 4.6 at 128K, but 0.065 instead of 0.068 at 8K
(H200, 32 query and 8 key-value heads, head_dim 128, bfloat16). With 8-bit integers it takes 0.26 and 3.2.
"""

from __future__ import annotations

import torch
from triton import language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...config import NORMALISER_GROUP
from .hopper_primitives import copy_to_shared, integer_queries, make_barriers, row_span, shared_layout
from .pool import TILE
from .primitives import launch_context
from .probe import UNSEEN, ProbeCall
from .tuning import ProbeTiles

# Probing queries of a warpgroup.
_ROWS = gl.constexpr(64)
_TILE = gl.constexpr(TILE)
_WARPGROUPS = gl.constexpr(4)
_UNSEEN = gl.constexpr(UNSEEN)
_NORMALISER_GROUP = gl.constexpr(NORMALISER_GROUP)


@gluon.jit
def _groups(products, PER_BLOCK: gl.constexpr):
    """The largest product of every few neighbours: [rows, columns] -> [rows, blocks / 4, groups of a block, 4], see
    ``pool.tile_column``."""
    GROUP: gl.constexpr = min(_NORMALISER_GROUP, PER_BLOCK)
    by_group = products.reshape([_ROWS, _TILE // PER_BLOCK // 4, PER_BLOCK // GROUP, GROUP // 2, 4, 2])
    return gl.max(gl.max(by_group, 5), 3)


@gluon.jit
def _centre_products(integers, centres, zeros, barriers, turn, layout: gl.constexpr):
    """``probe._centre_products``; ``turn`` counts from 0."""
    full, empty = barriers
    STAGES: gl.constexpr = centres.shape[0]
    stage = turn % STAGES
    mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
    in_work = warpgroup_mma(integers, centres.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(0, deps=[in_work])
    mbarrier.arrive(empty.index(stage), count=1)
    high, low = gl.split(products.reshape([_ROWS, centres.shape[1] // 8, 4, 2]))
    return gl.convert_layout(high * 256 + low, layout)


@gluon.jit
def _of_tile(centre_products, number, FOURS: gl.constexpr, layout: gl.constexpr):
    """The products with the means of the blocks of a tile, ``number`` of those that stand together."""
    TILES: gl.constexpr = centre_products.shape[1] // FOURS
    if TILES == 1:
        return gl.convert_layout(centre_products, layout)
    by_tile = centre_products.reshape([_ROWS, TILES, FOURS, 4])
    tiles: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, by_tile.type.layout)))
    is_tile = (gl.arange(0, TILES, layout=tiles) == number)[None, :, None, None]
    return gl.convert_layout(gl.sum(gl.where(is_tile, by_tile, 0), 1), layout)


@gluon.jit
def _step(
    integers,
    running_max,
    running_sum,
    centre_products,
    zeros,
    tiles,
    barriers,
    number,
    steps_ptrs,
    targets,
    factors,
    position,
    begin,
    key_end,
    IS_WHOLE: gl.constexpr,
    BLOCK: gl.constexpr,
    POOL: gl.constexpr,
    CENTRE_TILES: gl.constexpr,
):
    """Multiply with the ``number``-th tile, counted from tile ``begin``, and reduce the products as ``probe._reduce`` does."""
    full, empty = barriers
    STAGES: gl.constexpr = tiles.shape[0]
    PER_BLOCK: gl.constexpr = BLOCK // POOL
    TILE_BLOCKS: gl.constexpr = _TILE // PER_BLOCK
    layout: gl.constexpr = zeros.type.layout
    block_layout: gl.constexpr = running_max.type.layout.parent
    stage = number % STAGES
    mbarrier.wait(full.index(stage), (number // STAGES) & 1)
    in_work = warpgroup_mma(integers, tiles.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
    steps = gl.load(steps_ptrs + number * TILE_BLOCKS)
    products = warpgroup_mma_wait(0, deps=[in_work])
    mbarrier.arrive(empty.index(stage), count=1)
    if not IS_WHOLE:
        column = gl.arange(0, _TILE, layout=gl.SliceLayout(0, layout))
        tile_slot = column // (4 * PER_BLOCK) * 4 + column // 2 % 4
        within = column // 8 % (PER_BLOCK // 2) * 2 + column % 2
        first_token = ((begin + number) * TILE_BLOCKS + tile_slot) * BLOCK + within * POOL
        last_token = gl.minimum(first_token + POOL, key_end) - 1
        is_seen = (first_token < key_end)[None, :] & (last_token[None, :] <= position[:, None])
        products = gl.where(is_seen, products, _UNSEEN)
    groups = _groups(products, PER_BLOCK)
    largest = gl.max(groups, 2)
    of_tile = _of_tile(centre_products, number % CENTRE_TILES, TILE_BLOCKS // 4, block_layout)
    factors = factors[:, None, None] * steps[None, :, :]
    peaks = (largest + of_tile).to(gl.float32) * factors
    if not IS_WHOLE:
        peaks = gl.where(largest == _UNSEEN, float("-inf"), peaks)
    new_max = gl.maximum(running_max, gl.max(peaks, 1))
    centres = of_tile.to(gl.float32) * factors - new_max[:, None, :]
    exponents = groups.to(gl.float32) * factors[:, :, None, :] + centres[:, :, None, :]
    if not IS_WHOLE:
        exponents = gl.where(groups == _UNSEEN, float("-inf"), exponents)
        fours = gl.arange(0, TILE_BLOCKS // 4, layout=gl.SliceLayout(1, gl.SliceLayout(0, block_layout)))
        slot = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(0, block_layout)))
        end = ((begin + number) * TILE_BLOCKS + fours[:, None] * 4 + slot[None, :] + 1) * BLOCK
        position = gl.convert_layout(position, gl.SliceLayout(1, gl.SliceLayout(2, block_layout)))
        is_full = (end <= key_end)[None, :, :] & (end[None, :, :] - 1 <= position[:, None, None])
        centres = gl.where(is_full, centres, float("-inf"))
    terms = gl.sum(gl.exp2(exponents), 2) + (PER_BLOCK - groups.shape[2]) * gl.exp2(centres)
    running_sum = running_sum * gl.exp2(running_max - new_max) + gl.sum(terms, 1)
    gl.store(targets + number * (_ROWS * TILE_BLOCKS), peaks)
    return new_max, running_sum


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
    tile_barriers, centre_barriers = barriers
    query_ptr, positions_ptr, steps_ptr, peaks_ptr, log_sums_ptr = pointers
    stride_h, stride_s = strides
    first_token, first_tile, query_tiles, key_end = place
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
    log_sums_ptr += (part * splits + split) * _ROWS + gl.arange(0, _ROWS, layout=row_layout)
    # A row without queries or keys: it adds nothing to the normalisers of other splits; alone, it must give no block a share.
    nothing = gl.full([_ROWS], 0.0, gl.float32, row_layout) + gl.where(splits == 1, float("inf"), float("-inf"))
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])

    if total > 0:
        tile = first_tile + warpgroup * QUERY_BLOCKS
        row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, load_layout))
        run = (row // SLOTS % HEADS * query_tiles + tile + row // (SLOTS * HEADS)) * SLOTS + row % SLOTS
        is_row = (row < QUERY_BLOCKS * HEADS * SLOTS) & (tile + row // (SLOTS * HEADS) < query_tiles)
        position = gl.load(positions_ptr + run, mask=is_row, other=-1)
        channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, load_layout))
        source = row // SLOTS % HEADS * stride_h + (first_token + position).to(gl.int64) * stride_s
        loaded = gl.load(query_ptr + source[:, None] + channel[None, :], mask=(position >= 0)[:, None], other=0.0)
        numbers, factors = integer_queries(loaded)
        integers = queries.index(warpgroup)
        integers.store(numbers)
        fence_async_shared()
        position = gl.convert_layout(position, row_layout)

        zeros = gl.zeros([_ROWS, _TILE], gl.int32, layout)
        centre_zeros = gl.zeros([_ROWS, CENTRES], gl.int32, centre_layout)
        block_layout: gl.constexpr = gl.max(_groups(zeros, PER_BLOCK), 2).type.layout
        state_layout: gl.constexpr = gl.SliceLayout(1, block_layout)
        # A finite start keeps queries that have seen nothing yet free of inf - inf.
        running_max = gl.full([_ROWS, 4], -1e30, gl.float32, state_layout)
        running_sum = gl.zeros([_ROWS, 4], gl.float32, state_layout)
        factors = gl.convert_layout(factors * scale_log2, gl.SliceLayout(1, gl.SliceLayout(2, block_layout)))
        target_row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, block_layout)))
        fours = gl.arange(0, TILE_BLOCKS // 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, block_layout)))
        slot = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, block_layout)))
        targets = peaks_ptr + part * part_size + begin * (_ROWS * TILE_BLOCKS)
        targets += target_row[:, None, None] * TILE_BLOCKS + fours[None, :, None] * 4 + slot[None, None, :]
        step_fours = gl.arange(0, TILE_BLOCKS // 4, layout=gl.SliceLayout(1, gl.SliceLayout(0, block_layout)))
        step_slot = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(0, block_layout)))
        steps_ptrs = steps_ptr + begin * TILE_BLOCKS + step_fours[:, None] * 4 + step_slot[None, :]
        centre_state: gl.constexpr = gl.split(centre_zeros.reshape([_ROWS, CENTRES // 8, 4, 2]))[0].type.layout
        centre_products = gl.zeros([_ROWS, CENTRES // 8, 4], gl.int32, centre_state)

        for number in range(whole):
            if number % CENTRE_TILES == 0:
                turn = number // CENTRE_TILES
                centre_products = _centre_products(integers, centres, centre_zeros, centre_barriers, turn, centre_state)
            running_max, running_sum = _step(
                integers, running_max, running_sum, centre_products, zeros, tiles, tile_barriers, number, steps_ptrs, targets,
                factors, position, begin, key_end, True, BLOCK, POOL, CENTRE_TILES,
            )  # fmt: skip
        for number in range(whole, total):
            if number % CENTRE_TILES == 0:
                turn = number // CENTRE_TILES
                centre_products = _centre_products(integers, centres, centre_zeros, centre_barriers, turn, centre_state)
            running_max, running_sum = _step(
                integers, running_max, running_sum, centre_products, zeros, tiles, tile_barriers, number, steps_ptrs, targets,
                factors, position, begin, key_end, False, BLOCK, POOL, CENTRE_TILES,
            )  # fmt: skip

        largest = gl.max(running_max, 1)
        normaliser = gl.sum(running_sum * gl.exp2(running_max - largest[:, None]), 1)
        normaliser = gl.convert_layout(normaliser, row_layout)
        largest = gl.convert_layout(largest, row_layout)
        # A query without keys, or a row that is no query, must give no block a share.
        is_voting = (position >= 0) & (normaliser != 0)
        log_sum = largest + gl.log2(gl.where(is_voting, normaliser, 1.0))
        gl.store(log_sums_ptr, gl.where(is_voting, log_sum, nothing))
    else:
        gl.store(log_sums_ptr, nothing)


@gluon.jit
def _load_next(loads, turn):
    """Into the next buffer, once it is free, the rows that fill it; ``turn`` counts from 0."""
    described, first_row, buffers, barriers = loads
    full, empty = barriers
    STAGES: gl.constexpr = buffers.shape[0]
    stage = turn % STAGES
    mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), described.block_type.nbytes)
    copy_to_shared(described, [first_row + turn * buffers.shape[1], 0], full.index(stage), buffers.index(stage))


@gluon.jit
def _load(tile_loads, centre_loads, total, CENTRE_TILES: gl.constexpr):
    """The loading warp: the tiles of pooled keys in turn, and the means of their blocks before the first of CENTRE_TILES."""
    for number in range(total):
        if number % CENTRE_TILES == 0:
            _load_next(centre_loads, number // CENTRE_TILES)
        _load_next(tile_loads, number)


@gluon.jit(
    do_not_specialize=[
        "kv_len",
        "query_len",
        "query_offset",
        "first_query_block",
        "tiles",
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
    tiles,
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
    STAGES: gl.constexpr,
    HAS_RANGES: gl.constexpr,
):
    """One program: WARPGROUPS neighbouring parts against one of ``splits`` parts of their keys."""
    TILE_BLOCKS: gl.constexpr = _TILE * POOL // BLOCK
    SLOTS: gl.constexpr = BLOCK // STRIDE
    head_set, batch = gl.program_id(0), gl.program_id(2)
    head_sets = gl.num_programs(0)
    # The longest first, or the last to start would run alone.
    number = gl.num_programs(1) - 1 - gl.program_id(1)
    split = number % splits
    number = number // splits
    start, query_begin, query_end, key_end = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    first_tile = (first_part + number * _WARPGROUPS) * QUERY_BLOCKS
    first_own = query_begin // BLOCK + first_query_block + first_tile
    last_own = first_own + gl.minimum(_WARPGROUPS * QUERY_BLOCKS, tiles - first_tile) - 1
    last_own = gl.minimum(last_own, gl.cdiv(query_end, BLOCK) - 1)
    is_empty = (last_own < first_own) | (query_end <= query_begin)
    # Tiles before the first query block are seen whole by every query.
    tiles_in_all = gl.where(is_empty, 0, last_own // TILE_BLOCKS + 1)
    groups = gl.cdiv(tiles_in_all, CENTRE_TILES)
    begin = groups * split // splits * CENTRE_TILES
    total = gl.minimum(groups * (split + 1) // splits * CENTRE_TILES, tiles_in_all) - begin
    whole = gl.minimum(gl.maximum(first_own // TILE_BLOCKS - begin, 0), total)

    # Tiles of queries are swizzled like those of pooled keys.
    queries = gl.allocate_shared_memory(gl.int8, [_WARPGROUPS, _ROWS, HEAD_DIM], tiles_desc.layout)
    pooled_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, _TILE, HEAD_DIM], tiles_desc.layout)
    centres = gl.allocate_shared_memory(gl.int8, [2, 2 * CENTRE_TILES * TILE_BLOCKS, HEAD_DIM], centres_desc.layout)
    tile_barriers = (make_barriers(STAGES, 1), make_barriers(STAGES, _WARPGROUPS))
    centre_barriers = (make_barriers(2, 1), make_barriers(2, _WARPGROUPS))
    fence_async_shared()

    heads = head_sets * HEADS
    key_row = batch * (heads // GROUP) + head_set * HEADS // GROUP
    list_row = (batch * heads + head_set * HEADS).to(gl.int64) * tiles
    pointers = (
        query_ptr + batch * stride_qb + head_set * HEADS * stride_qh,
        positions_ptr + list_row * SLOTS,
        steps_ptr + key_row.to(gl.int64) * (pooled_rows * POOL // BLOCK),
        peaks_ptr,
        log_sums_ptr,
    )
    place = (start - query_offset, first_tile, tiles, key_end)
    program_part = (batch * parts + number * _WARPGROUPS) * head_sets + head_set
    work = (begin, whole, total, program_part, head_sets, score_tiles * (_ROWS * TILE_BLOCKS), split, splits)
    buffers, barriers = (queries, pooled_tiles, centres), (tile_barriers, centre_barriers)
    shared = (buffers, barriers, pointers, (stride_qh, stride_qs), place, work, scale_log2)
    first_centre = (key_row * (pooled_rows // _TILE) + begin) * (2 * TILE_BLOCKS)
    tile_loads = (tiles_desc, key_row * pooled_rows + begin * _TILE, pooled_tiles, tile_barriers)
    centre_loads = (centres_desc, first_centre, centres, centre_barriers)
    gl.warp_specialize(
        [
            (_probe, (0, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE, CENTRE_TILES)),
            (_probe, (1, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE, CENTRE_TILES)),
            (_probe, (2, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE, CENTRE_TILES)),
            (_probe, (3, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE, CENTRE_TILES)),
            (_load, (tile_loads, centre_loads, total, CENTRE_TILES)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )


def fits(query: torch.Tensor, block_size: int, query_stride: int) -> bool:
    """Whether this kernel can probe for such queries: 16-bit, head_dim 64 or 128, at most 64 probing queries in a block."""
    is_16_bit = query.dtype != torch.float32
    return is_16_bit and query.shape[-1] in (64, 128) and query_stride > 1 and block_size // query_stride <= _ROWS.value


def tiles_for(query: torch.Tensor) -> ProbeTiles:
    """A part for each warpgroup."""
    return ProbeTiles(_ROWS.value, parts=_WARPGROUPS.value, resident=1, num_warps=4, num_stages=4)


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
            STAGES=call.tiles.num_stages,
        )


def _describe(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """For copies of ``rows`` rows of a tensor [B, Hkv, R, D]."""
    block = (rows, tensor.shape[3])
    return TensorDescriptor.from_tensor(tensor.view(-1, block[1]), list(block), shared_layout(block, tensor.dtype))
