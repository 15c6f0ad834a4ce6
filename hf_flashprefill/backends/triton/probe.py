"""The finer probe: sampled queries times pooled keys, of which each query's largest logit per block and normaliser remain.

A part of the queries, a few query blocks of heads that share their keys, is one matrix. Its logits per block lie in tiles
[tiles of pooled keys, rows, blocks of a tile], so that each step writes one run of memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...geometry import PrefillGeometry
from .pool import TILE
from .primitives import compute_capability, launch_context, row_span
from .tuning import Part, ProbeTiles, probe_tiles


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
    pooled: torch.Tensor
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
            self.pooled.shape[2],
            self.peaks.shape[3],
            *self.query.stride()[:3],
        )

    def constants(self) -> dict[str, Any]:
        """What both probes' kernels are compiled for."""
        return {
            "GROUP": self.query.shape[1] // self.pooled.shape[1],
            "HEADS": self.part.heads,
            "QUERY_BLOCKS": self.part.query_blocks,
            "HEAD_DIM": self.query.shape[3],
            "BLOCK": self.geometry.block_size,
            "POOL": self.pool_size,
            "STRIDE": self.query_stride,
            "HAS_RANGES": self.geometry.valid_ranges is not None,
            "num_warps": self.tiles.num_warps,
            "enable_fp_fusion": True,
        }


@triton.jit
def _accumulate(products, running_max, running_sum, scale_log2, PER_BLOCK: tl.constexpr):
    """One tile's largest product per query and block [rows, blocks/4, 4], and the softmax normaliser, kept per block slot.

    Every reduction here stays inside a thread; the slots are reduced once at the end.
    """
    by_block = products.reshape(products.shape[0], products.shape[1] // PER_BLOCK // 4, PER_BLOCK // 2, 4, 2)
    peaks = tl.max(tl.max(by_block, 4), 2)
    new_max = tl.maximum(running_max, peaks)
    shifted = by_block * scale_log2 - (new_max * scale_log2)[:, :, None, :, None]
    terms = tl.sum(tl.sum(tl.exp2(shifted), 4), 2)
    running_sum = running_sum * tl.exp2((running_max - new_max) * scale_log2) + terms
    return peaks, new_max, running_sum


@triton.jit(
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
def _probe_kernel(
    query_ptr,
    positions_ptr,
    pooled_ptr,
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
    first_head, first_tile = head_set * HEADS, (first_part + number) * QUERY_BLOCKS
    key_head = first_head // GROUP
    start, query_begin, query_end, key_end = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    first_own = query_begin // BLOCK + first_query_block + first_tile
    part = (batch * parts + number) * tl.num_programs(0) + head_set
    peaks_ptr += part.to(tl.int64) * score_tiles * (ROWS * TILE_BLOCKS)
    log_sums_ptr += (part * splits + split) * ROWS

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
    total = tl.where(last_own >= first_own, last_own // TILE_BLOCKS + 1, 0)
    whole = first_own // TILE_BLOCKS
    begin, end = total * split // splits, total * (split + 1) // splits

    for number in range(begin, tl.minimum(whole, end)):
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
        target = peaks_ptr + (number * ROWS + row)[:, None] * TILE_BLOCKS + slot[None, :]
        tl.store(target, peaks.reshape(ROWS, TILE_BLOCKS) * scale_log2)

    tile_slot = column // (4 * PER_BLOCK) * 4 + column // 2 % 4
    within = column // 8 % (PER_BLOCK // 2) * 2 + column % 2
    for number in range(tl.maximum(whole, begin), end):
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
        target = peaks_ptr + (number * ROWS + row)[:, None] * TILE_BLOCKS + slot[None, :]
        tl.store(target, peaks.reshape(ROWS, TILE_BLOCKS) * scale_log2)

    largest = tl.max(tl.max(running_max, 2), 1)
    normaliser = tl.sum(tl.sum(running_sum * tl.exp2((running_max - largest[:, None, None]) * scale_log2), 2), 1)
    # A query without keys, or a row that is no query, must give no block a share.
    is_voting = is_probe & (normaliser != 0)
    log_sum = largest * scale_log2 + tl.log2(tl.where(is_voting, normaliser, 1.0))
    tl.store(log_sums_ptr + row, tl.where(is_voting, log_sum, tl.where(splits == 1, float("inf"), float("-inf"))))


def tiles_for(query: torch.Tensor) -> ProbeTiles:
    """Tiles of ``probe_parts``."""
    return probe_tiles(compute_capability(query), triton.next_power_of_2(query.shape[-1]), query.dtype)


def probe_parts(call: ProbeCall, first_part: int, count: int, splits: int) -> None:
    """Probe with ``count`` parts of the call's query blocks from ``first_part`` on, each by ``splits`` programs."""
    pooled, head_dim = call.pooled, call.query.shape[3]
    block_d = triton.next_power_of_2(head_dim)
    described = None
    if call.tiles.copy_engine and head_dim == block_d:
        described = TensorDescriptor.from_tensor(pooled.view(-1, head_dim), [TILE, head_dim])
    with launch_context(call.query):
        _probe_kernel[call.grid(count, splits)](
            call.query,
            call.positions,
            pooled,
            described,
            *call.arguments(first_part, splits),
            **call.constants(),
            ROWS=call.part.rows,
            BLOCK_D=block_d,
            TILE=TILE,
            HAS_DESCRIPTORS=described is not None,
            num_stages=call.tiles.num_stages,
        )
