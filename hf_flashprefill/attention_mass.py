"""Exact attention of a few query rows of a prefill call, and how much of it falls on the kept blocks.

Everything here is linear in the number of keys and never waits for the device, so that it can run in production.
"""

from __future__ import annotations

import torch

from .block_index import BlockIndex
from .geometry import PrefillGeometry

# Numbers held at once, 256 MiB of float32: the logits of 16 rows of 32 heads at 128K tokens. Longer prompts take their heads
# in turn.
LOGITS_AT_ONCE = 1 << 26

GOLDEN_RATIO = 0.6180339887498949


def spread_positions(geometry: PrefillGeometry, rows: int, device: torch.device) -> torch.Tensor:
    """Positions of ``rows`` queries spread over each batch row's valid ones, int64 [B, rows], counted as RowSpan does.

    One lies in each ``rows``-th part; where in it follows a golden-ratio sequence. Equal steps would always hit the same
    place in a block, and there the queries that probe the keys.
    """
    span = geometry.spans(device)
    length = (span.query_end - span.query_begin).clamp(min=0)[:, None]
    # Made where it is used, because a copy from the host would wait for the device.
    part = torch.arange(rows, dtype=torch.float32, device=device)
    fraction = (part + (part + 1) * GOLDEN_RATIO % 1) / rows
    # In integers: a float32 cannot hold every position of a long prompt.
    steps = (fraction * (1 << 20)).long().clamp(max=(1 << 20) - 1)
    return span.query_begin[:, None] + (length * steps >> 20)


def exact_shares(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: PrefillGeometry,
    positions: torch.Tensor,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What share of each sampled query's exact attention falls on each key block.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        geometry: Of the call.
        positions: int64 [B, R], positions of the sampled queries, counted from the batch row's first valid token.
        scale: Multiplies query-key products.
        sinks: [Hq], logits of a column without a value; its share is nobody's.

    Returns:
        float32 [B, Hq, R, N]; sums over N are 1 without sinks. Zeros in batch rows without valid queries.
    """
    span = geometry.spans(query.device)
    rows = (positions + span.start[:, None] - geometry.query_offset).clamp(0, geometry.query_len - 1)
    queries = torch.take_along_dim(query, rows[:, None, :, None], dim=2).float() * scale
    queries = queries.unflatten(1, (key.shape[1], -1))
    token = torch.arange(geometry.key_blocks * geometry.block_size, device=query.device)
    unseen = (token > positions[..., None]) | (positions >= span.query_end[:, None])[..., None]
    step = max(1, LOGITS_AT_ONCE // (unseen.numel() * queries.shape[2]))
    parts = []
    for heads in range(0, key.shape[1], step):
        chosen = queries[:, heads : heads + step]
        # [B, h, G * R, D] x [B, h, D, Skv]: each key-value head is read once for its group of query heads.
        logits = chosen.flatten(2, 3) @ key[:, heads : heads + step].float().transpose(2, 3)
        logits = _on_block_grid(logits, geometry, token).unflatten(2, chosen.shape[2:4])
        logits = logits.flatten(1, 2).masked_fill_(unseen[:, None], float("-inf"))
        # Logits are most of the work's memory: with logsumexp and exp in place of softmax 16 rows of 32K tokens took 145 ms
        # instead of 72 (two CPU cores, 8 query heads, 2 key-value heads, head_dim 64).
        shares = logits.softmax(-1).unflatten(-1, (geometry.key_blocks, geometry.block_size)).sum(-1)
        if sinks is not None:
            column = sinks.float().unflatten(0, (key.shape[1], -1))[heads : heads + step].flatten()
            shares *= (logits.logsumexp(-1) - column[:, None]).sigmoid()[..., None]
        parts.append(shares)
    # A query that sees nothing has shares of NaN.
    return torch.cat(parts, 1).masked_fill_(unseen.all(-1)[:, None, :, None], 0)


def kept_shares(shares: torch.Tensor, positions: torch.Tensor, index: BlockIndex) -> torch.Tensor:
    """The part of ``exact_shares`` on kept blocks, [B, Hq, R]; 0 for queries of blocks that ``index`` does not cover."""
    block_size = index.geometry.block_size
    first = index.geometry.spans(positions.device).query_begin // block_size + index.first_query_block
    tile = torch.div(positions, block_size, rounding_mode="floor") - first[:, None]
    covered = (tile >= 0) & (tile < index.query_blocks)
    tile = tile.clamp(0, index.query_blocks - 1)[:, None].expand(shares.shape[:3])
    counts = index.counts.gather(2, tile).masked_fill(~covered[:, None], 0)
    lists = torch.take_along_dim(index.indices, tile[..., None], dim=2)
    used = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
    return shares.gather(-1, lists.long().where(used, 0)).masked_fill(~used, 0).sum(-1)


def _on_block_grid(logits: torch.Tensor, geometry: PrefillGeometry, token: torch.Tensor) -> torch.Tensor:
    """Logits [B, h, rows, Skv] by the position from each batch row's first valid token, [B, h, rows, N * block_size]."""
    if geometry.valid_ranges is None:
        # Padding by nothing would copy.
        missing = len(token) - geometry.kv_len
        return torch.nn.functional.pad(logits, (0, missing)) if missing else logits
    buffer = geometry.spans(logits.device).start[:, None] + token
    return torch.take_along_dim(logits, buffer.clamp(max=geometry.kv_len - 1)[:, None, None], dim=3)
