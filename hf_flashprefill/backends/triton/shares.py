"""Lists of the blocks whose pooled keys have large shares in the attention of the queries that probe them.

A block's score needs every probing query's normaliser, which is known only after the query has seen its last key. So a probe
(``probe.py``, ``probe_hopper.py``) keeps each query's largest logit per block, and what follows here walks over those when the
normalisers are there. The products are computed once. Where a probe has few programs their keys are split among more, as
decode attention does; each split has a normaliser of its own.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import triton
import triton.language as tl

from ...block_index import BlockIndex
from ...geometry import PrefillGeometry
from ...probe_constants import MEAN_WEIGHT
from . import hopper, probe
from .longest import longest_queries
from .pool import TILE, PooledKeys
from .primitives import append_kept, launch_context, multiprocessors, row_span
from .tuning import MAX_SPLITS, Part, probe_splits

probe_hopper = hopper.gluon_module("probe_hopper")

# Float32 scratch for the queries' logits per block, in bytes; query blocks beyond it wait for the next launch.
PEAK_BYTES = 256 << 20
# Blocks that one step of a list looks at.
BLOCK_LIST = 64


@triton.jit
def _shares(
    peaks_ptr,
    log_sums_ptr,
    first,
    own,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
    IS_BLEND: tl.constexpr,
):
    """What a list's queries give each of BLOCK_LIST blocks from ``first`` on: log2 of the largest share and, with IS_BLEND, the
    sum of log2 of the shares that those which vote give. Float32 [tiles, TOGETHER * blocks of a tile] each: for every block
    TOGETHER partial results, of every TOGETHER-th query.

    What is NaN counts as the largest, so that attention shows it.
    """
    # Queries whose logits for one tile, which lie side by side, neighbouring threads read: 64 bytes in a row where a tile has 4
    # blocks. A thread for each tile read 16 bytes here and there, and the lists took 467 us instead of 343 at 128K tokens
    # (H200, 32 query and 8 key-value heads, head_dim 128, bfloat16, benchmarks/results/lists-2026-11-29-h200.txt).
    TOGETHER: tl.constexpr = min(SLOTS, 4)
    # Loads that do not wait for one another.
    AT_ONCE: tl.constexpr = min(SLOTS // TOGETHER, 4)
    TILES: tl.constexpr = BLOCK_LIST // TILE_BLOCKS
    tile = first // TILE_BLOCKS + tl.arange(0, TILES)
    column = tl.arange(0, TOGETHER * TILE_BLOCKS)
    # Whole tiles, so that their blocks are loaded together; a block that a query does not see has no share.
    is_seen = (tile * TILE_BLOCKS <= own)[:, None]
    peaks_ptr += (tile * (ROWS * TILE_BLOCKS))[:, None] + column[None, :]
    largest = tl.full((TILES, TOGETHER * TILE_BLOCKS), float("-inf"), tl.float32)
    total = tl.zeros((TILES, TOGETHER * TILE_BLOCKS), tl.float32)
    for some in range(0, SLOTS, TOGETHER * AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            slot = some + i * TOGETHER
            peaks = tl.load(peaks_ptr + slot * TILE_BLOCKS, mask=is_seen, other=float("-inf"))
            log_sum = tl.load(log_sums_ptr + slot + column // TILE_BLOCKS)[None, :]
            shares = peaks - log_sum
            shares = tl.where(shares == shares, shares, float("inf"))
            largest = tl.maximum(largest, shares)
            if IS_BLEND:
                # Those that do not vote have an infinite sum.
                total += tl.where(log_sum != float("inf"), shares, 0.0)
    return largest, total


@triton.jit
def _block_scores(largest, total, voting, TILE_BLOCKS: tl.constexpr, IS_BLEND: tl.constexpr, LOG2_WEIGHT: tl.constexpr):
    """Of what ``_shares`` found: log2 of the largest share that any query gives each block, float32 [blocks].

    With IS_BLEND, or of 2**LOG2_WEIGHT times the geometric mean of those that the ``voting`` queries give, if larger.
    """
    TILES: tl.constexpr = largest.shape[0]
    TOGETHER: tl.constexpr = largest.shape[1] // TILE_BLOCKS
    scores = tl.max(largest.reshape(TILES, TOGETHER, TILE_BLOCKS), 1)
    if IS_BLEND:
        mean = tl.sum(total.reshape(TILES, TOGETHER, TILE_BLOCKS), 1) / tl.maximum(voting, 1.0) + LOG2_WEIGHT
        scores = tl.maximum(scores, tl.where(voting > 0, mean, float("-inf")))
    return scores.reshape(TILES * TILE_BLOCKS)


@triton.jit
def _join_splits(log_sums_ptr, splits, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Put the normalisers of a list's queries over all their keys where those over the first split of the keys are."""
    log_sums_ptr += tl.arange(0, SLOTS)
    largest = tl.full((SLOTS,), float("-inf"), tl.float32)
    for split in range(splits):
        largest = tl.maximum(largest, tl.load(log_sums_ptr + split * ROWS))
    largest = tl.where(largest > float("-inf"), largest, 0.0)
    total = tl.zeros((SLOTS,), tl.float32)
    for split in range(splits):
        total += tl.exp2(tl.load(log_sums_ptr + split * ROWS) - largest)
    log_sums = tl.where(total == 0, float("inf"), largest + tl.log2(tl.where(total == 0, 1.0, total)))
    tl.debug_barrier()
    tl.store(log_sums_ptr, log_sums)
    # Every thread of this program reads all of them next.
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=[
        "kv_len",
        "query_len",
        "query_offset",
        "first_query_block",
        "query_blocks",
        "first_block",
        "splits",
        "parts",
        "score_tiles",
        "width",
        "sink_blocks",
        "window_blocks",
        "dense_tail_blocks",
    ]
)
def _list_shares_kernel(
    peaks_ptr,
    log_sums_ptr,
    ranges_ptr,
    indices_ptr,
    counts_ptr,
    log2_alpha,
    kv_len,
    query_len,
    query_offset,
    first_query_block,
    query_blocks,
    first_block,
    splits,
    parts,
    score_tiles,
    width,
    sink_blocks,
    window_blocks,
    dense_tail_blocks,
    HEADS: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
    IS_RELATIVE: tl.constexpr,
    IS_BLEND: tl.constexpr,
    LOG2_WEIGHT: tl.constexpr,
    HAS_RANGES: tl.constexpr,
):
    """One program: the list of one query block of one head, from what the probe found for its part of the queries."""
    head, batch = tl.program_id(0), tl.program_id(2)
    # The longest first, or the last to start would run alone.
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    _, query_begin, query_end, _ = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    own = query_begin // BLOCK + first_query_block + first_block + number
    list_row = (batch * tl.num_programs(0) + head).to(tl.int64) * query_blocks + first_block + number
    count = tl.zeros((1,), tl.int32)
    if (own * BLOCK < query_end) & (query_end > query_begin):
        part = (batch * parts + number // QUERY_BLOCKS) * (tl.num_programs(0) // HEADS) + head // HEADS
        row = (number % QUERY_BLOCKS * HEADS + head % HEADS) * SLOTS
        peaks_ptr += part.to(tl.int64) * score_tiles * (ROWS * TILE_BLOCKS) + row * TILE_BLOCKS
        log_sums_ptr += part * splits * ROWS + row
        if splits > 1:
            _join_splits(log_sums_ptr, splits, ROWS, SLOTS)
        voting = 0.0
        if IS_BLEND:
            voting = tl.sum((tl.load(log_sums_ptr + tl.arange(0, SLOTS)) != float("inf")).to(tl.float32), 0)
        threshold = log2_alpha
        if IS_RELATIVE:
            # Of the partial results, not of scores: those lie in threads between others that hold the same, and triton 3.6
            # reduces such a layout wrongly.
            best = float("-inf")
            for first in range(0, own + 1, BLOCK_LIST):
                found = _shares(peaks_ptr, log_sums_ptr, first, own, ROWS, SLOTS, TILE_BLOCKS, BLOCK_LIST, False)
                best = tl.maximum(best, tl.max(tl.max(found[0], 1), 0))
            threshold += best
        keep_all = own >= tl.cdiv(query_end, BLOCK) - dense_tail_blocks
        zero = tl.zeros((1,), tl.int32)
        list_ptrs = indices_ptr + list_row * width + zero
        for first in range(0, own + 1, BLOCK_LIST):
            blocks = first + tl.arange(0, BLOCK_LIST)
            largest, total = _shares(peaks_ptr, log_sums_ptr, first, own, ROWS, SLOTS, TILE_BLOCKS, BLOCK_LIST, IS_BLEND)
            scores = _block_scores(largest, total, voting, TILE_BLOCKS, IS_BLEND, LOG2_WEIGHT)
            count = append_kept(
                scores[None, :], blocks, threshold + zero, own + zero, sink_blocks, window_blocks, keep_all | (zero > 0),
                list_ptrs, count,
            )  # fmt: skip
    tl.store(counts_ptr + list_row + tl.arange(0, 1), count)


def _probing(query: torch.Tensor, block_size: int, query_stride: int) -> ModuleType:
    """The module whose kernel probes for such queries."""
    return probe_hopper if hopper.takes(probe_hopper, query, block_size, query_stride) else probe


def select_shares(
    query: torch.Tensor,
    pooled: PooledKeys,
    geometry: PrefillGeometry,
    *,
    selector: str,
    pool_size: int,
    query_stride: int,
    scale: float,
    alpha: float,
    sink_blocks: int,
    window_blocks: int,
    dense_tail_blocks: int,
    first_query_block: int,
    query_blocks: int,
) -> BlockIndex:
    """Lists for ``query_blocks`` query blocks from ``first_query_block`` on; scores are the selector's in
    reference.PROBE_SCORES."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, _, head_dim = query.shape
    group, slots = heads // pooled.tiles.shape[1], geometry.block_size // query_stride
    probing = _probing(query, geometry.block_size, query_stride)
    tiles = probing.tiles_for(query)
    part = Part.largest(group, slots, tiles.rows)

    width = geometry.visible_blocks_bound(first_query_block + query_blocks - 1)
    shape = (batch, heads, query_blocks)
    indices = torch.empty(*shape, width, dtype=torch.int32, device=query.device)
    counts = torch.empty(shape, dtype=torch.int32, device=query.device)
    tile_blocks = TILE * pool_size // geometry.block_size
    scores = (heads // part.heads, triton.cdiv(width, tile_blocks), part.rows, tile_blocks)
    parts = triton.cdiv(query_blocks, part.query_blocks)
    # Parts that fit on the multiprocessors at a time. A launch of one and a half times as many takes as long as one of twice:
    # at 256K tokens on an H200 the portable probe took 14.0 ms so, and 11.0 with nearly four times as many.
    at_once = max(1, tiles.resident * multiprocessors(query) // (batch * scores[0])) * tiles.parts
    step = PEAK_BYTES // (4 * batch * math.prod(scores))
    step = min(step // at_once * at_once or max(step, 1), parts)
    step = triton.cdiv(step, tiles.parts) * tiles.parts
    peaks = torch.empty(batch, step, *scores, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(batch, step, scores[0], MAX_SPLITS, part.rows, dtype=torch.float32, device=query.device)
    positions = None
    if query_stride > 1:
        positions = longest_queries(query, geometry, query_stride, first_query_block, query_blocks)
    call = probe.ProbeCall(
        query, positions, pooled, geometry, peaks, log_sums, part, tiles, first_query_block, query_blocks, pool_size,
        query_stride, scale * math.log2(math.e),
    )  # fmt: skip
    for first_part in range(0, parts, step):
        count = min(step, parts - first_part)
        head_sets, programs, rows = call.grid(count, 1)
        # Padded rows end in different launches, and must not leave the GPU half idle then.
        programs *= head_sets * (rows if geometry.valid_ranges is None else 1)
        at_once = tiles.resident * multiprocessors(query)
        first_block = first_part * part.query_blocks
        end_of_last = min(first_block + count * part.query_blocks, query_blocks)
        end_of_first = min(first_block + tiles.parts * part.query_blocks, end_of_last)
        shortest = triton.cdiv(geometry.visible_blocks_bound(first_query_block + end_of_first - 1), tile_blocks)
        longest = triton.cdiv(geometry.visible_blocks_bound(first_query_block + end_of_last - 1), tile_blocks)
        splits = probe_splits(programs, at_once, shortest, longest)
        probing.probe_parts(call, first_part, count, splits)
        with launch_context(query):
            _list_shares_kernel[heads, min(step * part.query_blocks, query_blocks - first_block), batch](
                peaks,
                log_sums,
                geometry.valid_ranges,
                indices,
                counts,
                math.log2(alpha) if alpha > 0 else -math.inf,
                geometry.kv_len,
                geometry.query_len,
                geometry.query_offset,
                first_query_block,
                query_blocks,
                first_block,
                splits,
                step,
                scores[1],
                width,
                sink_blocks,
                window_blocks,
                dense_tail_blocks,
                HEADS=part.heads,
                QUERY_BLOCKS=part.query_blocks,
                ROWS=part.rows,
                BLOCK=geometry.block_size,
                SLOTS=slots,
                TILE_BLOCKS=tile_blocks,
                BLOCK_LIST=BLOCK_LIST,
                IS_RELATIVE=selector == "peak",
                IS_BLEND=selector == "blend",
                LOG2_WEIGHT=math.log2(MEAN_WEIGHT),
                HAS_RANGES=geometry.valid_ranges is not None,
                num_warps=1,
                enable_fp_fusion=True,
            )
    return BlockIndex(indices, counts, geometry, first_query_block)
