"""The finer probe: shares of pooled keys in the attention of sampled queries, and the lists of blocks with large shares.

A block's score needs every probing query's normaliser, which is known only after the query has seen its last key. So a
program keeps each query's largest logit per block in scratch, which is small enough to stay mostly in the L2 cache, and
walks over it once more when the normalisers are there. The products are computed once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...block_index import BlockIndex
from ...config import MEAN_WEIGHT
from ...geometry import PrefillGeometry
from .longest import longest_queries
from .pool import TILE
from .primitives import append_kept, compute_capability, launch_context, multiprocessors, row_span
from .tuning import share_tiles

# Float32 scratch for the queries' logits per block, in bytes; query blocks beyond it wait for the next launch.
PEAK_BYTES = 256 << 20


@triton.jit
def _accumulate(products, running_max, running_sum, scale_log2, PER_BLOCK: tl.constexpr):
    """One tile's largest product per query and block [rows, blocks/4, 4], and the softmax normaliser, kept per block slot.

    Every reduction here stays inside a thread; the slots are reduced once at the end.
    """
    split = products.reshape(products.shape[0], products.shape[1] // PER_BLOCK // 4, PER_BLOCK // 2, 4, 2)
    peaks = tl.max(tl.max(split, 4), 2)
    new_max = tl.maximum(running_max, peaks)
    shifted = split * scale_log2 - (new_max * scale_log2)[:, :, None, :, None]
    terms = tl.sum(tl.sum(tl.exp2(shifted), 4), 2)
    running_sum = running_sum * tl.exp2((running_max - new_max) * scale_log2) + terms
    return peaks, new_max, running_sum


@triton.jit
def _block_scores(
    peaks_ptr, sums_ptr, blocks, own, width, voting, SLOTS: tl.constexpr, IS_BLEND: tl.constexpr, LOG2_WEIGHT: tl.constexpr
):
    """log2 of the largest share that any query of each list gives each block: [lists, blocks].

    With IS_BLEND, or of 2**LOG2_WEIGHT times the geometric mean of those that the list's ``voting`` queries give, if larger.
    What is NaN counts as the largest, so that attention shows it.
    """
    LISTS: tl.constexpr = own.shape[0]
    # Loads that do not wait for one another. With this and the longest programs first the kernel took 0.71 ms instead of 0.82
    # at 64K tokens (H200, 32 query and 8 key-value heads, head_dim 128, bfloat16).
    AT_ONCE: tl.constexpr = min(SLOTS, 8 if IS_BLEND else 16)
    first_query = tl.arange(0, LISTS) * SLOTS
    is_seen = blocks[None, :] <= own[:, None]
    largest = tl.full((LISTS, blocks.shape[0]), float("-inf"), tl.float32)
    total = tl.zeros((LISTS, blocks.shape[0]), tl.float32)
    for first in range(0, SLOTS, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            query = first_query + first + i
            peaks = tl.load(peaks_ptr + query[:, None] * width + blocks[None, :], mask=is_seen, other=float("-inf"))
            sums = tl.load(sums_ptr + query)[:, None]
            shares = peaks - sums
            shares = tl.where(shares == shares, shares, float("inf"))
            largest = tl.maximum(largest, shares)
            if IS_BLEND:
                # Those that do not vote have an infinite sum.
                total += tl.where(sums != float("inf"), shares, 0.0)
    if IS_BLEND:
        mean = total / tl.maximum(voting, 1.0)[:, None] + LOG2_WEIGHT
        largest = tl.maximum(largest, tl.where((voting > 0)[:, None], mean, float("-inf")))
    return largest


@triton.jit(
    do_not_specialize=[
        "kv_len",
        "query_len",
        "query_offset",
        "first_query_block",
        "tiles",
        "first_part",
        "pooled_rows",
        "width",
        "sink_blocks",
        "window_blocks",
        "dense_tail_blocks",
    ]
)
def _select_shares_kernel(
    query_ptr,
    positions_ptr,
    pooled_ptr,
    pooled_desc,
    ranges_ptr,
    peaks_ptr,
    sums_ptr,
    indices_ptr,
    counts_ptr,
    scale_log2,
    log2_alpha,
    kv_len,
    query_len,
    query_offset,
    first_query_block,
    tiles,
    first_part,
    pooled_rows,
    width,
    sink_blocks,
    window_blocks,
    dense_tail_blocks,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qs: tl.int64,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    POOL: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
    IS_RELATIVE: tl.constexpr,
    IS_BLEND: tl.constexpr,
    LOG2_WEIGHT: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
):
    """One program: the lists of QUERY_BLOCKS query blocks of HEADS heads that share their keys."""
    SLOTS: tl.constexpr = BLOCK // STRIDE
    PER_BLOCK: tl.constexpr = BLOCK // POOL
    TILE_BLOCKS: tl.constexpr = TILE // PER_BLOCK
    head_set, batch = tl.program_id(0), tl.program_id(2)
    # The longest first, or the last to start would run alone.
    part = first_part + tl.num_programs(1) - 1 - tl.program_id(1)
    heads = tl.num_programs(0) * HEADS
    first_head, first_tile = head_set * HEADS, part * QUERY_BLOCKS
    key_head = first_head // GROUP
    start, query_begin, query_end, key_end = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    first_own = query_begin // BLOCK + first_query_block + first_tile
    program = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + head_set
    peaks_ptr += program.to(tl.int64) * ROWS * width
    sums_ptr += program * ROWS

    row = tl.arange(0, ROWS)
    tile = row // (SLOTS * HEADS)
    head = first_head + row // SLOTS % HEADS
    is_row = (tile < QUERY_BLOCKS) & (first_tile + tile < tiles)
    if STRIDE == 1:
        position = (first_own + tile) * BLOCK + row % SLOTS
        is_probe = is_row & (position >= query_begin) & (position < query_end)
    else:
        run = ((batch * heads + head).to(tl.int64) * tiles + first_tile + tile) * SLOTS + row % SLOTS
        position = tl.load(positions_ptr + run, mask=is_row, other=-1)
        is_probe = position >= 0
    channels = tl.arange(0, BLOCK_D)
    in_head = channels < HEAD_DIM
    query_rows = (start - query_offset + position).to(tl.int64)
    queries = tl.load(
        query_ptr + batch * stride_qb + (head * stride_qh + query_rows * stride_qs)[:, None] + channels[None, :],
        mask=is_probe[:, None] & in_head[None, :],
        other=0.0,
    )
    pooled_row = (batch * (heads // GROUP) + key_head) * pooled_rows
    pooled_ptr += pooled_row.to(tl.int64) * HEAD_DIM
    column = tl.arange(0, TILE)
    slot = tl.arange(0, TILE_BLOCKS)
    # A finite start keeps queries that have seen nothing yet free of inf - inf.
    running_max = tl.full((ROWS, TILE_BLOCKS // 4, 4), -1e30, tl.float32)
    running_sum = tl.zeros((ROWS, TILE_BLOCKS // 4, 4), tl.float32)
    last_own = first_own + tl.minimum(QUERY_BLOCKS, tiles - first_tile) - 1
    last_own = tl.minimum(last_own, tl.cdiv(query_end, BLOCK) - 1)

    # Tiles before the first query block are seen whole by every query. A program behind the row's last query has none.
    for number in range(tl.where(last_own >= first_own, first_own // TILE_BLOCKS, 0)):
        if HAS_DESCRIPTORS:
            pooled = pooled_desc.load([pooled_row + number * TILE, 0])
        else:
            pooled = tl.load(
                pooled_ptr + (number * TILE + column)[:, None].to(tl.int64) * HEAD_DIM + channels[None, :],
                mask=in_head[None, :],
                other=0.0,
            )
        products = tl.dot(queries, pooled.T, input_precision="ieee")
        peaks, running_max, running_sum = _accumulate(products, running_max, running_sum, scale_log2, PER_BLOCK)
        target = peaks_ptr + row[:, None] * width + (number * TILE_BLOCKS + slot)[None, :]
        tl.store(target, peaks.reshape(ROWS, TILE_BLOCKS) * scale_log2)

    tile_slot = column // (4 * PER_BLOCK) * 4 + column // 2 % 4
    within = column // 8 % (PER_BLOCK // 2) * 2 + column % 2
    for number in range(first_own // TILE_BLOCKS, last_own // TILE_BLOCKS + 1):
        first_token = (number * TILE_BLOCKS + tile_slot) * BLOCK + within * POOL
        is_key = first_token < key_end
        pooled = tl.load(
            pooled_ptr + (number * TILE + column)[:, None].to(tl.int64) * HEAD_DIM + channels[None, :],
            mask=is_key[:, None] & in_head[None, :],
            other=0.0,
        )
        last_token = tl.minimum(first_token + POOL, key_end) - 1
        is_seen = is_key[None, :] & (last_token[None, :] <= position[:, None])
        products = tl.dot(queries, pooled.T, input_precision="ieee")
        products = tl.where(is_seen, products, float("-inf"))
        peaks, running_max, running_sum = _accumulate(products, running_max, running_sum, scale_log2, PER_BLOCK)
        blocks = number * TILE_BLOCKS + slot
        target = peaks_ptr + row[:, None] * width + blocks[None, :]
        tl.store(target, peaks.reshape(ROWS, TILE_BLOCKS) * scale_log2, mask=(blocks < width)[None, :])

    largest = tl.max(tl.max(running_max, 2), 1)
    total = tl.sum(tl.sum(running_sum * tl.exp2((running_max - largest[:, None, None]) * scale_log2), 2), 1)
    # A query without keys, or a row that is no query, must give no block a share.
    is_voting = is_probe & (total != 0)
    log_sum = largest * scale_log2 + tl.log2(tl.where(is_voting, total, 1.0))
    tl.store(sums_ptr + row, tl.where(is_voting, log_sum, float("inf")))

    # Other threads of this program wrote what is read next.
    tl.debug_barrier()
    # All lists of the program side by side.
    LISTS: tl.constexpr = ROWS // SLOTS
    number = tl.arange(0, LISTS)
    list_tile = first_tile + number // HEADS
    own = first_own + number // HEADS
    is_list = (number < QUERY_BLOCKS * HEADS) & (list_tile < tiles)
    own = tl.where((own * BLOCK < query_end) & (query_end > query_begin) & is_list, own, -1)
    list_row = (batch * heads + first_head + number % HEADS).to(tl.int64) * tiles + list_tile
    keep_all = own >= tl.cdiv(query_end, BLOCK) - dense_tail_blocks
    threshold = tl.full((LISTS,), log2_alpha, tl.float32)
    voting = tl.zeros((LISTS,), tl.float32)
    if IS_BLEND:
        of_list = number[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
        voting = tl.sum((tl.load(sums_ptr + of_list) != float("inf")).to(tl.float32), 1)
    if IS_RELATIVE:
        best = tl.full((LISTS, BLOCK_LIST), float("-inf"), tl.float32)
        for first in range(0, last_own + 1, BLOCK_LIST):
            blocks = first + tl.arange(0, BLOCK_LIST)
            scores = _block_scores(peaks_ptr, sums_ptr, blocks, own, width, voting, SLOTS, IS_BLEND, LOG2_WEIGHT)
            best = tl.maximum(best, scores)
        threshold += tl.max(best, 1)
    count = tl.zeros((LISTS,), tl.int32)
    for first in range(0, last_own + 1, BLOCK_LIST):
        blocks = first + tl.arange(0, BLOCK_LIST)
        scores = _block_scores(peaks_ptr, sums_ptr, blocks, own, width, voting, SLOTS, IS_BLEND, LOG2_WEIGHT)
        list_ptrs = indices_ptr + list_row * width
        count = append_kept(scores, blocks, threshold, own, sink_blocks, window_blocks, keep_all, list_ptrs, count)
    tl.store(counts_ptr + list_row, count, mask=is_list)


def select_shares(
    query: torch.Tensor,
    pooled: torch.Tensor,
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
    batch, heads, query_len, head_dim = query.shape
    group, slots = heads // pooled.shape[1], geometry.block_size // query_stride
    block_d = triton.next_power_of_2(head_dim)
    tiles = share_tiles(compute_capability(query), block_d, query.dtype)
    head_set = max(count for count in range(1, group + 1) if group % count == 0 and (count == 1 or count * slots <= tiles.rows))
    parts_of = max(1, tiles.rows // (head_set * slots))
    rows = max(16, triton.next_power_of_2(head_set * slots * parts_of))

    width = geometry.visible_blocks_bound(first_query_block + query_blocks - 1)
    shape = (batch, heads, query_blocks)
    indices = torch.empty(*shape, width, dtype=torch.int32, device=query.device)
    counts = torch.empty(shape, dtype=torch.int32, device=query.device)
    parts, across = -(-query_blocks // parts_of), heads // head_set * batch
    step = max(1, PEAK_BYTES // (4 * across * rows * width))
    # Two programs fit on a multiprocessor at a time. A launch of one and a half times as many takes as long as one of twice:
    # at 256K tokens on an H200 14.0 ms, where launches of nearly four times as many took 11.0.
    at_once = max(1, 2 * multiprocessors(query) // across)
    step = min(parts, step // at_once * at_once or step)
    peaks = torch.empty(step * across * rows * width, dtype=torch.float32, device=query.device)
    sums = torch.empty(step * across * rows, dtype=torch.float32, device=query.device)
    described = None
    if tiles.copy_engine and head_dim == block_d:
        described = TensorDescriptor.from_tensor(pooled.view(-1, head_dim), [TILE, head_dim])
    positions = None
    if query_stride > 1:
        positions = longest_queries(query, geometry, query_stride, first_query_block, query_blocks)
    with launch_context(query):
        for first_part in range(0, parts, step):
            _select_shares_kernel[heads // head_set, min(step, parts - first_part), batch](
                query,
                positions,
                pooled,
                described,
                geometry.valid_ranges,
                peaks,
                sums,
                indices,
                counts,
                scale * math.log2(math.e),
                math.log2(alpha) if alpha > 0 else -math.inf,
                geometry.kv_len,
                query_len,
                geometry.query_offset,
                first_query_block,
                query_blocks,
                first_part,
                pooled.shape[2],
                width,
                sink_blocks,
                window_blocks,
                dense_tail_blocks,
                *query.stride()[:3],
                GROUP=group,
                HEADS=head_set,
                QUERY_BLOCKS=parts_of,
                ROWS=rows,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d,
                BLOCK=geometry.block_size,
                POOL=pool_size,
                STRIDE=query_stride,
                TILE=TILE,
                BLOCK_LIST=128,
                IS_RELATIVE=selector == "peak",
                IS_BLEND=selector == "blend",
                LOG2_WEIGHT=math.log2(MEAN_WEIGHT),
                HAS_RANGES=geometry.valid_ranges is not None,
                HAS_DESCRIPTORS=described is not None,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
                enable_fp_fusion=True,
            )
    return BlockIndex(indices, counts, geometry, first_query_block)
