"""Energies of block means for Hopper GPUs, in Gluon: what ``energies.find_energies`` does, one warpgroup's products under the
others' exponentials.

One warp loads queries and tiles of block means with the bulk tensor copy engine; three warpgroups, a query block each, multiply
a tile on the tensor cores and reduce it. A program works through several heads of its query blocks and has buffers for the next
head's queries.

With two warpgroups that also multiplied the next tile beside each reduction the selection took 0.116 ms instead of 0.112 at
32K tokens, 0.344 instead of 0.318 at 64K, 1.21 instead of 1.04 at 128K and 4.86 instead of 4.09 at 256K, but 0.033 instead of
0.037 at 8K (H200, 32 query and 8 key-value heads, head_dim 128, bfloat16, one process; the portable kernel takes 1.56 at 128K
and 5.7 at 256K for the energies alone).
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .energies import EnergyCall
from .hopper_primitives import copy_to_shared, describe_rows, make_barriers, row_span, shared_layout
from .primitives import copy_engine_takes, launch_context, multiprocessors
from .tuning import energy_heads

BLOCK = gl.constexpr(128)
# Block means of a step.
TILE = gl.constexpr(64)
STAGES = gl.constexpr(2)
# Buffers of queries, so that the next head's arrive while this one's are used.
QUERY_STAGES = gl.constexpr(2)
WARPGROUPS = gl.constexpr(3)


@gluon.jit
def _log2(x):
    """To 22 bits in one instruction; gl.log2 is a polynomial of thirty."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _log_energy(products, scale_log2, first_query, end_query, IS_WHOLE: gl.constexpr):
    """log2 of the energies of some means: products [means, queries] -> [means]; queries before ``first_query`` and from
    ``end_query`` on are none."""
    if not IS_WHOLE:
        column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, products.type.layout))
        is_query = (column >= first_query) & (column < end_query)
        products = gl.where(is_query[None, :], products, float("-inf"))
    largest = gl.max(products, 1) * scale_log2
    largest = gl.where(largest == float("-inf"), 0.0, largest)
    return largest + _log2(gl.sum(gl.exp2(products * scale_log2 - largest[:, None]), 1))


@gluon.jit
def _score_head(nth, shared, warpgroup, own, targets, query_range, IS_WHOLE: gl.constexpr):
    """The energies of the program's ``nth`` head's query block, tile after tile of block means."""
    query_tiles, mean_tiles, barriers, total, scale_log2 = shared
    query_full, query_empty, full, empty = barriers
    first_query, end_query = query_range
    HEAD_DIM: gl.constexpr = mean_tiles.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    zeros = gl.zeros([TILE, BLOCK], gl.float32, layout)
    buffer = nth % QUERY_STAGES * WARPGROUPS + warpgroup
    mbarrier.wait(query_full.index(buffer), (nth // QUERY_STAGES) & 1)
    query = query_tiles.index(buffer).reshape([BLOCK, HEAD_DIM]).permute([1, 0])
    for tile in range(total):
        number = nth * total + tile
        stage = number % STAGES
        mbarrier.wait(full.index(stage), (number // STAGES) & 1)
        in_work = warpgroup_mma(mean_tiles.index(stage), query, zeros, use_acc=False, is_async=True)
        products = warpgroup_mma_wait(0, deps=[in_work])
        mbarrier.arrive(empty.index(stage), count=1)
        energies = _log_energy(products, scale_log2, first_query, end_query, IS_WHOLE)
        blocks = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
        gl.store(targets + blocks, energies, mask=blocks < own)
    mbarrier.arrive(query_empty.index(buffer), count=1)


@gluon.jit
def _score(warpgroup, shared, scored):
    """One warpgroup: the energies of one query block of each head of the program."""
    energies_ptr, list_row, tiles, width, first_own, last_own, query_begin, query_end, scored_heads = scored
    own = first_own + warpgroup
    query_range = (query_begin - own * BLOCK, query_end - own * BLOCK)
    is_whole = (own * BLOCK >= query_begin) & ((own + 1) * BLOCK <= query_end)
    # A warpgroup without a query block of its own keeps in step and stores nothing.
    own = gl.where(own <= last_own, own, 0)
    for nth in range(scored_heads):
        targets = energies_ptr + (list_row + nth * tiles + warpgroup) * width
        if is_whole:
            _score_head(nth, shared, warpgroup, own, targets, query_range, True)
        else:
            _score_head(nth, shared, warpgroup, own, targets, query_range, False)


@gluon.jit
def _load(shared, query_desc, means_desc, batch, first_head, first_row, heads, key_blocks, scored_heads, GROUP: gl.constexpr):
    """The loading warp: queries of each head, then the tiles of block means."""
    query_tiles, mean_tiles, barriers, total, _ = shared
    query_full, query_empty, full, empty = barriers
    for nth in range(scored_heads):
        head = first_head + nth
        for warpgroup in gl.static_range(WARPGROUPS):
            buffer = nth % QUERY_STAGES * WARPGROUPS + warpgroup
            mbarrier.wait(query_empty.index(buffer), ((nth // QUERY_STAGES) & 1) ^ 1)
            mbarrier.expect(query_full.index(buffer), query_desc.block_type.nbytes)
            coordinates = [batch, head, first_row + warpgroup * BLOCK, 0]
            copy_to_shared(query_desc, coordinates, query_full.index(buffer), query_tiles.index(buffer))
        mean_row = (batch * (heads // GROUP) + head // GROUP) * key_blocks
        for tile in range(total):
            number = nth * total + tile
            stage = number % STAGES
            mbarrier.wait(empty.index(stage), ((number // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), means_desc.block_type.nbytes)
            copy_to_shared(means_desc, [mean_row + tile * TILE, 0], full.index(stage), mean_tiles.index(stage))


@gluon.jit(
    do_not_specialize=["kv_len", "query_len", "query_offset", "first_query_block", "key_blocks", "tiles", "width", "head_count"]
)
def _energies_hopper_kernel(
    query_desc,
    means_desc,
    ranges_ptr,
    energies_ptr,
    scale_log2,
    kv_len,
    query_len,
    query_offset,
    first_query_block,
    key_blocks,
    tiles,
    width,
    head_count,
    GROUP: gl.constexpr,
    HAS_RANGES: gl.constexpr,
):
    """One program: WARPGROUPS neighbouring query blocks of ``head_count`` neighbouring heads."""
    HEAD_DIM: gl.constexpr = means_desc.block_type.shape[1]
    first_head, batch = gl.program_id(0) * head_count, gl.program_id(2)
    heads = gl.num_programs(0) * head_count
    # The longest first, or the last to start would run alone.
    first_tile = (gl.num_programs(1) - 1 - gl.program_id(1)) * WARPGROUPS
    start, query_begin, query_end, _ = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES)
    first_own = query_begin // BLOCK + first_query_block + first_tile
    last_own = gl.minimum(first_own + gl.minimum(WARPGROUPS, tiles - first_tile), gl.cdiv(query_end, BLOCK)) - 1
    is_empty = (last_own < first_own) | (query_end <= query_begin)
    total = gl.where(is_empty, 0, gl.cdiv(last_own, TILE))

    buffers: gl.constexpr = QUERY_STAGES * WARPGROUPS
    query_tiles = gl.allocate_shared_memory(query_desc.dtype, [buffers, 1, 1, BLOCK, HEAD_DIM], query_desc.layout)
    mean_tiles = gl.allocate_shared_memory(means_desc.dtype, [STAGES, TILE, HEAD_DIM], means_desc.layout)
    barriers = (
        make_barriers(QUERY_STAGES * WARPGROUPS, 1),
        make_barriers(QUERY_STAGES * WARPGROUPS, 1),
        make_barriers(STAGES, 1),
        make_barriers(STAGES, WARPGROUPS),
    )
    fence_async_shared()

    first_row = start - query_offset + first_own * BLOCK
    list_row = (batch * heads + first_head).to(gl.int64) * tiles + first_tile
    scored_heads = gl.where(total > 0, head_count, 0)
    shared = (query_tiles, mean_tiles, barriers, total, scale_log2)
    scored = (energies_ptr, list_row, tiles, width.to(gl.int64), first_own, last_own, query_begin, query_end, scored_heads)
    gl.warp_specialize(
        [
            (_score, (0, shared, scored)),
            (_score, (1, shared, scored)),
            (_score, (2, shared, scored)),
            (_load, (shared, query_desc, means_desc, batch, first_head, first_row, heads, key_blocks, scored_heads, GROUP)),
        ],
        [4, 4, 1],
        [144, 144, 24],
    )


def fits(query: torch.Tensor, block_size: int) -> bool:
    """Whether this kernel can take such queries: 16-bit, head_dim 64 or 128, strides the copy engine accepts."""
    is_16_bit = query.dtype != torch.float32
    return block_size == BLOCK and is_16_bit and query.shape[-1] in (64, 128) and copy_engine_takes(query)


def find_energies(call: EnergyCall) -> None:
    """Write ``call.energies`` for what ``fits``."""
    batch, heads, _, head_dim = call.query.shape
    tiles, width = call.energies.shape[2:]
    programs = -(-tiles // WARPGROUPS.value)
    head_count = energy_heads(heads, programs * batch, multiprocessors(call.query))
    block = (TILE.value, head_dim)
    means = call.means.view(-1, head_dim)
    with launch_context(call.query):
        _energies_hopper_kernel[heads // head_count, programs, batch](
            describe_rows(call.query, BLOCK.value),
            TensorDescriptor.from_tensor(means, list(block), shared_layout(block, means.dtype)),
            call.geometry.valid_ranges,
            call.energies,
            call.scale_log2,
            *call.lengths(),
            tiles,
            width,
            head_count,
            GROUP=heads // call.means.shape[1],
            HAS_RANGES=call.geometry.valid_ranges is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
