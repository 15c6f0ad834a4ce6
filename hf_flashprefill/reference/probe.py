"""Block scores of the finer probes: shares that the longest queries give pooled keys, from products of integers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..probe_constants import CENTRE_LEVELS, KEY_LEVELS, MEAN_WEIGHT, NORMALISER_GROUP, QUERY_LEVELS, SMALLEST_STEP


def integer_queries(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [..., D] as ``steps`` [..., 1] times integers from -QUERY_LEVELS to QUERY_LEVELS [..., D]: (integers, steps).

    A query that is not finite has a step of NaN.
    """
    steps = (queries.abs().amax(-1, keepdim=True) / QUERY_LEVELS).clamp(min=SMALLEST_STEP)
    is_finite = steps.isfinite()
    return (queries / steps).round().masked_fill(~is_finite, 0.0), steps.masked_fill(~is_finite, math.nan)


def integer_keys(keys: torch.Tensor, pool_size: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means of every ``pool_size`` keys, and of blocks, as integers times their block's step: [Hkv, S, D] -> integers
    [Hkv, P, D] and [Hkv, N, D], steps [Hkv, N, 1].

    An integer is the sum of the block mean's, up to CENTRE_LEVELS in magnitude, and of the pooled key's difference from that,
    of 8 bits. Channels that hardly change in a block, as those of biases and of slow rotations, thus cost the others no
    precision; SageAttention (arXiv 2410.02367, section 4.2) takes the mean of all keys for the same reason. A partial pool or
    block divides by its count. If a block's mean is not finite its step is NaN.
    """
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    integers, centres, steps = [], [], []
    for block in keys.to(wide).split(block_size, dim=1):
        pools = torch.stack([pool.mean(1) for pool in block.split(pool_size, dim=1)], 1)
        centre = block.mean(1, keepdim=True)
        step = (pools - centre).abs().amax((1, 2), keepdim=True) / KEY_LEVELS
        step = torch.maximum(step, centre.abs().amax((1, 2), keepdim=True) / CENTRE_LEVELS).clamp(min=SMALLEST_STEP)
        is_finite = step.isfinite()
        whole = (centre / step).round()
        integers.append((whole + (pools / step - whole).round()).masked_fill(~is_finite, 0.0))
        centres.append(whole.masked_fill(~is_finite, 0.0))
        steps.append(step.masked_fill(~is_finite, math.nan))
    return torch.cat(integers, 1), torch.cat(centres, 1), torch.cat(steps, 1)


def comparable_lengths(queries: torch.Tensor) -> torch.Tensor:
    """The squared 2-norms of queries [..., D] as integers [...] with eight significant bits, a bfloat16's.

    A token has the same norm wherever it stands in a first layer, up to the rounding of its rotation: that must not decide
    which query probes. What has no length, NaN, is as long as infinity.
    """
    squares = queries.float().square().sum(-1).nan_to_num(nan=math.inf, posinf=math.inf)
    return (squares.view(torch.int32) + 0x8000) >> 16


def longest_queries(queries: torch.Tensor, positions: torch.Tensor, query_stride: int) -> torch.Tensor:
    """Which query of every run of ``query_stride`` positions is the longest, the last of equals: int64 [Hq, R'].

    A long query can be certain of a key where a short one spreads its attention, and what is spread needs no block of its
    own. What is not finite counts as the longest, so that attention shows it. Arguments as of ``probe_logits``.
    """
    lengths = comparable_lengths(queries)
    row, run = torch.arange(len(positions), device=queries.device), positions // query_stride
    chosen = []
    for members in (row[run == number] for number in run.unique()):
        is_longest = lengths[:, members] == lengths[:, members].amax(1, keepdim=True)
        chosen.append(torch.where(is_longest, members, -1).amax(1))
    return torch.stack(chosen, 1)


class ProbeLogits(NamedTuple):
    """Base-2 logits of probing queries; -inf where a query does not see all tokens.

    Attributes:
        pools: [Hq, R', P], with pooled keys.
        centres: [Hq, R', N], with the means of blocks; also -inf where a block is not full.
        positions: int64 [Hq, R'], the queries' own.
    """

    pools: torch.Tensor
    centres: torch.Tensor
    positions: torch.Tensor


def probe_logits(
    queries: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    pool_size: int,
    query_stride: int,
    block_size: int,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> ProbeLogits:
    """The logits of the finer probes: every run of ``query_stride`` positions probes with its longest query, in each head.

    Products are of integers, see ``integer_queries`` and ``integer_keys``.

    Args:
        queries: [Hq, R, D].
        positions: int64 [R], rising by one; query r stands at key ``positions[r]``.
        keys: [Hkv, S, D].
        pool_size: Tokens per pooled key.
        query_stride: Positions per probing query.
        block_size: Tokens per block.
        scale: Multiplies the dot product.
        dtype: The precision of the computation.
    """
    group = queries.shape[0] // keys.shape[0]
    probing = longest_queries(queries, positions, query_stride)
    queries, positions = torch.take_along_dim(queries, probing[..., None], 1), positions[probing]
    query_integers, query_steps = integer_queries(queries.to(dtype))
    parts = (part.to(dtype).repeat_interleave(group, 0) for part in integer_keys(keys, pool_size, block_size))
    key_integers, centre_integers, key_steps = parts
    factors = query_steps * key_steps.transpose(1, 2) * (scale * math.log2(math.e))
    centre_logits = query_integers @ centre_integers.transpose(1, 2) * factors
    last_token = torch.arange(1, centre_logits.shape[2] + 1, device=queries.device) * block_size - 1
    centre_logits = centre_logits.masked_fill(positions[..., None] < last_token, -math.inf)
    factors = factors.repeat_interleave(block_size // pool_size, 2)[..., : key_integers.shape[1]]
    logits = query_integers @ key_integers.transpose(1, 2) * factors
    last_token = torch.arange(1, logits.shape[2] + 1, device=queries.device) * pool_size - 1
    logits = logits.masked_fill(positions[..., None] < last_token.clamp(max=keys.shape[1] - 1), -math.inf)
    return ProbeLogits(logits, centre_logits, positions)


def _log_sum(logits: torch.Tensor) -> torch.Tensor:
    """log2 of the sum of the powers of two of the last dimension, which is kept."""
    return (logits * math.log(2)).logsumexp(-1, keepdim=True) / math.log(2)


def probe_shares(probed: ProbeLogits, block_size: int, pool_size: int) -> torch.Tensor:
    """log2 of the largest share that each probing query gives any pooled key of each block: [Hq, R', N].

    Shares are nearly a softmax over the pooled keys: of every NORMALISER_GROUP neighbours the normaliser has the largest, and
    for the others of a full block that is seen whole what they would add were they its mean. A query that sees no pooled key
    yet has no shares to give.
    """
    per_block = block_size // pool_size
    group = min(NORMALISER_GROUP, per_block)
    peaks = torch.stack([part.amax(-1) for part in probed.pools.split(per_block, dim=-1)], dim=-1)
    largest = torch.stack([part.amax(-1) for part in probed.pools.split(group, dim=-1)], dim=-1)
    others = probed.centres + math.log2(per_block - per_block // group)
    sums = _log_sum(torch.cat([largest, others], -1))
    return (peaks - sums.masked_fill(sums == -math.inf, 0.0)).masked_fill(sums == -math.inf, -math.inf)


def block_shares(probed: ProbeLogits, first_block: int, block_size: int, pool_size: int) -> torch.Tensor:
    """log2 of the largest share that a probing query of query block I gives a pooled key of block J: [Hq, M, N].

    M counts from ``first_block``.
    """
    shares = probe_shares(probed, block_size, pool_size)
    # Runs do not cross blocks, so the heads agree.
    blocks = probed.positions[0] // block_size - first_block
    return torch.stack([shares[:, blocks == block].amax(1) for block in range(int(blocks[-1]) + 1)], dim=1)


def block_masses(probed: ProbeLogits, first_block: int, block_size: int, pool_size: int) -> torch.Tensor:
    """Sum over block J's pooled keys of the shares that the probing queries of block I give them, in a softmax over pooled
    keys, over those queries: [Hq, M, N]. Arguments as of ``block_shares``."""
    sums = _log_sum(probed.pools)
    shares = (probed.pools - sums.masked_fill(sums == -math.inf, 0.0)).exp2()
    per_block = torch.stack([part.sum(-1) for part in shares.split(block_size // pool_size, dim=-1)], dim=-1)
    blocks = probed.positions[0] // block_size - first_block
    return torch.stack([per_block[:, blocks == block].sum(1) for block in range(int(blocks[-1]) + 1)], dim=1)


def block_blends(probed: ProbeLogits, first_block: int, block_size: int, pool_size: int) -> torch.Tensor:
    """log2 of the larger of two numbers, [Hq, M, N]: ``block_shares``' score, and MEAN_WEIGHT times the geometric mean of the
    largest share that each probing query gives a pooled key of the block, over the queries that see a pooled key at all.

    Arguments as of ``block_shares``.
    """
    shares = probe_shares(probed, block_size, pool_size)
    sees = ~shares.isneginf().all(-1, keepdim=True)
    blocks = probed.positions[0] // block_size - first_block
    scores = []
    for block in range(int(blocks[-1]) + 1):
        of_block, voting = shares[:, blocks == block], sees[:, blocks == block]
        mean = of_block.masked_fill(~voting, 0.0).sum(1) / voting.sum(1).clamp(min=1) + math.log2(MEAN_WEIGHT)
        scores.append(torch.maximum(of_block.amax(1), mean.masked_fill(~voting.any(1), -math.inf)))
    return torch.stack(scores, dim=1)


# What each selector with a finer probe makes of its logits.
PROBE_SCORES = {"share": block_shares, "blend": block_blends, "peak": block_shares, "topk": block_shares, "topp": block_masses}
