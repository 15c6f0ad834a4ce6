"""Pooling and block selection with batched matrix products."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ...block_index import BlockIndex
from ...config import SORTING_SELECTORS
from ...geometry import PrefillGeometry
from ...probe_constants import CENTRE_LEVELS, KEY_LEVELS, MEAN_WEIGHT, NORMALISER_GROUP, QUERY_LEVELS, SMALLEST_STEP

# Logits held at once: 8 MiB of float32 stay in a CPU's caches, and few of a part's query blocks end before its last. At 16K
# tokens on two cores (8 query heads, 2 key-value heads, head dim 64) the share probe took 44 ms, with 64 MiB 94 ms.
LOGITS_AT_ONCE = 1 << 21

# Query blocks, a number of key blocks, the logits of both, and of queries and blocks' means; what _masked_logits yields.
LogitParts = Iterator[tuple[slice, int, torch.Tensor, torch.Tensor | None]]


def gather_positions(tensor: torch.Tensor, first: torch.Tensor, count: int, low: int, high: torch.Tensor) -> torch.Tensor:
    """Rows ``first[b] .. first[b] + count`` of [B, H, S, D] as [B, H, count, D]; zeros outside ``low[b] <= row < high[b]``."""
    rows = first[:, None] + torch.arange(count, device=tensor.device)
    valid = (rows >= low) & (rows < high[:, None])
    rows = rows.clamp(0, max(tensor.shape[2] - 1, 0))
    taken = torch.take_along_dim(tensor, rows[:, None, :, None], dim=2)
    return taken.masked_fill(~valid[:, None, :, None], 0)


def blocked_keys(tensor: torch.Tensor, geometry: PrefillGeometry) -> torch.Tensor:
    """Keys or values [B, Hkv, Skv, D] on each row's block grid: [B, Hkv, N, block_size, D], zeros after the row's end."""
    padded = geometry.key_blocks * geometry.block_size
    if geometry.valid_ranges is None:
        rows = F.pad(tensor, (0, 0, 0, padded - geometry.kv_len)) if padded != geometry.kv_len else tensor
    else:
        span = geometry.spans(tensor.device)
        rows = gather_positions(tensor, span.start, padded, 0, span.start + span.key_end)
    return rows.unflatten(2, (geometry.key_blocks, geometry.block_size))


def blocked_queries(query: torch.Tensor, geometry: PrefillGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries on the block grid, [B, Hq, M, block_size, D] with zeros in unused rows, and their positions [B, M, block_size].

    Positions of unused rows are -1.
    """
    count = geometry.query_blocks * geometry.block_size
    span = geometry.spans(query.device)
    grid = span.query_begin // geometry.block_size * geometry.block_size
    positions = grid[:, None] + torch.arange(count, device=query.device)
    used = (positions >= span.query_begin[:, None]) & (positions < span.query_end[:, None])
    first = grid + span.start - geometry.query_offset
    if count == geometry.query_len and geometry.valid_ranges is None and geometry.query_offset % geometry.block_size == 0:
        rows = query
    else:
        rows = gather_positions(query, first, count, 0, first + count).masked_fill(~used[:, None, :, None], 0)
    shape = (geometry.query_blocks, geometry.block_size)
    return rows.unflatten(2, shape), positions.masked_fill(~used, -1).unflatten(1, shape)


def pooled_together(block_size: int, pool_size: int) -> int:
    """Tokens of which multiples may be pooled apart: a block, as pooled keys are in order."""
    return block_size


def tokens_per_row(block_size: int, pool_size: int) -> tuple[int, ...]:
    """Tokens that a row of each tensor of ``pool_keys`` is made of."""
    return (block_size,) if pool_size == block_size else (pool_size, block_size)


def pool_keys(key: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> tuple[torch.Tensor, ...]:
    """What ``select_blocks`` needs of the keys [B, Hkv, Skv, D]: the means of ``pool_size`` keys each, summed in float32.

    With ``pool_size`` of a whole block they are [B, Hkv, N, D] in the keys' dtype; otherwise [B, Hkv, P, D] in float32,
    integers times their block's step as reference.integer_keys makes them, and so are blocks' means [B, Hkv, N, D].
    """
    return _pools_of_sums(_pool_sums(key, geometry, pool_size), geometry, pool_size, key.dtype)


def pool_keys_and_values(
    key: torch.Tensor, value: torch.Tensor, geometry: PrefillGeometry, pool_size: int
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """``pool_keys`` with ``pool_size``, and the means of whole blocks of keys and of values."""
    sums, block_size = _pool_sums(key, geometry, pool_size), geometry.block_size
    key_blocks = _means_in(key.dtype, _means(_block_sums(sums, geometry), geometry, block_size))
    (value_blocks,) = pool_keys(value, geometry, block_size)
    return _pools_of_sums(sums, geometry, pool_size, key.dtype), key_blocks, value_blocks


def _pool_sums(key: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> torch.Tensor:
    """Sums of ``pool_size`` keys each, float32 [B, Hkv, P, D]."""
    return blocked_keys(key, geometry).flatten(2, 3).unflatten(2, (-1, pool_size)).sum(3, dtype=torch.float32)


def _block_sums(sums: torch.Tensor, geometry: PrefillGeometry) -> torch.Tensor:
    """Sums of pools [B, Hkv, P, D] added up by block: [B, Hkv, N, D]."""
    return sums.unflatten(2, (geometry.key_blocks, -1)).sum(3)


def _means(sums: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> torch.Tensor:
    """Means of sums of ``pool_size`` keys each [B, Hkv, P, D]; what lies after a row's end does not count."""
    starts = torch.arange(sums.shape[2], device=sums.device) * pool_size
    count = (geometry.spans(sums.device).key_end[:, None] - starts).clamp(1, pool_size)
    return sums / count[:, None, :, None]


def _means_in(dtype: torch.dtype, means: torch.Tensor) -> torch.Tensor:
    """Means as ``dtype``. As reference.pooled_keys: an infinite key must not hide behind the sign of its products."""
    means = means.to(dtype)
    return means.masked_fill(~means.isfinite(), math.nan)


def _pools_of_sums(
    sums: torch.Tensor, geometry: PrefillGeometry, pool_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """What ``pool_keys`` gives, of sums of ``pool_size`` keys each [B, Hkv, P, D]."""
    pools, per_block = _means(sums, geometry, pool_size), geometry.block_size // pool_size
    if per_block == 1:
        return (_means_in(dtype, pools),)
    centres = _means(_block_sums(sums, geometry), geometry, geometry.block_size)[:, :, :, None]
    pools = pools.unflatten(2, (geometry.key_blocks, per_block))
    # What begins after the row's end is no pooled key, and must not make its block's step larger.
    starts = torch.arange(sums.shape[2], device=sums.device) * pool_size
    is_pool = (starts < geometry.spans(sums.device).key_end[:, None]).view(len(pools), 1, -1, per_block, 1)
    steps = (pools - centres).masked_fill_(~is_pool, 0.0).abs_().amax((3, 4), keepdim=True) / KEY_LEVELS
    steps = torch.maximum(steps, centres.abs().amax(4, keepdim=True) / CENTRE_LEVELS).clamp_(min=SMALLEST_STEP)
    steps = steps.masked_fill_(~steps.isfinite(), math.nan)
    whole = (centres / steps).round_()
    return (pools / steps).sub_(whole).round_().add_(whole).mul_(steps).flatten(2, 3), whole.mul_(steps).squeeze(3)


def select_blocks(
    query: torch.Tensor,
    pooled: tuple[torch.Tensor, ...],
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
    first_query_block: int,
    query_blocks: int,
) -> BlockIndex:
    """Lists for ``query_blocks`` query blocks from ``first_query_block`` on; the rule is reference.select_blocks.

    ``pooled`` comes from ``pool_keys`` with the same ``pool_size``.
    """
    pools = pooled[0]
    device, (batch, heads) = query.device, query.shape[:2]
    chosen = slice(first_query_block, first_query_block + query_blocks)
    rows, positions = blocked_queries(query, geometry)
    rows, positions = rows[:, :, chosen], positions[:, None, chosen]
    if query_stride > 1:
        rows, positions = _longest_queries(rows, positions, query_stride)
    rows = rows.float()
    if selector != "flashprefill":
        rows = _integer_queries(rows)
    span = geometry.spans(device)
    last_key = torch.arange(1, pools.shape[2] + 1, device=device) * pool_size
    last_key = torch.minimum(last_key, span.key_end[:, None]) - 1
    # What begins after the row's end is seen by nobody.
    last_key = last_key.masked_fill(last_key < torch.arange(pools.shape[2], device=device) * pool_size, geometry.kv_len)
    score = SCORES.get(selector, _block_shares)
    parts = _masked_logits(rows, positions, pooled, last_key, geometry, first_query_block, scale)
    scores = score(parts, (batch, heads, query_blocks, geometry.key_blocks), device)

    own = span.query_begin[:, None] // geometry.block_size + torch.arange(chosen.start, chosen.stop, device=device)
    tail = torch.div(span.query_end + geometry.block_size - 1, geometry.block_size, rounding_mode="floor")
    query_block = own[:, None, :, None]
    key_block = torch.arange(geometry.key_blocks, device=device)
    visible = geometry.visible_counts(device)[:, None, chosen, None]
    kept = _passing(scores, selector, alpha, visible)
    kept |= (key_block < sink_blocks) | (query_block - key_block < window_blocks)
    kept |= query_block >= (tail - dense_tail_blocks)[:, None, None, None]
    kept &= key_block < visible
    return BlockIndex.from_mask(kept.expand(batch, heads, -1, -1), geometry, first_query_block)


def _passing(scores: torch.Tensor, selector: str, alpha: float, visible: torch.Tensor) -> torch.Tensor:
    """Blocks that the selector keeps by their scores [B, Hq, T, N], of which ``visible`` [B, 1, T, 1] are before the query.

    What is NaN is kept, so that attention shows it.
    """
    log_alpha = math.log2(alpha) if alpha > 0 else -math.inf
    if selector in ("share", "blend"):
        return ~(scores < log_alpha)
    if selector not in SORTING_SELECTORS:
        return ~(scores < scores.amax(-1, keepdim=True) + log_alpha)
    place = torch.arange(scores.shape[-1], device=scores.device)
    if selector == "topk":
        # What is not visible sorts last, behind what is visible and has no score.
        scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(place >= visible, -math.inf)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        passing = place < ((1 - alpha) * visible.double()).ceil()
    else:
        masses, order = scores.sort(dim=-1, stable=True)
        passing = ~(masses.cumsum(-1) < alpha * masses.sum(-1, keepdim=True))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, passing.expand_as(order)) | scores.isnan()


def _longest_queries(rows: torch.Tensor, positions: torch.Tensor, query_stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The longest real query of every run of ``query_stride``, as reference.longest_queries.

    Rows [B, Hq, T, block_size, D] -> [B, Hq, T, runs, D], and positions [B, 1, T, block_size] -> [B, Hq, T, runs].
    """
    squares = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).square_().nan_to_num_(nan=math.inf, posinf=math.inf)
    # Eight significant bits, as reference.probe.comparable_lengths.
    lengths = (squares.view(torch.int32) + 0x8000) >> 16
    runs = lengths.masked_fill_(positions < 0, -1).unflatten(-1, (-1, query_stride))
    place = torch.arange(rows.shape[3], device=rows.device).unflatten(0, (-1, query_stride))
    place = torch.where(runs == runs.amax(-1, keepdim=True), place, -1).amax(-1)
    return torch.take_along_dim(rows, place[..., None], dim=3), torch.take_along_dim(positions, place, dim=3)


def _integer_queries(rows: torch.Tensor) -> torch.Tensor:
    """Float32 queries [..., D] as integers times their steps, as reference.integer_queries."""
    steps = (rows.abs().amax(-1, keepdim=True) / QUERY_LEVELS).clamp_(min=SMALLEST_STEP)
    steps.masked_fill_(~steps.isfinite(), math.nan)
    return (rows / steps).round_().mul_(steps)


def _block_energies(parts: LogitParts, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """log2 energies of each block, float32 ``shape`` = [B, Hq, T, N]; ``parts`` are of ``_masked_logits`` with block means."""
    energies = torch.full(shape, -math.inf, dtype=torch.float32, device=device)
    for part, blocks, logits, _ in parts:
        logits = logits.squeeze(-1)
        largest = logits.amax(3, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        energies[:, :, part, :blocks] = logits.sub_(largest).exp2_().sum(3).log2_().add_(largest.squeeze(3))
    return energies


def _block_shares(parts: LogitParts, shape: tuple[int, ...], device: torch.device, is_blend: bool = False) -> torch.Tensor:
    """log2 of the largest share that any probing query gives each block, or reference.probe.block_blends; arguments as
    ``_block_energies``."""
    scores = torch.full(shape, -math.inf, dtype=torch.float32, device=device)
    for part, blocks, logits, centre_logits in parts:
        per_block = logits.shape[-1]
        group = min(NORMALISER_GROUP, per_block)
        groups = logits.unflatten(-1, (-1, group)).amax(-1)
        peaks = groups.amax(-1)
        largest = peaks.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        shares = peaks - largest
        sums = groups.flatten(-2).sub_(largest).exp2_().sum(-1, keepdim=True)
        others = centre_logits.sub_(largest).exp2_().sum(-1, keepdim=True)
        sums += others * (per_block - per_block // group)
        # A query without keys votes for nothing: its sum is 0, and its peaks are -inf already.
        shares -= sums.clamp(min=1e-30).log2()
        best = shares.amax(3)
        if is_blend:
            voting = sums != 0
            mean = shares.masked_fill_(~voting, 0.0).sum(3) / voting.sum(3).clamp(min=1) + math.log2(MEAN_WEIGHT)
            best = torch.maximum(best, mean.masked_fill_(~voting.any(3), -math.inf))
        scores[:, :, part, :blocks] = best
    return scores


def _block_masses(parts: LogitParts, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Sums over queries and pooled keys of the shares in each block; arguments as ``_block_energies``."""
    masses = torch.zeros(shape, dtype=torch.float32, device=device)
    for part, blocks, logits, _ in parts:
        # A query without keys has no mass to give.
        empty = logits.isneginf().all(-1, keepdim=True).all(-2, keepdim=True)
        shares = logits.mul_(math.log(2)).flatten(-2).softmax(-1).view_as(logits).masked_fill_(empty, 0.0)
        masses[:, :, part, :blocks] = shares.sum((3, 5))
    return masses


# Of selectors other than the largest share.
SCORES = {
    "flashprefill": _block_energies,
    "topp": _block_masses,
    "blend": functools.partial(_block_shares, is_blend=True),
}


def _masked_logits(
    rows: torch.Tensor,
    positions: torch.Tensor,
    pooled: tuple[torch.Tensor, ...],
    last_key: torch.Tensor,
    geometry: PrefillGeometry,
    first_query_block: int,
    scale: float,
) -> LogitParts:
    """Base-2 logits of blocked queries [B, Hq, T, R, D] and pooled keys, some query blocks at a time.

    Args:
        rows: The queries, float32.
        positions: [B, Hq or 1, T, R], theirs; -1 for a row that is no query.
        pooled: The keys, as ``pool_keys`` gives them: [B, Hkv, P, D] and, if they are not blocks, [B, Hkv, N, D].
        last_key: [B, P], position of each pool's last token.
        geometry: Of the call.
        first_query_block: The number of the first of the T query blocks in the call.
        scale: Multiplies query-key products.

    Yields:
        Which query blocks; the n key blocks that the last of them sees at most; and float32 logits [B, Hq, t, R, n, P / N],
        -inf where a query does not see all of a pool; and those of blocks' means [B, Hq, t, R, n], -inf where it does not see
        all of a block or the block is not full.
    """
    batch, heads, tiles, count, _ = rows.shape
    key_heads, pools = pooled[0].shape[1:3]
    keys, *centres = (part.float().transpose(2, 3) for part in pooled)
    block_end = torch.arange(1, geometry.key_blocks + 1, device=rows.device) * geometry.block_size
    per_block = pools // geometry.key_blocks
    step = max(1, LOGITS_AT_ONCE // max(1, batch * heads * count * pools))
    for first in range(0, tiles, step):
        part = slice(first, min(first + step, tiles))
        blocks = geometry.visible_blocks_bound(first_query_block + part.stop - 1)
        certain = min(geometry.certain_blocks(first_query_block + tile) for tile in range(part.start, part.stop))
        seen_pools, certain_pools = blocks * per_block, certain * per_block
        grouped = rows[:, :, part].mul(scale * math.log2(math.e)).unflatten(1, (key_heads, -1))
        grouped = grouped.flatten(2, 4)
        logits = torch.matmul(grouped, keys[..., :seen_pools]).view(batch, heads, -1, count, seen_pools)
        centre_logits = None
        if centres:
            centre_logits = torch.matmul(grouped, centres[0][..., :blocks]).view(batch, heads, -1, count, blocks)
            centre_logits.masked_fill_(positions[:, :, part, :, None] < block_end[:blocks] - 1, -math.inf)
        doubtful = slice(certain_pools, seen_pools)
        unseen = positions[:, :, part, :, None] < last_key[:, None, None, None, doubtful]
        logits[..., doubtful].masked_fill_(unseen, -math.inf)
        yield part, blocks, logits.unflatten(-1, (blocks, -1)), centre_logits
