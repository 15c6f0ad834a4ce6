"""Tile shapes by GPU generation, head_dim and dtype: a fixed table, so that no prompt length compiles or tunes anything."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch


class AttendTiles(NamedTuple):
    """Queries and keys per step, the warps and pipeline stages of a program, and whether the copy engine loads keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    copy_engine: bool = False

    def with_pointers(self, block_d: int) -> AttendTiles:
        """The same for keys that the copy engine cannot load."""
        # Pointers take registers of their own: with four warps 324 to 780 bytes were spilled (8.0, triton 3.6).
        return self._replace(copy_engine=False, num_warps=8 if block_d > 256 else self.num_warps)


def attend_tiles(capability: tuple[int, int], block_d: int, dtype: torch.dtype, block_size: int) -> AttendTiles:
    """Tiles of the portable attend kernel for a padded head_dim ``block_d``."""
    if dtype == torch.float32:
        # Exact float32 products run on the plain cores and want small tiles to stay in registers.
        return AttendTiles(block_m=32, block_n=32, num_warps=4, num_stages=1 if block_d > 128 else 2)
    if block_d > 256:
        # H200, 8 query and 1 key-value heads, head_dim 512, bfloat16, 32K tokens, the operator, density .09 with means and all
        # blocks without: 4.4 and 40 ms; 8 warps 8.2 and 89; 64 queries and 8 warps 4.3 and 40, but that spills with means
        # (by a script that is not in this repo).
        if capability[0] in (9, 10):
            return AttendTiles(32, 32, num_warps=4, num_stages=2, copy_engine=True)
        return AttendTiles(32, 32, num_warps=8, num_stages=2)
    if block_d > 128:
        return AttendTiles(min(block_size, 64), 32, num_warps=8, num_stages=2)
    if capability[0] == 9:
        # H200, head_dim 128, bfloat16, 32 query and 8 key-value heads, published densities: 128 keys a step instead of 64 took
        # 3.78 ms instead of 4.52 at 32K tokens and 22.4 instead of 26.0 at 128K.
        return AttendTiles(block_size, block_size, num_warps=8 if block_size == 128 else 4, num_stages=2, copy_engine=True)
    if capability[0] == 10:
        # Never run on one. With 128 keys a step the kernel for windows and sinks spills there with triton 3.8 and 3.9.
        return AttendTiles(block_size, 64, num_warps=8 if block_size == 128 else 4, num_stages=3, copy_engine=True)
    # compute capability 8.x and 12.x have about 100 KB of shared memory and no wgmma: 128x64 spills there.
    return AttendTiles(block_size, 32 if block_d == 128 else 64, num_warps=8 if block_size == 128 else 4, num_stages=2)


def pool_warps(capability: tuple[int, int], sums: int, block_d: int, has_pools: bool) -> int:
    """Warps of a program that adds keys or values up into ``sums`` means of ``block_d`` channels, for pools or blocks alone."""
    # H200, 8 heads, head_dim 128, bfloat16, one and two warps: pools of 4 tokens 150 and 155 us at 128K tokens, 286 and 299 at
    # 256K (probe-groups-2026-11-29-h200.txt). Elsewhere one spills them with triton 3.9 (compute capability 12.0). Blocks alone
    # take as long with either, but one warp spills with triton 3.8, and so do the fewer warps of head_dim 512 with 3.9.
    numbers_a_thread = 128 if has_pools and capability[0] == 9 and block_d <= 256 else 64
    return min(max(sums * block_d // (32 * numbers_a_thread), 1), 8)


class EnergyTiles(NamedTuple):
    """Block means per step, the warps and pipeline stages of a program, and whether the copy engine loads the means."""

    block_n: int
    num_warps: int
    num_stages: int
    copy_engine: bool = False


def energy_tiles(capability: tuple[int, int], block_d: int, dtype: torch.dtype) -> EnergyTiles:
    """Tiles of the published rule's kernel for a padded head_dim ``block_d``."""
    if block_d > 256:
        return EnergyTiles(16, num_warps=8, num_stages=1)
    if dtype == torch.float32 or block_d > 128:
        return EnergyTiles(32, num_warps=8, num_stages=2)
    if capability[0] in (9, 10):
        # H200, 32 query and 8 key-value heads, head_dim 128, bfloat16, three, two and one stages: 0.70, 0.58 and 0.51 ms at 64K
        # tokens, 7.9, 6.7 and 6.1 at 256K. Without a pipeline of its own a program leaves room for a fourth beside it.
        return EnergyTiles(64, num_warps=4, num_stages=1, copy_engine=True)
    # Four warps spill at head_dim 128 without wgmma.
    return EnergyTiles(64, num_warps=8, num_stages=2)


def energy_heads(heads: int, programs: int, processors: int) -> int:
    """How many heads a program of the published rule's Hopper kernel works through, of ``heads`` that would have ``programs``
    each if every program took one: as many as leave every multiprocessor a program and every other a second."""
    # H200, 32 query and 8 key-value heads, head_dim 128, bfloat16, at least 0.9, 1.5 and 2.5 programs a multiprocessor, one
    # process: selections of 126, 112 and 113 us at 32K tokens, 36, 37 and 37 at 8K, 318, 318 and 318 at 64K, 4.12, 4.09 and
    # 4.12 ms at 256K.
    fewest = math.ceil(1.5 * processors)
    return next((n for n in (16, 8, 4, 2) if heads % n == 0 and heads // n * programs >= fewest), 1)


class HopperTiles(NamedTuple):
    """Keys per step, the shared-memory buffers of keys and values, and of queries, and whether queries are multiplied from
    registers."""

    step: int
    stages: int
    query_stages: int
    query_in_registers: bool = False


def hopper_tiles(head_dim: int) -> HopperTiles:
    """Tiles of the Hopper attend kernel; each fills the 227 KB of shared memory a program can have as far as it helps."""
    if head_dim == 256:
        return HopperTiles(step=64, stages=2, query_stages=1)
    if head_dim == 64:
        # By count, products this narrow read shared memory most of the time they take; queries in registers cost none of it.
        # H100, TFLOP/s with every block of 16K tokens listed, by process: queries in registers 469, in shared memory 465, in
        # registers with two pairs of warpgroups in steps of 64 keys 456; two pairs with queries in shared memory 475, one pair
        # 457, but 444 and 450 with means at the published density of 32K tokens; a fourth or an eighth of the exponentials as
        # polynomials 456 and 470, none 465, cuDNN's dense attention 480. All that with a running maximum.
        return HopperTiles(step=128, stages=4, query_stages=2, query_in_registers=True)
    # H200, one process, 8K, 32K and 128K tokens at published densities and every block of 16K, without and with means: queries
    # in registers took .99 to 1.05 of the time, steps of 64 keys 1.02 to 1.15, both together 1.02 to 1.09.
    return HopperTiles(step=128, stages=2, query_stages=2)


class Part(NamedTuple):
    """Query blocks of heads with the same keys whose probing queries make one matrix of ``rows`` rows; the last may be idle."""

    heads: int
    query_blocks: int
    rows: int

    @classmethod
    def largest(cls, group: int, slots: int, rows: int) -> Part:
        """The part that fills ``rows`` best, where each of ``group`` heads has ``slots`` probing queries in a query block."""
        heads = max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * slots <= rows))
        query_blocks = max(1, rows // (heads * slots))
        return cls(heads, query_blocks, max(rows, heads * slots))


class ProbeTiles(NamedTuple):
    """Rows of a part, the parts of a program, programs that a multiprocessor holds at a time, and their warps; of the portable
    kernel alone, the pipeline stages and whether the copy engine loads the pooled keys."""

    rows: int
    parts: int
    resident: int
    num_warps: int
    num_stages: int = 1
    copy_engine: bool = False


def probe_tiles(capability: tuple[int, int], block_d: int) -> ProbeTiles:
    """Tiles of the finer probe's portable kernel for a padded head_dim ``block_d``."""
    if capability[0] == 9:
        # H200, 32 query and 8 key-value heads, head_dim 128, 128K tokens, 16-bit products: eight warps took 4.41 ms (three
        # stages) and 4.65 (two), four warps 3.24; 64 rows and four warps 3.61.
        num_warps = 8 if block_d > 128 else 4
        return ProbeTiles(128, parts=1, resident=2, num_warps=num_warps, num_stages=2, copy_engine=True)
    # At head_dim 64 two stages spill with triton 3.9 on compute capability 12.0, a third one has room.
    return ProbeTiles(64, parts=1, resident=2, num_warps=8, num_stages=1 if block_d > 128 else 2 if block_d > 64 else 3)


# For so many programs to a part of the queries the probe's normalisers have room.
MAX_SPLITS = 8


# What begins and ends a program of the probe, in tiles of pooled keys that it could multiply meanwhile. H200, Hopper kernel:
# with 9 ``probe_splits`` finds the fastest of the measured splits in 15 of 17 shapes, 4096 to 24576 tokens and chunks of 1024
# to 16384 against up to 131072 keys, and in the others one that takes 3 and 4 % longer (probe-splits-2026-11-30-h200.txt).
_TILES_TO_BEGIN = 9


@functools.lru_cache
def probe_splits(programs: int, at_once: int, shortest: int, longest: int) -> int:
    """Among how many programs, up to MAX_SPLITS, the keys of each of ``programs`` of the probe are split, where ``at_once`` run
    at a time and see from ``shortest`` to ``longest`` tiles of pooled keys, the longest first.

    Programs that are about as long run in turns, of which the last leaves most of the GPU idle if there are few: with 192 for
    12K of 64K tokens on 132 multiprocessors the probe takes 227 us, in two splits 190 (H200, 32 query and 8 key-value heads,
    head_dim 128, bfloat16). Where short ones fill the gaps, the longest may still take longer than all of them on average: with
    64 programs for 4K tokens it takes 15.8 us, in two splits 12.6.
    """
    if programs >= 2 * at_once:
        return 1

    def tiles_to_wait_for(splits: int) -> float:
        turns = programs * splits / at_once
        if 2 * shortest >= longest:
            turns = math.ceil(turns)
        average = turns * ((shortest + longest) / 2 / splits + _TILES_TO_BEGIN)
        return max(-(-longest // splits) + _TILES_TO_BEGIN, average if turns > 1 else 0)

    return min(range(1, MAX_SPLITS + 1), key=tiles_to_wait_for)
