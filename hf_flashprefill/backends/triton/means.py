"""What stands for dropped blocks: means of runs of blocks, and how many dropped tokens each of them stands for.

Runs are counted back from each query block's own, so that no mean holds a later token. A query block then reads one of
``mean_blocks`` sets of means, of which for runs of four the first holds blocks 0, 1 to 4, 5 to 8 and so on, the second 0 and 1,
2 to 5: together as many rows as there are blocks, and each set is a matrix that the attend kernels load like keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...block_index import BlockIndex
from .primitives import launch_context, padded_head_dim

# Means whose weights one program finds at once. The weights of a list end at a multiple of it.
WIDTH = tl.constexpr(128)
# Numbers of means per program.
TILE = 4096


class RunMeans(NamedTuple):
    """Means of runs of blocks, of keys and of values [B, Hkv, n, ceil(N / n), D]."""

    key: torch.Tensor
    value: torch.Tensor


@triton.jit(do_not_specialize=["blocks", "rows"])
def _run_means_kernel(
    keys_ptr,
    values_ptr,
    output_ptr,
    blocks,
    rows,
    MEAN_BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUNS: tl.constexpr,
):
    """One program: the means of the runs that end with RUNS neighbouring blocks, for one head of keys or of values. Those that
    would end after the last block are zeros."""
    head, is_value = tl.program_id(0).to(tl.int64), tl.program_id(2)
    last = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    channels = tl.arange(0, BLOCK_D)
    in_head = channels[None, :] < HEAD_DIM
    source_ptr = keys_ptr
    if is_value:
        source_ptr = values_ptr
    total = tl.zeros((RUNS, BLOCK_D), tl.float32)
    # Unrolled, so that the loads do not wait for one another.
    for i in tl.static_range(MEAN_BLOCKS):
        block = last - (MEAN_BLOCKS - 1 - i)
        is_block = (block >= 0) & (block < blocks)
        source = (head * blocks + block)[:, None] * HEAD_DIM + channels[None, :]
        total += tl.load(source_ptr + source, mask=is_block[:, None] & in_head, other=0.0).to(tl.float32)
    mean = tl.where((last < blocks)[:, None], total / tl.minimum(last + 1, MEAN_BLOCKS)[:, None], 0.0)
    row = (tl.num_programs(0) * is_value + head) * MEAN_BLOCKS + last % MEAN_BLOCKS
    target = output_ptr + (row * rows + last // MEAN_BLOCKS)[:, None] * HEAD_DIM + channels[None, :]
    tl.store(target, mean.to(output_ptr.dtype.element_ty), mask=(last < rows * MEAN_BLOCKS)[:, None] & in_head)


def run_means(key_means: torch.Tensor, value_means: torch.Tensor, mean_blocks: int) -> RunMeans:
    """Arguments and rows are those of backends/torch/means.py."""
    batch, heads, blocks, head_dim = key_means.shape
    rows = triton.cdiv(blocks, mean_blocks)
    output = key_means.new_empty(2, batch, heads, mean_blocks, rows, head_dim)
    block_d = padded_head_dim(head_dim)
    runs = TILE // block_d
    with launch_context(key_means):
        # Heads first: only the first dimension of a grid may pass 65535.
        _run_means_kernel[batch * heads, triton.cdiv(rows * mean_blocks, runs), 2](
            key_means,
            value_means,
            output,
            blocks,
            rows,
            MEAN_BLOCKS=mean_blocks,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            RUNS=runs,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return RunMeans(output[0], output[1])


@triton.jit
def _listed_before(list_ptr, count, steps, block):
    """How many of a rising list's ``count`` < 2**steps entries are smaller than ``block``, by bisection."""
    found = block * 0
    for step in range(steps):
        half = 1 << (steps - 1 - step)
        place = found + half - 1
        entry = tl.load(list_ptr + place, mask=place < count, other=1 << 30)
        found = tl.where(entry < block, found + half, found)
    return found


@triton.jit
def first_weight(own, mean_blocks):
    """Where in the weights of a query block with the key block ``own`` that of the first mean stands, 0 to WIDTH - 1."""
    means = tl.cdiv(own, mean_blocks)
    return tl.cdiv(means, WIDTH) * WIDTH - means


@triton.jit(do_not_specialize=["list_width", "width", "mean_blocks", "count_from"])
def _weigh_means_kernel(
    indices_ptr,
    counts_ptr,
    weights_ptr,
    counter_ptr,
    list_width,
    width,
    mean_blocks,
    count_from,
    LOG2_BLOCK: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
):
    """One program: the weights of one list. An empty list's are not written, nor what is behind the last. The first also sets
    the counter."""
    list_row = tl.program_id(0).to(tl.int64)
    if HAS_COUNTER:
        tl.store(counter_ptr, count_from, mask=tl.program_id(0) == 0)
    indices_ptr += list_row * list_width
    count = tl.load(counts_ptr + list_row)
    if count > 0:
        own = tl.load(indices_ptr + count - 1)
        steps = 0
        while (1 << steps) <= count:
            steps += 1
        mean_set = (own + mean_blocks - 1) % mean_blocks
        unused = first_weight(own, mean_blocks)
        for first in range(0, tl.cdiv(own, mean_blocks), WIDTH):
            column = first + tl.arange(0, WIDTH)
            run = column - unused
            # Blocks ``begin`` to ``end`` - 1; the last run ends before the query block's own.
            end = run * mean_blocks + mean_set + 1
            begin = tl.maximum(end - mean_blocks, 0)
            kept = _listed_before(indices_ptr, count, steps, end) - _listed_before(indices_ptr, count, steps, begin)
            dropped = tl.where(run >= 0, end - begin - kept, 0)
            log2_tokens = tl.log2(tl.maximum(dropped, 1).to(tl.float32)) + LOG2_BLOCK
            tl.store(weights_ptr + list_row * width + column, tl.where(dropped > 0, log2_tokens, float("-inf")))


def weigh_means(index: BlockIndex, mean_blocks: int, counter: torch.Tensor | None = None, count_from: int = 0) -> torch.Tensor:
    """log2 of how many dropped tokens each mean that a query block reads stands for, float32 [B, Hq, T, W]; -inf for none.

    They begin at ``first_weight``, behind -inf, so that they end at a multiple of WIDTH, and what is behind that means nothing:
    an attend kernel that reads means and their weights in equal steps up to the last one has none of a later block among them,
    whose value must not be multiplied even by nothing if it is not finite.

    The same launch sets ``counter``, int32 [1], to ``count_from``: a launch of its own would come before every attention.
    """
    width = triton.cdiv(triton.cdiv(index.geometry.key_blocks, mean_blocks), WIDTH.value) * WIDTH.value
    weights = torch.empty(*index.counts.shape, width, dtype=torch.float32, device=index.counts.device)
    with launch_context(weights):
        _weigh_means_kernel[(index.counts.numel(),)](
            index.indices,
            index.counts,
            weights,
            counter,
            index.indices.shape[-1],
            width,
            mean_blocks,
            count_from,
            LOG2_BLOCK=index.geometry.block_size.bit_length() - 1,
            HAS_COUNTER=counter is not None,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return weights
