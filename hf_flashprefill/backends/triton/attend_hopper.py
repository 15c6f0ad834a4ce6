"""Exact attention over listed key blocks for Hopper GPUs, in Gluon: the schedule of FlashAttention-3, driven by block lists.

One warp loads with the bulk tensor copy engine (TMA); two warpgroups compute, 64 queries each. While a warpgroup's weights
of one step multiply values on the tensor cores, it takes the exponentials of the next step, and the two warpgroups fill
each other's gaps. A program stays on its multiprocessor and takes turn after turn, a query block of one head each: the loading
warp fetches the next one's queries and keys while the last one's result is still being written, which a program per turn would
leave idle.

Here are the kernel's launch and its memory; from the outside in, attend_hopper_turns.py has which turn comes next,
attend_hopper_warps.py what the warps do in it, and attend_hopper_steps.py a single tile of keys.

The softmax has no running maximum. Weights in bfloat16 have the range of float32, so they are taken relative to the largest
logit of the query block's own keys, which come first: nothing is compared and no result shrinks in the steps that follow, and a
query's sum stays with the threads until the end. float16, which ends at 65504, always has a running maximum. Where a logit is
so far above (by about 83 in natural units, or less if the values are huge) that a sum or a result overflows, or so large that
its rounding decides, the turn is taken again after the program's last one, with a running maximum and without fused
multiply-adds: those of every float16 turn unfused took 1.02 to 1.08 of the time without means
(operator-2026-11-30-h200-float16-rounded-by-before.json, -float16-rounded-dims-). Time against a running maximum throughout, in
one process, without and with means: head_dim 128 .89 and .91 at 32K tokens, .91 and .92 at 128K, .96 and .93 at 256K, .88 and
.88 with every block of 16K tokens listed; there, head_dim 64 .86 and .87, 256 .85 and .86 (H200, 32 query and 8 key-value
heads, bfloat16, published densities).

The means of dropped blocks come right after the own block, in steps as long as the list's, so that the list's first step runs
beside the last of them. They add 4.6 % to the attention at 64K tokens and 3.7 % at 128K; at the end of a turn, in steps of half
the length, they added 8.3 and 8.9 % in the same process (H200, head_dim 128, published densities).

Against a program per query block and up to four heads, which multiplied its next head's first tile beside its last head's
last, a variant of this one took .96 of the time at 16K tokens, .99 at 32K (with means) and 64K and .95 at 128K (H100, 32 query
and 8 key-value heads, head_dim 128, bfloat16, published densities, one process).
"""

from __future__ import annotations

import torch
from triton import language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...block_index import BlockIndex
from .attend_hopper_steps import MEAN_WEIGHTS_LAYOUT
from .attend_hopper_turns import ANNOUNCEMENTS, BLOCK, make_announcements, make_noted
from .attend_hopper_warps import LOG2_E, ROWS, compute, load
from .hopper_primitives import describe_rows, make_barriers
from .means import RunMeans, weigh_means
from .primitives import copy_engine_takes, launch_context, multiprocessors
from .tuning import hopper_tiles


@gluon.jit(
    do_not_specialize=[
        "kv_len",
        "query_end",
        "query_offset",
        "first_query_block",
        "tiles",
        "width",
        "mean_blocks",
        "batch_heads",
    ]
)
def _attend_hopper_kernel(
    query_desc,
    key_desc,
    value_desc,
    key_means_desc,
    value_means_desc,
    mean_weights_desc,
    output_ptr,
    ranges_ptr,
    next_turn_ptr,
    retakes_ptr,
    counts_ptr,
    indices_ptr,
    sinks_ptr,
    scale_log2,
    kv_len,
    query_end,
    query_offset,
    first_query_block,
    tiles,
    width,
    mean_blocks,
    batch_heads,
    heads,
    # Triton knows annotations by their text, and "gl.int64" it takes for none.
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_os: tl.int64,
    GROUP: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    QUERY_STAGES: gl.constexpr,
    QUERY_IN_REGISTERS: gl.constexpr,
    HAS_RANGES: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    HAS_MEANS: gl.constexpr,
):
    """One program of as many as there are multiprocessors: turns until there are no more."""
    HEAD_DIM: gl.constexpr = key_desc.block_type.shape[3]
    buffers = (
        gl.allocate_shared_memory(query_desc.dtype, [2 * QUERY_STAGES, 1, 1, ROWS, HEAD_DIM], query_desc.layout),
        gl.allocate_shared_memory(key_desc.dtype, [STAGES, 1, 1, STEP, HEAD_DIM], key_desc.layout),
        gl.allocate_shared_memory(value_desc.dtype, [STAGES, 1, 1, STEP, HEAD_DIM], value_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, STEP], MEAN_WEIGHTS_LAYOUT),
    )
    barriers = (
        make_barriers(2 * QUERY_STAGES, 1),
        make_barriers(2 * QUERY_STAGES, 1),
        make_barriers(STAGES, 1),
        make_barriers(STAGES, 2),
        make_barriers(STAGES, 1),
        make_barriers(STAGES, 2),
        make_barriers(ANNOUNCEMENTS, 1),
    )
    announcements = make_announcements()
    # Used even if no turn is taken again. The memory of a barrier that nobody waits for goes to others, and when a process that
    # shares the GPU had its turn, the barrier's state came back there: four wrong numbers in a row of some results.
    pass_done = make_barriers(1, 2)
    noted = make_noted()
    fence_async_shared()

    shape = (heads, batch_heads, tiles, first_query_block, query_offset, query_end, kv_len)
    turn_pointers = (ranges_ptr, next_turn_ptr, retakes_ptr, counts_ptr, indices_ptr)
    strides = (stride_ob, stride_oh, stride_os)
    descriptors = (query_desc, key_desc, value_desc, key_means_desc, value_means_desc, mean_weights_desc)
    shared = (buffers, barriers, announcements, (output_ptr, retakes_ptr, sinks_ptr), strides, scale_log2)
    loaded = (buffers, barriers, announcements, descriptors, turn_pointers, shape, width, mean_blocks)
    gl.warp_specialize(
        [
            (
                compute,
                (0, shared, noted, pass_done, QUERY_IN_REGISTERS, HAS_RANGES, HAS_SINKS, HAS_MEANS),
            ),
            (
                compute,
                (1, shared, noted, pass_done, QUERY_IN_REGISTERS, HAS_RANGES, HAS_SINKS, HAS_MEANS),
            ),
            (load, (loaded, noted, pass_done, GROUP, HAS_RANGES, HAS_MEANS)),
        ],
        [4, 1],
        [240, 24],
    )


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int) -> bool:
    """Whether this kernel can take the tensors: 16-bit, head_dim 64, 128 or 256, strides the copy engine accepts."""
    if block_size != BLOCK or query.dtype == torch.float32 or query.shape[-1] not in (64, 128, 256):
        return False
    return all(copy_engine_takes(tensor) for tensor in (query, key, value))


def _mean_descriptors(means: RunMeans, weights: torch.Tensor, step: int) -> list[TensorDescriptor]:
    lists = weights.flatten(0, 2)
    described = [describe_rows(tensor.flatten(1, 2), step) for tensor in (means.key, means.value)]
    layout = MEAN_WEIGHTS_LAYOUT.value
    return [*described, TensorDescriptor(lists, list(lists.shape), list(lists.stride()), [1, step], layout)]


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: BlockIndex,
    *,
    scale: float,
    output: torch.Tensor,
    sinks: torch.Tensor | None = None,
    means: RunMeans | None = None,
) -> None:
    """Write the attention of the index's query blocks into ``output`` [B, Hq, Sq, D]; other rows are left alone.

    ``sinks`` are float32 [Hq]; ``means`` come from ``run_means``, and dropped blocks take part through them.
    """
    geometry = index.geometry
    batch, heads, query_len, head_dim = query.shape
    tiles = hopper_tiles(head_dim)
    programs = min(multiprocessors(query), index.counts.numel())
    retakes = torch.empty((index.counts.numel(), 2), dtype=torch.int32, device=query.device)
    # Every program's first turn is its own number.
    next_turn = torch.empty(1, dtype=torch.int32, device=query.device)
    if means is None:
        mean_blocks, of_means = 1, [None] * 3
        next_turn.fill_(programs)
    else:
        mean_blocks = means.key.shape[2]
        of_means = _mean_descriptors(means, weigh_means(index, mean_blocks, next_turn, programs), tiles.step)
    with launch_context(query):
        _attend_hopper_kernel[(programs,)](
            describe_rows(query, ROWS.value),
            describe_rows(key, tiles.step),
            describe_rows(value, tiles.step),
            *of_means,
            output,
            geometry.valid_ranges,
            next_turn,
            retakes,
            index.counts,
            index.indices,
            sinks,
            scale * LOG2_E.value,
            geometry.kv_len,
            geometry.query_offset + query_len,
            geometry.query_offset,
            index.first_query_block,
            index.query_blocks,
            index.indices.shape[-1],
            mean_blocks,
            batch * heads,
            heads,
            *output.stride()[:3],
            GROUP=heads // key.shape[1],
            STEP=tiles.step,
            STAGES=tiles.stages,
            QUERY_STAGES=tiles.query_stages,
            QUERY_IN_REGISTERS=tiles.query_in_registers,
            HAS_RANGES=geometry.valid_ranges is not None,
            HAS_SINKS=sinks is not None,
            HAS_MEANS=means is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
