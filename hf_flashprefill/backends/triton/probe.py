"""The finer probe: sampled queries times pooled keys, of which each query's largest logit per block and normaliser remain.

A part of the queries, a few query blocks of heads that share their keys, is one matrix of integers. Its products with a tile
of pooled keys are reduced to the largest of a few neighbours, and only those become logits: the block's mean is added, and
query and block have a factor each. Logits per block lie in tiles [tiles of pooled keys, rows, blocks of a tile], so that each
step writes one run of memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...geometry import PrefillGeometry
from ...probe_constants import NORMALISER_GROUP
from .pool import TILE, PooledKeys, centre_tiles
from .primitives import (
    bounded_sums,
    compute_capability,
    integer_queries,
    launch_context,
    padded_head_dim,
    row_span,
)
from .tuning import Part, ProbeTiles, probe_tiles

_NORMALISER_GROUP = tl.constexpr(NORMALISER_GROUP)
# The largest product where no pooled key is seen.
UNSEEN = -(2**31)
_UNSEEN = tl.constexpr(UNSEEN)


class ProbeCall(NamedTuple):
    """What is probed, with what, and where the results go.

    Attributes:
        query: [B, Hq, Sq, D] with dense channels.
        positions: Of the queries that probe, from ``longest_queries``; None if ``query_stride`` is 1.
        pooled: From ``pool_keys``.
        geometry: Of the operator call.
        peaks: Written: each query's largest logit of each block, times log2(e), float32 [B, parts, sets of heads, tiles of
            pooled keys, rows, blocks of a tile].
        log_sums: Written: log2 of each query's softmax normaliser over each split of the keys, float32 [B, parts, sets of
            heads, splits, rows] without gaps. For a row without queries or keys infinite, so that it gives no share, or minus
            infinity if there are several splits, whose normalisers are added up.
        part: How probing queries are cut into matrices.
        tiles: Of the kernel, from its module's ``tiles_for``.
        first_query_block: Of the lists that are being made.
        query_blocks: How many query blocks get lists.
        pool_size: Tokens per pooled key.
        query_stride: Tokens of which one query probes.
        scale_log2: Multiplies products; logits are base 2.
    """

    query: torch.Tensor
    positions: torch.Tensor | None
    pooled: PooledKeys
    geometry: PrefillGeometry
    peaks: torch.Tensor
    log_sums: torch.Tensor
    part: Part
    tiles: ProbeTiles
    first_query_block: int
    query_blocks: int
    pool_size: int
    query_stride: int
    scale_log2: float

    def grid(self, count: int, splits: int) -> tuple[int, int, int]:
        """Sets of heads, programs for ``count`` parts and ``splits`` each, batch."""
        return self.query.shape[1] // self.part.heads, -(-count // self.tiles.parts) * splits, self.query.shape[0]

    def arguments(self, first_part: int, splits: int) -> tuple:
        """What both probes' kernels take after the tensors that they read, in their order."""
        geometry = self.geometry
        return (
            geometry.valid_ranges,
            self.peaks,
            self.log_sums,
            self.scale_log2,
            geometry.kv_len,
            geometry.query_len,
            geometry.query_offset,
            self.first_query_block,
            self.query_blocks,
            first_part,
            splits,
            self.peaks.shape[1],
            self.pooled.tiles.shape[2],
            self.peaks.shape[3],
            *self.query.stride()[:3],
        )

    def constants(self) -> dict[str, Any]:
        """What both probes' kernels are compiled for."""
        return {
            "GROUP": self.query.shape[1] // self.pooled.tiles.shape[1],
            "HEADS": self.part.heads,
            "QUERY_BLOCKS": self.part.query_blocks,
            "HEAD_DIM": self.query.shape[3],
            "BLOCK": self.geometry.block_size,
            "POOL": self.pool_size,
            "STRIDE": self.query_stride,
            "CENTRE_TILES": centre_tiles(TILE * self.pool_size // self.geometry.block_size),
            "HAS_RANGES": self.geometry.valid_ranges is not None,
            "num_warps": self.tiles.num_warps,
            "enable_fp_fusion": True,
        }


@triton.jit
def _centre_products(integers, centres_ptr, first_row, end, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    """Products of queries and the means of some tiles' blocks, int32 [rows, tiles * blocks of a tile / 4, 4], of ROWS rows of
    the means' bytes, of which the last may be missing."""
    channels, rows = tl.arange(0, integers.shape[1]), first_row + tl.arange(0, ROWS)
    mask = (rows < end)[:, None] & (channels < HEAD_DIM)[None, :]
    centres = tl.load(centres_ptr + rows.to(tl.int64)[:, None] * HEAD_DIM + channels[None, :], mask=mask, other=0)
    products = tl.dot(integers, centres.T, out_dtype=tl.int32)
    high, low = tl.split(products.reshape(products.shape[0], ROWS // 8, 4, 2))
    return high * 256 + low


@triton.jit
def _reduce(
    products, centre_products, number, steps, factors, is_full, running_max, running_sum, PER_BLOCK: tl.constexpr,
    CENTRE_TILES: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile's largest logit per query and block, base 2, float32 [rows, blocks / 4, 4], and each query's largest logit and
    normaliser so far, see reference.probe.probe_shares; the latter two are kept for every fourth block and joined at the end.

    Every reduction here stays inside a thread.

    Args:
        products: int32 [rows, TILE], _UNSEEN where a query does not see a pooled key.
        centre_products: Of the CENTRE_TILES tiles whose blocks' means are multiplied together.
        number: The tile's, of these.
        steps: Of its blocks, [blocks / 4, 4].
        factors: Of the queries [rows].
        is_full: Whether a query sees all of a block, [rows, blocks / 4, 4]; with IS_WHOLE they see all of all blocks.
        running_max: Float32 [rows, 4].
        running_sum: Float32 [rows, 4].
        PER_BLOCK: Pooled keys in a block.
        CENTRE_TILES: See above.
        IS_WHOLE: See above.
    """
    FOURS: tl.constexpr = products.shape[1] // PER_BLOCK // 4
    GROUP: tl.constexpr = min(_NORMALISER_GROUP, PER_BLOCK)
    GROUPS: tl.constexpr = PER_BLOCK // GROUP
    by_group = products.reshape(products.shape[0], FOURS, GROUPS, GROUP // 2, 4, 2)
    groups = tl.max(tl.max(by_group, 5), 3)
    largest = tl.max(groups, 2)
    if CENTRE_TILES > 1:
        of_tile = tl.arange(0, CENTRE_TILES)[None, :, None, None] == number
        by_tile = centre_products.reshape(products.shape[0], CENTRE_TILES, FOURS, 4)
        centre_products = tl.sum(tl.where(of_tile, by_tile, 0), 1)
    factors = factors[:, None, None] * steps[None, :, :]
    peaks = (largest + centre_products).to(tl.float32) * factors
    if not IS_WHOLE:
        peaks = tl.where(largest == _UNSEEN, float("-inf"), peaks)
    new_max = tl.maximum(running_max, tl.max(peaks, 1))
    centres = centre_products.to(tl.float32) * factors - new_max[:, None, :]
    exponents = groups.to(tl.float32) * factors[:, :, None, :] + centres[:, :, None, :]
    if not IS_WHOLE:
        exponents = tl.where(groups == _UNSEEN, float("-inf"), exponents)
        centres = tl.where(is_full, centres, float("-inf"))
    terms = tl.sum(tl.exp2(exponents), 2) + (PER_BLOCK - GROUPS) * tl.exp2(centres)
    return peaks, new_max, running_sum * tl.exp2(running_max - new_max) + tl.sum(terms, 1)


@triton.jit(
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
def _probe_kernel(
    query_ptr,
    positions_ptr,
    pooled_ptr,
    pooled_desc,
    centres_ptr,
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
    CENTRE_TILES: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
):
    """One program: the part of QUERY_BLOCKS query blocks of HEADS heads, against one of ``splits`` parts of its keys."""
    SLOTS: tl.constexpr = BLOCK // STRIDE
    PER_BLOCK: tl.constexpr = BLOCK // POOL
    TILE_BLOCKS: tl.constexpr = TILE // PER_BLOCK
    head_set, batch = tl.program_id(0), tl.program_id(2)
    # The longest first, or the last to start would run alone.
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    number, split = number // splits, number % splits
    heads = tl.num_programs(0) * HEADS
    # The block is counted from first_query_block.
    first_head, first_block = head_set * HEADS, (first_part + number) * QUERY_BLOCKS
    key_head = first_head // GROUP
    start, query_begin, query_end, key_end = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    first_own = query_begin // BLOCK + first_query_block + first_block
    part = (batch * parts + number) * tl.num_programs(0) + head_set
    peaks_ptr += part.to(tl.int64) * score_tiles * (ROWS * TILE_BLOCKS)
    log_sums_ptr += (part * splits + split) * ROWS

    row = tl.arange(0, ROWS)
    query_block = row // (SLOTS * HEADS)
    head = first_head + row // SLOTS % HEADS
    is_row = (query_block < QUERY_BLOCKS) & (first_block + query_block < query_blocks)
    if STRIDE == 1:
        position = (first_own + query_block) * BLOCK + row % SLOTS
        is_probe = is_row & (position >= query_begin) & (position < query_end)
    else:
        run = ((batch * heads + head).to(tl.int64) * query_blocks + first_block + query_block) * SLOTS + row % SLOTS
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
    integers, factors = integer_queries(queries)
    factors *= scale_log2
    key_row = batch * (heads // GROUP) + key_head
    pooled_row = key_row * pooled_rows
    pooled_ptr += pooled_row.to(tl.int64) * HEAD_DIM
    CENTRES: tl.constexpr = 2 * CENTRE_TILES * TILE_BLOCKS
    blocks = pooled_rows // PER_BLOCK
    centre_rows = 2 * blocks
    centres_ptr += key_row.to(tl.int64) * centre_rows * HEAD_DIM
    steps_ptr += key_row.to(tl.int64) * blocks
    block = tl.arange(0, TILE_BLOCKS // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    steps_ptr += block
    column = tl.arange(0, TILE)
    slot = tl.arange(0, TILE_BLOCKS)
    # A finite start keeps queries that have seen nothing yet free of inf - inf.
    running_max = tl.full((ROWS, 4), -1e30, tl.float32)
    running_sum = tl.zeros((ROWS, 4), tl.float32)
    last_own = first_own + tl.minimum(QUERY_BLOCKS, query_blocks - first_block) - 1
    last_own = tl.minimum(last_own, tl.cdiv(query_end, BLOCK) - 1)
    # Tiles before the first query block are seen whole by every query. A program behind the row's last query has none.
    total = tl.where(last_own >= first_own, last_own // TILE_BLOCKS + 1, 0)
    whole = first_own // TILE_BLOCKS
    groups = tl.cdiv(total, CENTRE_TILES)
    begin = groups * split // splits * CENTRE_TILES
    end = tl.minimum(groups * (split + 1) // splits * CENTRE_TILES, total)
    centre_products = tl.zeros((ROWS, CENTRES // 8, 4), tl.int32)

    for number in range(begin, tl.minimum(whole, end)):
        if number % CENTRE_TILES == 0:
            first_row = number * (2 * TILE_BLOCKS)
            centre_products = _centre_products(integers, centres_ptr, first_row, centre_rows, HEAD_DIM, CENTRES)
        steps = tl.load(steps_ptr + number * TILE_BLOCKS)
        if HAS_DESCRIPTORS:
            pooled = pooled_desc.load([pooled_row + number * TILE, 0])
        else:
            pooled = tl.load(
                pooled_ptr + (number * TILE + column)[:, None].to(tl.int64) * HEAD_DIM + channels[None, :],
                mask=in_head[None, :],
                other=0,
            )
        products = tl.dot(integers, pooled.T, out_dtype=tl.int32)
        peaks, running_max, running_sum = _reduce(
            products, centre_products, number % CENTRE_TILES, steps, factors, None, running_max, running_sum, PER_BLOCK,
            CENTRE_TILES, True,
        )  # fmt: skip
        target = peaks_ptr + (number * ROWS + row)[:, None] * TILE_BLOCKS + slot[None, :]
        tl.store(target, peaks.reshape(ROWS, TILE_BLOCKS))

    tile_slot = column // (4 * PER_BLOCK) * 4 + column // 2 % 4
    within = column // 8 % (PER_BLOCK // 2) * 2 + column % 2
    for number in range(tl.maximum(whole, begin), end):
        if number % CENTRE_TILES == 0:
            first_row = number * (2 * TILE_BLOCKS)
            centre_products = _centre_products(integers, centres_ptr, first_row, centre_rows, HEAD_DIM, CENTRES)
        steps = tl.load(steps_ptr + number * TILE_BLOCKS, mask=(number * TILE_BLOCKS + block) * BLOCK < key_end, other=0.0)
        first_token = (number * TILE_BLOCKS + tile_slot) * BLOCK + within * POOL
        is_key = first_token < key_end
        pooled = tl.load(
            pooled_ptr + (number * TILE + column)[:, None].to(tl.int64) * HEAD_DIM + channels[None, :],
            mask=is_key[:, None] & in_head[None, :],
            other=0,
        )
        last_token = tl.minimum(first_token + POOL, key_end) - 1
        is_seen = is_key[None, :] & (last_token[None, :] <= position[:, None])
        products = tl.dot(integers, pooled.T, out_dtype=tl.int32)
        products = tl.where(is_seen, products, _UNSEEN)
        is_full = ((number * TILE_BLOCKS + block + 1) * BLOCK <= key_end)[None, :, :]
        is_full &= ((number * TILE_BLOCKS + block + 1) * BLOCK - 1)[None, :, :] <= position[:, None, None]
        peaks, running_max, running_sum = _reduce(
            products, centre_products, number % CENTRE_TILES, steps, factors, is_full, running_max, running_sum, PER_BLOCK,
            CENTRE_TILES, False,
        )  # fmt: skip
        target = peaks_ptr + (number * ROWS + row)[:, None] * TILE_BLOCKS + slot[None, :]
        tl.store(target, peaks.reshape(ROWS, TILE_BLOCKS))

    largest = tl.max(running_max, 1)
    normaliser = tl.sum(running_sum * tl.exp2(running_max - largest[:, None]), 1)
    # A query without keys, or a row that is no query, must give no block a share.
    is_voting = is_probe & ((normaliser != 0) | (largest > -1e30))
    log_sum = largest + tl.log2(bounded_sums(normaliser))
    tl.store(log_sums_ptr + row, tl.where(is_voting, log_sum, tl.where(splits == 1, float("inf"), float("-inf"))))


def tiles_for(query: torch.Tensor) -> ProbeTiles:
    """Tiles of ``probe_parts``."""
    return probe_tiles(compute_capability(query), padded_head_dim(query.shape[-1]))


def probe_parts(call: ProbeCall, first_part: int, count: int, splits: int) -> None:
    """Probe with ``count`` parts of the call's query blocks from ``first_part`` on, each by ``splits`` programs."""
    (tiles, centres, steps), head_dim = call.pooled, call.query.shape[3]
    block_d = padded_head_dim(head_dim)
    described = None
    if call.tiles.copy_engine and head_dim == block_d and head_dim >= 16:
        described = TensorDescriptor.from_tensor(tiles.view(-1, head_dim), [TILE, head_dim])
    with launch_context(call.query):
        _probe_kernel[call.grid(count, splits)](
            call.query,
            call.positions,
            tiles,
            described,
            centres,
            steps,
            *call.arguments(first_part, splits),
            **call.constants(),
            ROWS=call.part.rows,
            BLOCK_D=block_d,
            TILE=TILE,
            HAS_DESCRIPTORS=described is not None,
            num_stages=call.tiles.num_stages,
        )
