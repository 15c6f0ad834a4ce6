"""Pooled keys: the means of runs of keys and of whole blocks, in one pass over the keys that is bound by memory bandwidth;
those of blocks of values, where they are wanted, in the same launch.

The probe of ``shares.py`` takes the largest of a block's logits, and it is cheapest where one thread holds them all. The
accumulator of a 128-column product gives thread t of four the columns 8j + 2t and 8j + 2t + 1, so pooled keys are laid
out in tiles of 128 such that these columns belong to as few blocks as possible; then no shuffle is needed.

The probe multiplies 8-bit integers, at twice the rate of 16-bit numbers, and finds their maxima three at a time
(reference.integer_keys). A pooled key is the mean of its block, an integer of two bytes, and its difference from that, one
of one byte. The means' two bytes are rows of their own, block by block: in their product a thread then has those of the blocks
that it has of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...geometry import PrefillGeometry
from ...probe_constants import CENTRE_LEVELS, KEY_LEVELS, SMALLEST_STEP
from .primitives import ROUNDING, compute_capability, launch_context, magnitudes, padded_head_dim, row_span
from .tuning import pool_warps

# Pooled keys per tile: the columns of one product of the probe.
TILE = 128
# Rows of block means at least that are multiplied together: a product of fewer columns takes as long, or is none.
CENTRE_ROWS = 32
# Tokens that a thread adds up one after the other where only whole blocks are asked for.
RUN = 4
# Tokens whose loads do not wait for one another.
AT_ONCE = tl.constexpr(4)


_KEY_LEVELS, _CENTRE_LEVELS, _SMALLEST_STEP = tl.constexpr(KEY_LEVELS), tl.constexpr(CENTRE_LEVELS), tl.constexpr(SMALLEST_STEP)


class PooledKeys(NamedTuple):
    """Pooled keys as integers, what the finer probes multiply. What belongs to no block is not written.

    Attributes:
        tiles: int8 [B, Hkv, P, D], differences of pooled keys from their block's mean; P fills whole tiles, in the order of
            ``tile_column``.
        centres: int8 [B, Hkv, C, D], the means of blocks, two rows each, the higher byte and the lower one.
        steps: float32 [B, Hkv, C / 2], by which a block's integers are multiplied; NaN if a key is not finite.
    """

    tiles: torch.Tensor
    centres: torch.Tensor
    steps: torch.Tensor


class Pools(NamedTuple):
    """What ``pool_keys`` gives and the means of whole blocks of keys and of values [B, Hkv, N, D]."""

    keys: tuple[torch.Tensor, ...]
    key_blocks: torch.Tensor
    value_blocks: torch.Tensor


@triton.jit
def tile_column(slot, within, PER_BLOCK: tl.constexpr):
    """Column, in its tile, of pooled key ``within`` of the tile's block number ``slot``."""
    return ((slot // 4 * (PER_BLOCK // 2) + within // 2) * 4 + slot % 4) * 2 + within % 2


@triton.jit
def _finite_or_nan(means):
    """As reference.pooled_keys: an infinite key must not hide behind the sign of its products."""
    return tl.where(tl.abs(means) < float("inf"), means, float("nan"))


@triton.jit(do_not_specialize=["kv_len", "tiles"])
def _pool_kernel(
    key_ptr,
    value_ptr,
    ranges_ptr,
    tiles_ptr,
    centres_ptr,
    steps_ptr,
    key_blocks_ptr,
    value_blocks_ptr,
    kv_len,
    tiles,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_ks: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vs: tl.int64,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    POOL: tl.constexpr,
    TILE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_POOLS: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_VALUES: tl.constexpr,
):
    """One program: the means of one block of one head, of keys by POOL tokens, in whole, or both, of values in whole. After the
    row's end they are zeros."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    PER_BLOCK: tl.constexpr = BLOCK // POOL
    source_ptr = key_ptr
    blocks_ptr = key_blocks_ptr
    stride_b, stride_h, stride_s = stride_kb, stride_kh, stride_ks
    is_value = False
    if HAS_VALUES:
        is_value = batch % 2 == 1
        batch = batch // 2
        if is_value:
            source_ptr = value_ptr
            blocks_ptr = value_blocks_ptr
            stride_b, stride_h, stride_s = stride_vb, stride_vh, stride_vs
    start, _, _, key_end = row_span(ranges_ptr, batch, 0, 0, kv_len, HAS_RANGES)
    channels = tl.arange(0, BLOCK_D)
    in_head = channels < HEAD_DIM
    within = tl.arange(0, PER_BLOCK)
    first_position = block * BLOCK + within * POOL
    source_ptr += batch * stride_b + head * stride_h
    total = tl.zeros((PER_BLOCK, BLOCK_D), tl.float32)
    # One token of every pool at a time: sums within a thread, where a reduced axis would go through shared memory.
    for first in range(0, POOL, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            positions = first_position + first + i
            total += tl.load(
                source_ptr + (start + positions).to(tl.int64)[:, None] * stride_s + channels[None, :],
                mask=(positions < key_end)[:, None] & in_head[None, :],
                other=0.0,
            ).to(tl.float32)
    head_row = (batch * tl.num_programs(1) + head).to(tl.int64)
    mean = tl.sum(total, 0) / tl.minimum(tl.maximum(key_end - block * BLOCK, 1), BLOCK)
    if HAS_POOLS:
        TILE_BLOCKS: tl.constexpr = TILE // PER_BLOCK
        if is_value == 0:
            count = tl.minimum(tl.maximum(key_end - first_position, 1), POOL)
            pools = total / count[:, None]
            # What begins after the row's end is no pooled key, and must not make the step larger.
            difference = tl.where((first_position < key_end)[:, None], magnitudes(pools - mean[None, :]), 0.0)
            step = tl.maximum(tl.max(tl.max(difference, 1), 0) / _KEY_LEVELS, tl.max(magnitudes(mean), 0) / _CENTRE_LEVELS)
            step = tl.maximum(step, _SMALLEST_STEP)
            factor = 1.0 / step
            whole = mean * factor + ROUNDING
            integers = (pools * factor - (whole - ROUNDING)[None, :] + ROUNDING).to(tl.int32, bitcast=True)
            tile, slot = block // TILE_BLOCKS, block % TILE_BLOCKS
            row = (head_row * tiles + tile) * TILE + tile_column(slot, within, PER_BLOCK)
            tl.store(tiles_ptr + row[:, None] * HEAD_DIM + channels[None, :], integers.to(tl.int8), mask=in_head[None, :])
            # Of ROUNDING the last two bytes are zeros.
            whole = whole.to(tl.int32, bitcast=True)
            block_slot = head_row * tiles * TILE_BLOCKS + block
            centre_ptrs = centres_ptr + 2 * block_slot * HEAD_DIM + channels
            tl.store(centre_ptrs, ((whole + 128) >> 8).to(tl.int8), mask=in_head)
            tl.store(centre_ptrs + HEAD_DIM, whole.to(tl.int8), mask=in_head)
            tl.store(steps_ptr + block_slot, tl.where(step < float("inf"), step, float("nan")))
    if HAS_BLOCKS:
        block_row = head_row * tl.num_programs(0) + block
        tl.store(
            blocks_ptr + block_row * HEAD_DIM + channels,
            _finite_or_nan(mean).to(blocks_ptr.dtype.element_ty),
            mask=in_head,
        )


def centre_tiles(tile_blocks: int) -> int:
    """Tiles, of so many blocks, whose blocks' means are multiplied together."""
    return max(1, CENTRE_ROWS // (2 * tile_blocks))


def pooled_together(block_size: int, pool_size: int) -> int:
    """Tokens of which multiples may be pooled apart: those of a tile, or of a block where pooled keys are whole blocks."""
    return block_size if pool_size == block_size else TILE * pool_size


def tokens_per_row(block_size: int, pool_size: int) -> tuple[int, ...]:
    """Tokens that a row of each tensor of ``pool_keys`` is made of."""
    return (block_size,) if pool_size == block_size else (pool_size, block_size // 2, block_size)


def pool_keys(key: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> tuple[torch.Tensor, ...]:
    """What ``select_blocks`` needs of the keys [B, Hkv, Skv, D]: the means of ``pool_size`` keys each, summed in float32.

    With ``pool_size`` of a whole block they are [B, Hkv, N, D] in the keys' dtype, otherwise PooledKeys.
    """
    pooled = None if pool_size == geometry.block_size else _new_pooled_keys(key, geometry, pool_size)
    blocks = _new_blocks(key, geometry) if pooled is None else None
    _pool(key, None, geometry, pool_size, pooled, blocks, None)
    return (blocks,) if pooled is None else pooled


def pool_keys_and_values(key: torch.Tensor, value: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> Pools:
    """``pool_keys`` with ``pool_size``, and the means of whole blocks of keys and of values; both are read once."""
    pooled = None if pool_size == geometry.block_size else _new_pooled_keys(key, geometry, pool_size)
    key_blocks, value_blocks = _new_blocks(key, geometry), _new_blocks(key, geometry)
    _pool(key, value, geometry, pool_size, pooled, key_blocks, value_blocks)
    return Pools((key_blocks,) if pooled is None else pooled, key_blocks, value_blocks)


def _new_pooled_keys(key: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> PooledKeys:
    """Room for pooled keys."""
    batch, heads, _, head_dim = key.shape
    tile_blocks = TILE * pool_size // geometry.block_size
    tiles = -(-geometry.key_blocks // tile_blocks)
    return PooledKeys(
        key.new_empty(batch, heads, tiles * TILE, head_dim, dtype=torch.int8),
        key.new_empty(batch, heads, tiles * tile_blocks * 2, head_dim, dtype=torch.int8),
        key.new_empty(batch, heads, tiles * tile_blocks, dtype=torch.float32),
    )


def _new_blocks(key: torch.Tensor, geometry: PrefillGeometry) -> torch.Tensor:
    """Room for the means of whole blocks [B, Hkv, N, D]."""
    return key.new_empty(*key.shape[:2], geometry.key_blocks, key.shape[3])


def _pool(
    key: torch.Tensor,
    value: torch.Tensor | None,
    geometry: PrefillGeometry,
    pool_size: int,
    pooled: PooledKeys | None,
    key_blocks: torch.Tensor | None,
    value_blocks: torch.Tensor | None,
) -> None:
    """Write the means of ``pool_size`` keys each, of whole blocks of keys, and of blocks of values, as far as there is room."""
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value is None or value.stride(-1) == 1 else value.contiguous()
    batch, heads, kv_len, head_dim = key.shape
    block_d, run = padded_head_dim(head_dim), RUN if pooled is None else pool_size
    with launch_context(key):
        _pool_kernel[geometry.key_blocks, heads, batch * (1 if value is None else 2)](
            key,
            value,
            geometry.valid_ranges,
            *(pooled or (None, None, None)),
            key_blocks,
            value_blocks,
            kv_len,
            0 if pooled is None else pooled.tiles.shape[2] // TILE,
            *key.stride()[:3],
            *(key if value is None else value).stride()[:3],
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK=geometry.block_size,
            POOL=run,
            TILE=TILE,
            HAS_RANGES=geometry.valid_ranges is not None,
            HAS_POOLS=pooled is not None,
            HAS_BLOCKS=key_blocks is not None,
            HAS_VALUES=value is not None,
            num_warps=pool_warps(compute_capability(key), geometry.block_size // run, block_d, pooled is not None),
            enable_fp_fusion=True,
        )
