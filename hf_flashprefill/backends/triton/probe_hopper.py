"""The finer probe for Hopper GPUs, in Gluon: what ``probe.py`` does, one warpgroup's products under the others' reductions.

One warp loads tiles of pooled keys with the bulk tensor copy engine; four warpgroups, 64 probing queries each, multiply a tile
on the tensor cores and reduce it. Each waits for its own products before it reduces them, which leaves the registers for a
fourth: with three warpgroups that also multiplied the next tile beside each reduction the selection took 0.39 ms instead of
0.36 at 32K tokens and 4.9 instead of 4.6 at 128K, but 0.065 instead of 0.068 at 8K (H200, 32 query and 8 key-value heads,
head_dim 128, bfloat16; the portable kernel takes 5.9 at 128K). Warpgroups that multiplied in turn gained 1 to 2 % more from 32K
tokens on.
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

from .hopper_primitives import copy_to_shared, make_barriers, row_span, shared_layout
from .pool import TILE
from .primitives import launch_context
from .probe import ProbeCall
from .tuning import ProbeTiles

# Probing queries of a warpgroup.
_ROWS = gl.constexpr(64)
_TILE = gl.constexpr(TILE)
_WARPGROUPS = gl.constexpr(4)


@gluon.jit
def _by_block(products, PER_BLOCK: gl.constexpr):
    """[rows, columns] -> [rows, blocks / 4, columns of a thread, 4, columns of a thread], see ``pool.tile_column``."""
    return products.reshape([_ROWS, _TILE // PER_BLOCK // 4, PER_BLOCK // 2, 4, 2])


@gluon.jit
def _reduce(products, running_max, running_sum, scale_log2, PER_BLOCK: gl.constexpr):
    """``probe._accumulate``."""
    by_block = _by_block(products, PER_BLOCK)
    peaks = gl.max(gl.max(by_block, 4), 2)
    new_max = gl.maximum(running_max, peaks)
    shifted = by_block * scale_log2 - (new_max * scale_log2)[:, :, None, :, None]
    terms = gl.sum(gl.sum(gl.exp2(shifted), 4), 2)
    return peaks, new_max, running_sum * gl.exp2((running_max - new_max) * scale_log2) + terms


@gluon.jit
def _step(
    query,
    running_max,
    running_sum,
    zeros,
    pooled_tiles,
    barriers,
    number,
    targets,
    scale_log2,
    position,
    begin,
    key_end,
    IS_WHOLE: gl.constexpr,
    BLOCK: gl.constexpr,
    POOL: gl.constexpr,
):
    """Multiply with the ``number``-th tile, counted from tile ``begin``, and reduce the products."""
    full, empty = barriers
    STAGES: gl.constexpr = pooled_tiles.shape[0]
    PER_BLOCK: gl.constexpr = BLOCK // POOL
    layout: gl.constexpr = zeros.type.layout
    stage = number % STAGES
    mbarrier.wait(full.index(stage), (number // STAGES) & 1)
    in_work = warpgroup_mma(query, pooled_tiles.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(0, deps=[in_work])
    mbarrier.arrive(empty.index(stage), count=1)
    if not IS_WHOLE:
        column = gl.arange(0, _TILE, layout=gl.SliceLayout(0, layout))
        tile_slot = column // (4 * PER_BLOCK) * 4 + column // 2 % 4
        within = column // 8 % (PER_BLOCK // 2) * 2 + column % 2
        first_token = ((begin + number) * (_TILE // PER_BLOCK) + tile_slot) * BLOCK + within * POOL
        last_token = gl.minimum(first_token + POOL, key_end) - 1
        is_seen = (first_token < key_end)[None, :] & (last_token[None, :] <= position[:, None])
        products = gl.where(is_seen, products, float("-inf"))
    peaks, running_max, running_sum = _reduce(products, running_max, running_sum, scale_log2, PER_BLOCK)
    gl.store(targets + number * (_ROWS * (_TILE // PER_BLOCK)), peaks * scale_log2)
    return running_max, running_sum


@gluon.jit
def _probe(
    warpgroup,
    shared,
    HEADS: gl.constexpr,
    QUERY_BLOCKS: gl.constexpr,
    BLOCK: gl.constexpr,
    POOL: gl.constexpr,
    STRIDE: gl.constexpr,
):
    """One warpgroup: the part of QUERY_BLOCKS query blocks of HEADS heads, against the program's split of the keys."""
    queries, pooled_tiles, barriers, pointers, strides, place, work, scale_log2 = shared
    full, empty = barriers
    query_ptr, positions_ptr, peaks_ptr, log_sums_ptr = pointers
    stride_h, stride_s = strides
    first_token, first_tile, tiles, key_end = place
    begin, whole, total, first_part, head_sets, part_size, split, splits = work
    HEAD_DIM: gl.constexpr = pooled_tiles.shape[2]
    PER_BLOCK: gl.constexpr = BLOCK // POOL
    TILE_BLOCKS: gl.constexpr = _TILE // PER_BLOCK
    SLOTS: gl.constexpr = BLOCK // STRIDE
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    part = first_part + warpgroup * head_sets
    log_sums_ptr += (part * splits + split) * _ROWS + gl.arange(0, _ROWS, layout=row_layout)
    # A row without queries or keys: it adds nothing to the normalisers of other splits; alone, it must give no block a share.
    nothing = gl.full([_ROWS], 0.0, gl.float32, row_layout) + gl.where(splits == 1, float("inf"), float("-inf"))
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])

    if total > 0:
        tile = first_tile + warpgroup * QUERY_BLOCKS
        row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, load_layout))
        run = (row // SLOTS % HEADS * tiles + tile + row // (SLOTS * HEADS)) * SLOTS + row % SLOTS
        is_row = (row < QUERY_BLOCKS * HEADS * SLOTS) & (tile + row // (SLOTS * HEADS) < tiles)
        position = gl.load(positions_ptr + run, mask=is_row, other=-1)
        channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, load_layout))
        source = row // SLOTS % HEADS * stride_h + (first_token + position).to(gl.int64) * stride_s
        loaded = gl.load(query_ptr + source[:, None] + channel[None, :], mask=(position >= 0)[:, None], other=0.0)
        query = queries.index(warpgroup)
        query.store(loaded)
        fence_async_shared()
        position = gl.convert_layout(position, row_layout)

        zeros = gl.zeros([_ROWS, _TILE], gl.float32, layout)
        state_layout: gl.constexpr = gl.max(gl.max(_by_block(zeros, PER_BLOCK), 4), 2).type.layout
        # A finite start keeps queries that have seen nothing yet free of inf - inf.
        running_max = gl.full([_ROWS, TILE_BLOCKS // 4, 4], -1e30, gl.float32, state_layout)
        running_sum = gl.zeros([_ROWS, TILE_BLOCKS // 4, 4], gl.float32, state_layout)
        target_row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, state_layout)))
        fours = gl.arange(0, TILE_BLOCKS // 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, state_layout)))
        slot = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, state_layout)))
        targets = peaks_ptr + part * part_size + begin * (_ROWS * TILE_BLOCKS)
        targets += target_row[:, None, None] * TILE_BLOCKS + fours[None, :, None] * 4 + slot[None, None, :]

        for number in range(whole):
            running_max, running_sum = _step(
                query, running_max, running_sum, zeros, pooled_tiles, barriers, number, targets, scale_log2, position, begin,
                key_end, True, BLOCK, POOL,
            )  # fmt: skip
        for number in range(whole, total):
            running_max, running_sum = _step(
                query, running_max, running_sum, zeros, pooled_tiles, barriers, number, targets, scale_log2, position, begin,
                key_end, False, BLOCK, POOL,
            )  # fmt: skip

        largest = gl.max(gl.max(running_max, 2), 1)
        scaled = running_sum * gl.exp2((running_max - largest[:, None, None]) * scale_log2)
        normaliser = gl.convert_layout(gl.sum(gl.sum(scaled, 2), 1), row_layout)
        largest = gl.convert_layout(largest, row_layout)
        # A query without keys, or a row that is no query, must give no block a share.
        is_voting = (position >= 0) & (normaliser != 0)
        log_sum = largest * scale_log2 + gl.log2(gl.where(is_voting, normaliser, 1.0))
        gl.store(log_sums_ptr, gl.where(is_voting, log_sum, nothing))
    else:
        gl.store(log_sums_ptr, nothing)


@gluon.jit
def _load(pooled_tiles, barriers, pooled_desc, first_row, total):
    """The loading warp: the tiles of pooled keys in turn."""
    full, empty = barriers
    STAGES: gl.constexpr = pooled_tiles.shape[0]
    for number in range(total):
        stage = number % STAGES
        mbarrier.wait(empty.index(stage), ((number // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), pooled_desc.block_type.nbytes)
        copy_to_shared(pooled_desc, [first_row + number * _TILE, 0], full.index(stage), pooled_tiles.index(stage))


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
    pooled_desc,
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
    begin = tiles_in_all * split // splits
    total = tiles_in_all * (split + 1) // splits - begin
    whole = gl.minimum(gl.maximum(first_own // TILE_BLOCKS - begin, 0), total)

    # Tiles of queries are swizzled like those of pooled keys.
    queries = gl.allocate_shared_memory(pooled_desc.dtype, [_WARPGROUPS, _ROWS, HEAD_DIM], pooled_desc.layout)
    pooled_tiles = gl.allocate_shared_memory(pooled_desc.dtype, [STAGES, _TILE, HEAD_DIM], pooled_desc.layout)
    barriers = (make_barriers(STAGES, 1), make_barriers(STAGES, _WARPGROUPS))
    fence_async_shared()

    heads = head_sets * HEADS
    pooled_row = (batch * (heads // GROUP) + head_set * HEADS // GROUP) * pooled_rows
    list_row = (batch * heads + head_set * HEADS).to(gl.int64) * tiles
    pointers = (
        query_ptr + batch * stride_qb + head_set * HEADS * stride_qh,
        positions_ptr + list_row * SLOTS,
        peaks_ptr,
        log_sums_ptr,
    )
    place = (start - query_offset, first_tile, tiles, key_end)
    program_part = (batch * parts + number * _WARPGROUPS) * head_sets + head_set
    work = (begin, whole, total, program_part, head_sets, score_tiles * (_ROWS * TILE_BLOCKS), split, splits)
    shared = (queries, pooled_tiles, barriers, pointers, (stride_qh, stride_qs), place, work, scale_log2)
    gl.warp_specialize(
        [
            (_probe, (0, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE)),
            (_probe, (1, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE)),
            (_probe, (2, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE)),
            (_probe, (3, shared, HEADS, QUERY_BLOCKS, BLOCK, POOL, STRIDE)),
            (_load, (pooled_tiles, barriers, pooled_desc, pooled_row + begin * _TILE, total)),
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
    block = (TILE, call.query.shape[3])
    layout = shared_layout(block, call.query.dtype)
    with launch_context(call.query):
        _probe_hopper_kernel[call.grid(count, splits)](
            call.query,
            call.positions,
            TensorDescriptor.from_tensor(call.pooled.view(-1, block[1]), list(block), layout),
            *call.arguments(first_part, splits),
            **call.constants(),
            STAGES=call.tiles.num_stages,
        )
