"""Exact attention over the kept blocks, with what stands for the dropped ones."""

from __future__ import annotations

import math

import torch

from .published import pooled_keys


def run_means(means: torch.Tensor, mean_blocks: int) -> torch.Tensor:
    """Row J is the mean of block means J - ``mean_blocks`` + 1 to J, as far back as there are any: [H, N, D] -> [H, N, D]."""
    ends = range(1, means.shape[1] + 1)
    runs = [means[:, max(0, end - mean_blocks) : end].float().mean(1) for end in ends]
    return torch.stack(runs, 1).to(means.dtype)


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
