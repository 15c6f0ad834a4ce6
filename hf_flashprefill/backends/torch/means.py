"""What stands for dropped blocks: means of runs of blocks, and how many dropped tokens each of them stands for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...block_index import BlockIndex


def run_means(key_means: torch.Tensor, value_means: torch.Tensor, mean_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of runs of blocks, of keys and of values, in the order in which query blocks read them.

    Row [b, h, r, k] is the mean of blocks k * n + r - n + 1 to k * n + r, n = ``mean_blocks``, as far as there are any. The
    query block with number J reads r = (J - 1) % n: its first ceil(J / n) rows cover each block before J once.

    Args:
        key_means: Of whole blocks, from ``pool_keys_and_values``: [B, Hkv, N, D].
        value_means: The same of values.
        mean_blocks: Blocks n per mean.

    Returns:
        Of keys and of values [B, Hkv, n, ceil(N / n), D], in their dtype. Rows that end after block N - 1 mean nothing.
    """
    return _run_means(key_means, mean_blocks), _run_means(value_means, mean_blocks)


def _run_means(means: torch.Tensor, mean_blocks: int) -> torch.Tensor:
    blocks = means.shape[2]
    sums = F.pad(means.float(), (0, 0, mean_blocks - 1, 0)).unfold(2, mean_blocks, 1).sum(-1)
    counts = torch.arange(1, blocks + 1, device=means.device).clamp(max=mean_blocks)
    runs = F.pad((sums / counts[:, None]).to(means.dtype), (0, 0, 0, -blocks % mean_blocks))
    return runs.unflatten(2, (-1, mean_blocks)).transpose(2, 3).contiguous()


def dropped_tokens(index: BlockIndex, mean_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which set r of ``run_means`` each list reads, int64 [B, Hq, T], and how many dropped tokens each mean stands for there,
    int64 [B, Hq, T, ceil(N / n)]."""
    mask, geometry = index.to_mask(), index.geometry
    own = (index.visible_counts()[:, None] - 1).expand(index.counts.shape)
    mean_set = (own - 1) % mean_blocks
    block = torch.arange(geometry.key_blocks, device=mask.device)
    columns = -(-geometry.key_blocks // mean_blocks)
    # A list ends with the query block's own number, and every block before that is wholly visible.
    dropped = ~mask & (block < own[..., None])
    column = ((block + mean_blocks - 1 - mean_set[..., None]) // mean_blocks).clamp(max=columns - 1)
    blocks = torch.zeros(*mask.shape[:3], columns, dtype=torch.int64, device=mask.device)
    return mean_set, blocks.scatter_add_(-1, column, dropped.long()) * geometry.block_size
