"""Pooled keys: the means of runs of keys and of whole blocks, in one pass over the keys that is bound by memory bandwidth.

The probe of ``shares.py`` takes the largest of a block's logits, and it is cheapest where one thread holds them all. The
accumulator of a 128-column product gives thread t of four the columns 8j + 2t and 8j + 2t + 1, so pooled keys are laid
out in tiles of 128 such that these columns belong to as few blocks as possible; then no shuffle is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...geometry import PrefillGeometry
from .primitives import launch_context, row_span

# Pooled keys per tile: the columns of one product of the probe.
TILE = 128
# Tokens that a thread adds up one after the other where only whole blocks are asked for.
RUN = 8


@triton.jit
def tile_column(slot, within, PER_BLOCK: tl.constexpr):
    """Column, in its tile, of pooled key ``within`` of the tile's block number ``slot``."""
    return ((slot // 4 * (PER_BLOCK // 2) + within // 2) * 4 + slot % 4) * 2 + within % 2


@triton.jit
def _finite_or_nan(means):
    """As reference.pooled_keys: an infinite key must not hide behind the sign of its products."""
    return tl.where(tl.abs(means) < float("inf"), means, float("nan"))


@triton.jit(do_not_specialize=["kv_len", "rows"])
def _pool_keys_kernel(
    key_ptr,
    ranges_ptr,
    pooled_ptr,
    blocks_ptr,
    kv_len,
    rows,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_ks: tl.int64,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    POOL: tl.constexpr,
    TILE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_POOLS: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
):
    """One program: the means of one key block of one head, by POOL tokens, in whole, or both. After the row's end they are
    zeros."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    PER_BLOCK: tl.constexpr = BLOCK // POOL
    start, _, _, key_end = row_span(ranges_ptr, batch, 0, 0, kv_len, HAS_RANGES)
    channels = tl.arange(0, BLOCK_D)
    in_head = channels < HEAD_DIM
    within = tl.arange(0, PER_BLOCK)
    first_position = block * BLOCK + within * POOL
    key_ptr += batch * stride_kb + head * stride_kh
    total = tl.zeros((PER_BLOCK, BLOCK_D), tl.float32)
    # One key of every pool at a time: sums within a thread, where a reduced axis would go through shared memory.
    for i in range(POOL):
        positions = first_position + i
        total += tl.load(
            key_ptr + (start + positions).to(tl.int64)[:, None] * stride_ks + channels[None, :],
            mask=(positions < key_end)[:, None] & in_head[None, :],
            other=0.0,
        ).to(tl.float32)
    head_row = (batch * tl.num_programs(1) + head).to(tl.int64)
    if HAS_POOLS:
        count = tl.minimum(tl.maximum(key_end - first_position, 1), POOL)
        BLOCKS_PER_TILE: tl.constexpr = TILE // PER_BLOCK
        row = block // BLOCKS_PER_TILE * TILE + tile_column(block % BLOCKS_PER_TILE, within, PER_BLOCK)
        tl.store(
            pooled_ptr + (head_row * rows + row)[:, None] * HEAD_DIM + channels[None, :],
            _finite_or_nan(total / count[:, None]).to(pooled_ptr.dtype.element_ty),
            mask=in_head[None, :],
        )
    if HAS_BLOCKS:
        mean = tl.sum(total, 0) / tl.minimum(tl.maximum(key_end - block * BLOCK, 1), BLOCK)
        block_row = head_row * tl.num_programs(0) + block
        tl.store(
            blocks_ptr + block_row * HEAD_DIM + channels,
            _finite_or_nan(mean).to(blocks_ptr.dtype.element_ty),
            mask=in_head,
        )


def pool_keys(key: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> torch.Tensor:
    """Means of ``pool_size`` keys each: [B, Hkv, Skv, D] -> [B, Hkv, P, D] in the keys' dtype, summed in float32.

    With ``pool_size`` of a whole block P is N, in order. Otherwise P fills whole tiles, in the order of ``tile_column``; what
    belongs to no block is not written.
    """
    if pool_size == geometry.block_size:
        blocks = _block_means_like(key, geometry)
        _pool(key, geometry, RUN, None, blocks)
        return blocks
    pooled = _pools_like(key, geometry, pool_size)
    _pool(key, geometry, pool_size, pooled, None)
    return pooled


def pool_keys_and_blocks(key: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``pool_keys`` with ``pool_size`` and with whole blocks; the keys are read once."""
    if pool_size == geometry.block_size:
        blocks = pool_keys(key, geometry, pool_size)
        return blocks, blocks
    pooled, blocks = _pools_like(key, geometry, pool_size), _block_means_like(key, geometry)
    _pool(key, geometry, pool_size, pooled, blocks)
    return pooled, blocks


def _block_means_like(key: torch.Tensor, geometry: PrefillGeometry) -> torch.Tensor:
    return key.new_empty(*key.shape[:2], geometry.key_blocks, key.shape[3])


def _pools_like(key: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> torch.Tensor:
    rows = -(-geometry.key_blocks * (geometry.block_size // pool_size) // TILE) * TILE
    return key.new_empty(*key.shape[:2], rows, key.shape[3])


def _pool(
    key: torch.Tensor, geometry: PrefillGeometry, run: int, pooled: torch.Tensor | None, blocks: torch.Tensor | None
) -> None:
    """Write the means of ``run`` keys each, of whole blocks, or both."""
    key = key if key.stride(-1) == 1 else key.contiguous()
    batch, heads, kv_len, head_dim = key.shape
    with launch_context(key):
        _pool_keys_kernel[geometry.key_blocks, heads, batch](
            key,
            geometry.valid_ranges,
            pooled,
            blocks,
            kv_len,
            0 if pooled is None else pooled.shape[2],
            *key.stride()[:3],
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK=geometry.block_size,
            POOL=run,
            TILE=TILE,
            HAS_RANGES=geometry.valid_ranges is not None,
            HAS_POOLS=pooled is not None,
            HAS_BLOCKS=blocks is not None,
            num_warps=4,
        )
