"""The specification: each stage of FlashPrefill (arXiv 2603.06199), and of the finer probe, in plain eager torch.

Stages work on one batch row whose padding has been cut away, so position 0 is the row's first token. They are written to
be read beside the paper, not to be fast. Where the published code and this text differ, on purpose: only real query rows
are scored, means are summed in float32, a partial last key block is visible to the row at its last real key, and scores
are sorted for none but the baselines "topk" and "topp".

Letters: Hq query heads, Hkv key-value heads, R queries, S keys, D head_dim, M query blocks, N key blocks, P pooled keys.
"""

from __future__ import annotations

import torch

from ..block_index import BlockIndex
from ..geometry import PrefillGeometry
from .attend import row_attention
from .keep import kept_blocks
from .probe import PROBE_SCORES, integer_keys, integer_queries, longest_queries, probe_logits
from .published import block_energies, pooled_keys

__all__ = [
    "PROBE_SCORES",
    "attend_blocks",
    "block_energies",
    "integer_keys",
    "integer_queries",
    "kept_blocks",
    "longest_queries",
    "pooled_keys",
    "probe_logits",
    "select_blocks",
]


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
