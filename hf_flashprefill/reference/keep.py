"""From scores to kept blocks, by every selector."""

from __future__ import annotations

import math

import torch


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
