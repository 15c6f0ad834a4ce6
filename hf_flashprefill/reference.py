"""The specification: each stage of FlashPrefill (arXiv 2603.06199), and of the finer probe, in plain eager torch.

Stages work on one batch row whose padding has been cut away, so position 0 is the row's first token. They are written to
be read beside the paper, not to be fast. Where the published code and this text differ, on purpose: only real query rows
are scored, means are summed in float32, a partial last key block is visible to the row at its last real key, and nothing
is sorted.

Letters: Hq query heads, Hkv key-value heads, R queries, S keys, D head_dim, M query blocks, N key blocks, P pooled keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .block_index import BlockIndex
from .config import CENTRE_LEVELS, KEY_LEVELS, MEAN_WEIGHT, NORMALISER_GROUP, QUERY_LEVELS, SMALLEST_STEP
from .geometry import PrefillGeometry


def pooled_keys(keys: torch.Tensor, pool_size: int) -> torch.Tensor:
    """Mean of every ``pool_size`` keys: [Hkv, S, D] -> [Hkv, P, D] in the keys' dtype; a partial pool divides by its count.

    A pool with an infinite key becomes NaN, because the sign of its products says nothing of other queries'.
    """
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    means = [pool.to(wide).mean(dim=1) for pool in keys.split(pool_size, dim=1)]
    pooled = torch.stack(means, dim=1).to(keys.dtype)
    return pooled.masked_fill(~pooled.isfinite(), math.nan)


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


def run_means(means: torch.Tensor, mean_blocks: int) -> torch.Tensor:
    """Row J is the mean of block means J - ``mean_blocks`` + 1 to J, as far back as there are any: [H, N, D] -> [H, N, D]."""
    ends = range(1, means.shape[1] + 1)
    runs = [means[:, max(0, end - mean_blocks) : end].float().mean(1) for end in ends]
    return torch.stack(runs, 1).to(means.dtype)


def block_energies(
    queries: torch.Tensor,
    positions: torch.Tensor,
    means: torch.Tensor,
    key_count: int,
    block_size: int,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """log2 of the energy of every (query head, query block, key block): [Hq, M, N].

    The energy of key block J for query block I is the sum, over the rows r of I that may see all of J, of
    exp(scale * q_r . mean_J). Rows are on the grid of ``positions``; M counts from the first row's block. Pairs that no
    row may see are -inf.

    Args:
        queries: [Hq, R, D].
        positions: int64 [R], rising by one; query r stands at key ``positions[r]``.
        means: [Hkv, N, D].
        key_count: Keys S of the row.
        block_size: Tokens per block.
        scale: Multiplies the dot product.
        dtype: The precision of the computation.
    """
    group = queries.shape[0] // means.shape[0]
    logits = queries.to(dtype) @ means.to(dtype).repeat_interleave(group, 0).transpose(1, 2) * (scale * math.log2(math.e))
    last_key = torch.arange(1, means.shape[1] + 1, device=queries.device) * block_size - 1
    last_key = last_key.clamp(max=key_count - 1)
    logits = logits.masked_fill(positions[:, None] < last_key, -math.inf)
    first_block = int(positions[0]) // block_size
    blocks = positions // block_size - first_block
    # logsumexp in base 2: exp2 and log2 are what the kernels use.
    per_block = [logits[:, blocks == block] for block in range(int(blocks[-1]) + 1)]
    return torch.stack([(rows * math.log(2)).logsumexp(1) / math.log(2) for rows in per_block], dim=1)


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


def kept_blocks(
    scores: torch.Tensor,
    first_block: int,
    *,
    selector: str,
    alpha: float,
    sink_blocks: int,
    window_blocks: int,
    dense_tail_blocks: int,
) -> torch.Tensor:
    """Scores [Hq, M, N] -> kept blocks, bool [Hq, M, N].

    Block J is kept for query block I (counted from ``first_block``) when the selector says so; or J is among the first
    ``sink_blocks``, or I - J < ``window_blocks``, or I is among the row's last ``dense_tail_blocks``; and J <= I.

    ``"share"`` and ``"blend"``: its score, a log2, is at least ``alpha``. ``"peak"`` and ``"flashprefill"``: at least ``alpha``
    times the row's largest. ``"topk"``: it is among the largest 1 - ``alpha`` of the visible blocks, rounded up. ``"topp"``: it
    and all blocks with less mass have at least ``alpha`` of the row's mass. What is NaN is kept, so that attention shows it.
    """
    tiles, count = scores.shape[1:]
    query_block = torch.arange(first_block, first_block + tiles, device=scores.device)[:, None]
    key_block = torch.arange(count, device=scores.device)[None, :]
    log_alpha = math.log2(alpha) if alpha > 0 else -math.inf
    if selector in ("share", "blend"):
        kept = ~(scores < log_alpha)
    elif selector == "topk":
        kept = scores.isnan()
        for row in range(tiles):
            visible = first_block + row + 1
            # Ties go to the earlier block.
            order = scores[:, row, :visible].sort(dim=-1, descending=True, stable=True).indices
            kept[:, row].scatter_(-1, order[:, : math.ceil((1 - alpha) * visible)], True)
    elif selector == "topp":
        masses, order = scores.sort(dim=-1, stable=True)
        reached = ~(masses.cumsum(-1) < alpha * masses.sum(-1, keepdim=True))
        kept = torch.zeros_like(reached).scatter_(-1, order, reached)
    else:
        kept = ~(scores < scores.amax(-1, keepdim=True) + log_alpha)
    kept = kept | (key_block < sink_blocks) | (query_block - key_block < window_blocks)
    kept = kept | (query_block >= first_block + tiles - dense_tail_blocks)
    return kept & (key_block <= query_block)


def row_attention(
    queries: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    block_size: int,
    scale: float,
    *,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    mean_blocks: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Exact causal attention over the kept blocks: [Hq, R, D] and [Hkv, S, D] -> [Hq, R, D] in ``dtype``.

    Args:
        queries: [Hq, R, D].
        positions: int64 [R], rising by one; query r stands at key ``positions[r]``.
        keys: [Hkv, S, D].
        values: [Hkv, S, D].
        kept: bool [Hq, M, N].
        block_size: Tokens per block.
        scale: Multiplies the dot product.
        sliding_window: Tokens; a query sees itself and the keys up to ``sliding_window - 1`` tokens before it.
        sinks: [Hq]; a logit per head that takes part in the softmax and has no value.
        mean_blocks: The blocks before the query's own, counted back from it, are averaged in runs of so many, and each token
            of a dropped block enters the softmax as its run's mean key, with the mean value. At 1 that is FlashPrefill V2;
            None leaves dropped blocks out.
        dtype: The precision of the computation.
    """
    group = queries.shape[0] // keys.shape[0]
    key_position = torch.arange(keys.shape[1], device=queries.device)
    first_block = int(positions[0]) // block_size
    if mean_blocks is not None:
        key_means, value_means = (run_means(pooled_keys(tensor, block_size), mean_blocks) for tensor in (keys, values))
    outputs = []
    for head, query in enumerate(queries):
        key, value = keys[head // group].to(dtype), values[head // group].to(dtype)
        blocks = []
        for block, mask in enumerate(kept[head]):
            rows = positions // block_size == first_block + block
            if not rows.any():
                continue
            distance = positions[rows, None] - key_position
            seen = mask.repeat_interleave(block_size)[: len(key)] & (distance >= 0)
            if sliding_window is not None:
                seen &= distance < sliding_window
            logits = [(query[rows].to(dtype) @ key.T * scale).masked_fill(~seen, -math.inf)]
            # Weight 0 times a NaN in a block that was dropped would still be NaN.
            columns = [value.masked_fill(~seen.any(0)[:, None], 0.0)]
            for end in range(first_block + block, 0, -mean_blocks) if mean_blocks is not None else ():
                dropped = int((~mask[max(0, end - mean_blocks) : end]).sum())
                if dropped:
                    mean_logit = query[rows].to(dtype) @ key_means[head // group, end - 1].to(dtype) * scale
                    logits.append(mean_logit[:, None] + math.log(dropped * block_size))
                    columns.append(value_means[head // group, end - 1].to(dtype)[None])
            if sinks is not None:
                logits.append(sinks[head].to(dtype).expand(len(logits[0]), 1))
                columns.append(value.new_zeros(1, value.shape[-1]))
            blocks.append(torch.cat(logits, 1).softmax(-1) @ torch.cat(columns))
        outputs.append(torch.cat(blocks))
    return torch.stack(outputs)


def select_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: PrefillGeometry,
    *,
    selector: str,
    pool_size: int,
    query_stride: int,
    scale: float,
    alpha: float,
    sink_blocks: int,
    window_blocks: int,
    dense_tail_blocks: int,
    dtype: torch.dtype = torch.float32,
) -> BlockIndex:
    """The selection for a whole batch: query [B, Hq, Sq, D], key [B, Hkv, Skv, D] -> BlockIndex."""
    kept = torch.zeros(
        geometry.batch,
        query.shape[1],
        geometry.query_blocks,
        geometry.key_blocks,
        dtype=torch.bool,
        device=query.device,
    )
    block_size = geometry.block_size
    for row, span in enumerate(geometry.row_spans()):
        if span.query_end <= span.query_begin:
            continue
        queries, positions = _row_queries(query[row], span, geometry)
        keys = key[row, :, span.start : span.start + span.key_end]
        first_block = span.query_begin // block_size
        if selector == "flashprefill":
            means = pooled_keys(keys, pool_size)
            scores = block_energies(queries, positions, means, span.key_end, block_size, scale, dtype)
        else:
            probed = probe_logits(queries, positions, keys, pool_size, query_stride, block_size, scale, dtype)
            scores = PROBE_SCORES[selector](probed, first_block, block_size, pool_size)
        row_kept = kept_blocks(
            scores,
            first_block,
            selector=selector,
            alpha=alpha,
            sink_blocks=sink_blocks,
            window_blocks=window_blocks,
            dense_tail_blocks=dense_tail_blocks,
        )
        kept[row, :, : row_kept.shape[1], : row_kept.shape[2]] = row_kept
    return BlockIndex.from_mask(kept, geometry)


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: BlockIndex,
    *,
    scale: float,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    mean_blocks: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Exact attention over an index of the whole call -> [B, Hq, Sq, D] in ``dtype``; rows of padding are zeros."""
    geometry, kept = index.geometry, index.to_mask()
    options = {"sliding_window": sliding_window, "sinks": sinks, "mean_blocks": mean_blocks, "dtype": dtype}
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=dtype, device=query.device)
    for row, span in enumerate(geometry.row_spans()):
        if span.query_end <= span.query_begin:
            continue
        queries, positions = _row_queries(query[row], span, geometry)
        keys, values = (tensor[row, :, span.start : span.start + span.key_end] for tensor in (key, value))
        first = span.start + span.query_begin - geometry.query_offset
        output[row, :, first : first + queries.shape[1]] = row_attention(
            queries, positions, keys, values, kept[row], geometry.block_size, scale, **options
        )
    return output


def _row_queries(query: torch.Tensor, span, geometry: PrefillGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's valid queries [Hq, R, D] and their positions [R]."""
    first = span.start + span.query_begin - geometry.query_offset
    positions = torch.arange(span.query_begin, span.query_end, device=query.device)
    return query[:, first : first + len(positions)], positions
