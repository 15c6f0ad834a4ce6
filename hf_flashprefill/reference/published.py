"""Block scores of the published rule (arXiv 2603.06199): energies of block means."""

from __future__ import annotations

import math

import torch


def pooled_keys(keys: torch.Tensor, pool_size: int) -> torch.Tensor:
    """Mean of every ``pool_size`` keys: [Hkv, S, D] -> [Hkv, P, D] in the keys' dtype; a partial pool divides by its count.

    A pool with an infinite key becomes NaN, because the sign of its products says nothing of other queries'.
    """
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    means = [pool.to(wide).mean(dim=1) for pool in keys.split(pool_size, dim=1)]
    pooled = torch.stack(means, dim=1).to(keys.dtype)
    return pooled.masked_fill(~pooled.isfinite(), math.nan)


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
