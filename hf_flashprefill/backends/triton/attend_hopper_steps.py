"""One step of the Hopper attend kernel: what the loading warp fetches for it and what a warpgroup computes with it.

A step is a tile of keys and values, those of a listed block or of a part of it, or a tile of means. While a warpgroup's weights
of one step multiply values on the tensor cores, it takes the exponentials of the next: a step's products are issued in one go,
query x keys of this step and weights x values of the step before, and only the first is waited for before the softmax.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_primitives import copy_to_shared, finish_loads, not_before, rounded_product

MEAN_WEIGHTS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))


@gluon.jit
def _partial_sums(weights):
    """[queries, keys] -> [queries, 8], what each thread can add up of its own; a sum per step would cost the threads of a query
    two exchanges."""
    return gl.sum(weights.reshape([weights.shape[0], weights.shape[1] // 8, 8]), 1)


@gluon.jit
def pack_pairs(weights):
    """The same 16-bit weights, each pair of them in one register from here on: those that reach a loop from another loop the
    compiler would take apart and put together in every step. H200, head_dim 128, every block of 16K tokens listed: the loop of
    the means before that of the list then cost 9.8 % on top of the attention, with this 0.8 %."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weights], dtype=weights.dtype, is_pure=True, pack=2)


@gluon.jit
def _online_step(logits, running_max, running_sum, scale_log2, ROUNDED: gl.constexpr):
    """Weights float32 [queries, keys] of one step's logits; per query the new maximum and partial sums, and the factor that
    earlier results shrink by. ROUNDED: see ``rounded_product``; otherwise huge logits may overflow or leave a sum of zero."""
    if ROUNDED:
        logits = rounded_product(logits, scale_log2)
        scale_log2 = 1.0
    new_max = gl.maximum(running_max, gl.max(logits, 1) * scale_log2)
    weights = gl.exp2(logits * scale_log2 - new_max[:, None])
    rescale = gl.exp2(running_max - new_max)
    of_sums = gl.convert_layout(rescale, gl.SliceLayout(1, running_sum.type.layout))
    return weights, new_max, running_sum * of_sums[:, None] + _partial_sums(weights), rescale


@gluon.jit
def clear_values(buffers, barriers, now, first_unused):
    """Zero the values of step ``now``, which is still to be multiplied, from row ``first_unused`` on."""
    _, _, value_tiles, _ = buffers
    _, _, _, _, value_full, _, _ = barriers
    STAGES: gl.constexpr = value_tiles.shape[0]
    KEYS: gl.constexpr = value_tiles.shape[3]
    HEAD_DIM: gl.constexpr = value_tiles.shape[4]
    if first_unused < KEYS:
        mbarrier.wait(value_full.index(now % STAGES), (now // STAGES) & 1)
        tile = value_tiles.index(now % STAGES).reshape([KEYS, HEAD_DIM])
        # In parts, which take few registers, and with rows worked out for each: once per program they made the compiler spill
        # 16 to 24 bytes at head_dim 256.
        PART: gl.constexpr = 2048 // HEAD_DIM
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
        for first in gl.static_range(0, KEYS, PART):
            part = tile.slice(first, PART)
            row = first + not_before(gl.arange(0, PART, layout=gl.SliceLayout(1, layout)))
            values = part.load(layout)
            part.store(gl.where(row[:, None] < first_unused, values, gl.zeros_like(values)))
        fence_async_shared()


@gluon.jit
def _causal(logits, own_row, first_key, layout: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Logits [queries, keys] of the query block's own key block without what lies after each query; the first are those of the
    block's query ``own_row`` and key ``first_key``."""
    QUERIES: gl.constexpr = logits.shape[0]
    KEYS: gl.constexpr = logits.shape[1]
    row = own_row - first_key + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, layout))
    if HEAD_DIM != 128:
        # At 256 what is compared once per program was spilled, as were columns that are worked out here. At 128 this takes 1.02
        # to 1.06 of the time at published densities without means (attend-stores-2026-11-30-h200.txt).
        row = not_before(row)
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
    return gl.where(row[:, None] >= column[None, :], logits, float("-inf"))


@gluon.jit
def _weighed(logits, log2_tokens):
    """Logits (base 2) of means that stand for as many tokens each; -inf for those that stand for none, whose own may be NaN."""
    return gl.where((log2_tokens >= 0)[None, :], logits + log2_tokens[None, :], float("-inf"))


@gluon.jit
def _issue_logits(query, zeros, buffers, barriers, now):
    """Start query x keys of step ``now``, [queries, keys], which runs while this returns."""
    _, key_tiles, _, _ = buffers
    _, _, key_full, _, _, _, _ = barriers
    STAGES: gl.constexpr = key_tiles.shape[0]
    mbarrier.wait(key_full.index(now % STAGES), (now // STAGES) & 1)
    key = key_tiles.index(now % STAGES).reshape([key_tiles.shape[3], key_tiles.shape[4]])
    return warpgroup_mma(query, key.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def _issue_result(weights, result, buffers, barriers, now):
    """Start adding weights x values of step ``now`` to the result [queries, D], which runs while this returns."""
    _, _, value_tiles, _ = buffers
    _, _, _, _, value_full, _, _ = barriers
    STAGES: gl.constexpr = value_tiles.shape[0]
    mbarrier.wait(value_full.index(now % STAGES), (now // STAGES) & 1)
    value = value_tiles.index(now % STAGES).reshape([value_tiles.shape[3], value_tiles.shape[4]])
    return warpgroup_mma(weights, value, result, is_async=True)


@gluon.jit
def first_step(query, zeros, buffers, barriers, now, own_row, scale_log2, result_layout: gl.constexpr, ROUNDED: gl.constexpr):
    """The first keys of the query block's own block, before which there is nothing: their weights [queries, keys], and per
    query the maximum and the partial sums; the first is query ``own_row`` of its block. ROUNDED: see ``_online_step``."""
    _, key_tiles, _, _ = buffers
    _, _, _, key_empty, _, _, _ = barriers
    STAGES: gl.constexpr = key_tiles.shape[0]
    QUERIES: gl.constexpr = zeros.shape[0]
    layout: gl.constexpr = zeros.type.layout
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    logits = warpgroup_mma_wait(0, deps=[_issue_logits(query, zeros, buffers, barriers, now)])
    mbarrier.arrive(key_empty.index(now % STAGES), count=1)
    logits = _causal(logits, own_row, 0, layout, key_tiles.shape[4])
    no_max = gl.full([QUERIES], -1e30, gl.float32, row_layout)
    no_sum = _partial_sums(gl.zeros_like(logits))
    weights, running_max, running_sum, _ = _online_step(logits, no_max, no_sum, scale_log2, ROUNDED)
    weights = gl.convert_layout(weights.to(key_tiles.dtype), gl.DotOperandLayout(0, result_layout, 2))
    return weights, running_max, running_sum


@gluon.jit
def compute_step(
    query,
    weights,
    result,
    running_max,
    running_sum,
    zeros,
    buffers,
    barriers,
    now,
    is_last,
    first,
    limit,
    are_means,
    scale_log2,
    KIND: gl.constexpr,
    ONLINE: gl.constexpr,
    ROUNDED: gl.constexpr,
):
    """One step of one head: the exponentials of this step run while the step before is multiplied with its values.

    ``weights`` [queries, keys] are those of the step before, ``result`` [queries, D] is what the steps before that add up to,
    ``running_max`` [queries] and ``running_sum`` [queries, 8] go with the weights. Returns the same four of this step.

    ONLINE: the maximum rises with the logits, and what came before shrinks. Otherwise it stays that of the query block's own
    keys, and weights beyond what float32 holds come out as infinity or NaN. ROUNDED: see ``_online_step``.

    KIND says what the keys are. "own": keys from ``first`` on of the query block's own, of which the first query, the
    ``limit``-th, sees that many and one more. "listed": seen by all. "means": means, with the weights of ``weigh_means``.
    "either": those if ``are_means``, or else seen by all.
    """
    _, _, key_full, key_empty, _, value_empty, _ = barriers
    STAGES: gl.constexpr = buffers[1].shape[0]
    logits_layout: gl.constexpr = zeros.type.layout
    weights_layout: gl.constexpr = weights.type.layout
    result_layout: gl.constexpr = result.type.layout
    logits_in_work = _issue_logits(query, zeros, buffers, barriers, now)
    result_in_work = _issue_result(weights, result, buffers, barriers, now - 1)
    mean_weights = buffers[3].index(now % STAGES).reshape([zeros.shape[1]])
    logits = warpgroup_mma_wait(1, deps=[logits_in_work])
    if KIND == "means":
        # Not while the product runs: at head_dim 128 their 32 registers a thread pushed others out.
        log2_tokens = mean_weights.load(gl.SliceLayout(0, logits_layout))
        # They must have been read before the keys are released: the next ones come with the next keys.
        finish_loads()
    if KIND == "either":
        logits = rounded_product(logits, scale_log2) if ROUNDED else logits * scale_log2
        scale_log2 = 1.0
        if are_means:
            logits = _weighed(logits, mean_weights.load(gl.SliceLayout(0, logits_layout)))
            finish_loads()
    mbarrier.arrive(key_empty.index(now % STAGES), count=1)
    if KIND == "own":
        logits = _causal(logits, limit, first, logits_layout, result.shape[1])
    if KIND == "means":
        logits = _weighed(logits * scale_log2, log2_tokens)
        scale_log2 = 1.0
    IS_RISING: gl.constexpr = ONLINE or KIND == "own"
    if IS_RISING:
        next_weights, running_max, running_sum, rescale = _online_step(
            logits, running_max, running_sum, scale_log2, ROUNDED and KIND != "either"
        )
    else:
        next_weights = gl.exp2(logits * scale_log2 - running_max[:, None])
        running_sum += _partial_sums(next_weights)
    # A wait of its own basic block: without it ptxas moves the product's wait in front of the exponentials.
    mbarrier.wait(key_full.index((now + 1) % STAGES), ((now + 1) // STAGES) & 1, pred=is_last == 0)
    result, weights = warpgroup_mma_wait(0, deps=[result_in_work, weights])
    # Only now, when the registers of the old weights are free; earlier, the new ones would be moved there.
    next_weights = gl.convert_layout(next_weights.to(weights.dtype), weights_layout)
    mbarrier.arrive(value_empty.index((now - 1) % STAGES), count=1)
    if IS_RISING:
        result = result * gl.convert_layout(rescale, gl.SliceLayout(1, result_layout))[:, None]
    return next_weights, result, running_max, running_sum


@gluon.jit
def last_product(weights, result, buffers, barriers, now):
    """The result [queries, D] with what step ``now``, the last of a turn, adds to it."""
    _, _, _, _, _, value_empty, _ = barriers
    STAGES: gl.constexpr = buffers[2].shape[0]
    in_work = _issue_result(weights, result, buffers, barriers, now)
    result, weights = warpgroup_mma_wait(0, deps=[in_work, weights])
    mbarrier.arrive(value_empty.index(now % STAGES), count=1)
    return result


@gluon.jit
def load_step(key_desc, value_desc, coordinates, buffers, barriers, now):
    """Fetch keys and values of step ``now`` as soon as their buffers are free."""
    _, key_tiles, value_tiles, _ = buffers
    _, _, key_full, key_empty, value_full, value_empty, _ = barriers
    STAGES: gl.constexpr = key_tiles.shape[0]
    stage = now % STAGES
    phase = ((now // STAGES) & 1) ^ 1
    mbarrier.wait(key_empty.index(stage), phase)
    mbarrier.expect(key_full.index(stage), key_desc.block_type.nbytes)
    copy_to_shared(key_desc, coordinates, key_full.index(stage), key_tiles.index(stage))
    mbarrier.wait(value_empty.index(stage), phase)
    mbarrier.expect(value_full.index(stage), value_desc.block_type.nbytes)
    copy_to_shared(value_desc, coordinates, value_full.index(stage), value_tiles.index(stage))


@gluon.jit
def load_means(descriptors, head, first_mean, list_row, first_weight, buffers, barriers, now):
    """Fetch the means from the ``first_mean`` on, zeros before the first, and their weights, as step ``now``."""
    _, key_tiles, value_tiles, mean_weights = buffers
    _, _, key_full, key_empty, value_full, value_empty, _ = barriers
    _, _, _, key_desc, value_desc, weights_desc = descriptors
    STAGES: gl.constexpr = key_tiles.shape[0]
    stage = now % STAGES
    phase = ((now // STAGES) & 1) ^ 1
    mbarrier.wait(key_empty.index(stage), phase)
    mbarrier.expect(key_full.index(stage), key_desc.block_type.nbytes + weights_desc.block_type.nbytes)
    copy_to_shared(weights_desc, [list_row, first_weight], key_full.index(stage), mean_weights.index(stage))
    copy_to_shared(key_desc, head + [first_mean, 0], key_full.index(stage), key_tiles.index(stage))
    mbarrier.wait(value_empty.index(stage), phase)
    mbarrier.expect(value_full.index(stage), value_desc.block_type.nbytes)
    copy_to_shared(value_desc, head + [first_mean, 0], value_full.index(stage), value_tiles.index(stage))
