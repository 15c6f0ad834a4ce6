"""Exact attention over listed blocks: lists of equal length are gathered together and handed to torch's own SDPA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Not what others put there later, which may know no mask, as SageAttention.
from torch.nn.functional import scaled_dot_product_attention

from ...block_index import BlockIndex
from ...geometry import PrefillGeometry
from .means import dropped_tokens
from .select import blocked_keys, blocked_queries

# Gathered keys and values per SDPA call, in numbers: 16 MiB of float32. On two CPU cores (8 query heads, 2 key-value heads,
# head dim 64) this was the fastest power of two at 4K, 8K and 16K tokens; a quarter and four times are 15 to 30 % slower.
GATHERED_AT_ONCE = 1 << 22
# What a column that stands for nothing adds to a float32 logit. A GPU multiplies float32 as sums of TF32 parts, and what
# minus infinity leaves behind its first part is NaN. Half precision is multiplied as it is.
NOTHING = -1e30


def new_output(query: torch.Tensor, geometry: PrefillGeometry) -> torch.Tensor:
    """For the results of queries [B, Hq, Sq, D]: as many numbers, a view of [B, Sq, Hq, D] memory. Zeros for queries outside
    their row's valid range, the others are to be written."""
    batch, heads, query_len, head_dim = query.shape
    fill = torch.empty if geometry.valid_ranges is None else torch.zeros
    return fill(batch, query_len, heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: BlockIndex,
    *,
    scale: float,
    output: torch.Tensor,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    means: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write the attention of the index's query blocks into ``output`` [B, Hq, Sq, Dv]; other rows are left alone.

    Lists are worked through in groups of equal length, so no gathered block is wasted. Only a list's last block, the
    query block's own, needs the causal mask. Sinks and the means of dropped blocks are further columns of the softmax. What
    is added to their logits stands in a channel of its own, where queries hold 1: as a mask it would be one per list, twice as
    many numbers as the gathered keys and values.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        value: [B, Hkv, Skv, Dv].
        index: Lists; with ``sliding_window`` those of ``BlockIndex.of_window``.
        scale: Multiplies query-key products.
        output: Written to.
        sliding_window: Tokens a query sees, itself counted.
        sinks: float32 [Hq], logits without a value.
        means: Key and value means of ``run_means``; dropped blocks take part through them.
    """
    geometry, block_size = index.geometry, index.geometry.block_size
    has_columns = means is not None or sinks is not None
    if has_columns and not 0.01 <= scale <= 100:
        # What the columns' channel holds is divided by the scale, and half precision has its limits.
        query, key, value, scale = query.float() * scale, key.float(), value.float(), 1.0
    tiles = slice(index.first_query_block, index.first_query_block + index.query_blocks)
    rows, positions = blocked_queries(query, geometry)
    rows, positions = rows[:, :, tiles], positions[:, tiles]
    (batch, heads), key_heads = query.shape[:2], key.shape[1]

    head = torch.arange(index.counts.numel(), device=query.device) // index.query_blocks
    key_head = head // heads * key_heads + head % heads // (heads // key_heads)
    extra = _further_columns(key, index, key_head, sinks, means, scale)
    # One channel is enough, but torch's fused attention on GPUs takes channels in eights.
    channels = 8 if query.is_cuda else 1
    if has_columns:
        rows, key, value = F.pad(rows, (0, channels), value=1), F.pad(key, (0, channels)), F.pad(value, (0, channels))
    # Blocks as rows of a matrix: index_select then copies whole blocks, three times as fast as indexing by tuples here.
    query_rows = rows.reshape(batch * heads * index.query_blocks, -1)
    key_rows, value_rows = (
        blocked_keys(tensor, geometry).reshape(batch * key_heads * geometry.key_blocks, -1) for tensor in (key, value)
    )
    lists, counts = index.indices.flatten(0, 2), index.counts.flatten()
    result = torch.zeros(len(counts), block_size * output.shape[-1], dtype=query.dtype, device=query.device)

    for length in counts.unique().tolist():
        if length == 0:
            continue
        bias = _causal_bias(length, block_size, sliding_window, query)
        bias = F.pad(bias, (0, sum(added.shape[1] for *_, added in extra)))
        step = max(1, GATHERED_AT_ONCE // (length * block_size * (key.shape[-1] + value.shape[-1])))
        for part in (counts == length).nonzero().flatten().split(step):
            blocks = (key_head[part, None] * geometry.key_blocks + lists[part, :length]).flatten()
            keys, values = (
                source.index_select(0, blocks).view(len(part), 1, length * block_size, -1) for source in (key_rows, value_rows)
            )
            queries = query_rows.index_select(0, part).view(len(part), 1, block_size, -1)
            for column_keys, column_values, source, column_added in extra:
                added = column_added[part][:, None, :, None]
                # A weight of zero would not undo a later block's NaN.
                is_used = added > NOTHING
                columns = F.pad(torch.cat([column_keys[source[part]].where(is_used, 0), added], 3), (0, channels - 1))
                keys = torch.cat([keys, columns], 2)
                values = torch.cat([values, F.pad(column_values[source[part]].where(is_used, 0), (0, channels))], 2)
            attended = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
            result.index_copy_(0, part, attended[..., : output.shape[-1]].flatten(1))

    result = result.view(batch, heads, index.query_blocks, block_size, -1)
    used = (positions >= 0).flatten(1)
    span = geometry.spans(query.device)
    if geometry.valid_ranges is None:
        first = positions.flatten(1)[0][used[0]]
        if len(first):
            begin = int(first[0]) - geometry.query_offset
            output[:, :, begin : begin + len(first)] = result.flatten(2, 3)[:, :, used[0]]
        return
    for row in range(geometry.batch):
        target = positions[row].flatten()[used[row]] + span.start[row] - geometry.query_offset
        output[row][:, target] = result[row].flatten(1, 2)[:, used[row]]


def _causal_bias(length: int, block_size: int, sliding_window: int | None, query: torch.Tensor) -> torch.Tensor:
    """0 where a query block sees a key of its list of ``length`` blocks, -inf elsewhere: [block_size, length * block_size].

    Only the last block cuts if there is no window. With one, the list's blocks are the last ones up to the query's own.
    """
    row = torch.arange(block_size, device=query.device)[:, None] + (length - 1) * block_size
    distance = row - torch.arange(length * block_size, device=query.device)
    seen = (distance >= 0) & (distance < (sliding_window or math.inf))
    return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -math.inf)


def _further_columns(
    key: torch.Tensor,
    index: BlockIndex,
    key_head: torch.Tensor,
    sinks: torch.Tensor | None,
    means: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Softmax columns beside the listed keys: sets of keys and values [sets, 1, C, D], the set that each list reads [lists],
    and what is added to the products of queries and keys before they are scaled [lists, C]. ``key_head`` [lists] counts over
    the batch."""
    columns, least = [], NOTHING if key.dtype == torch.float32 else -math.inf
    if means is not None:
        mean_blocks = means[0].shape[2]
        mean_set, tokens = dropped_tokens(index, mean_blocks)
        added = (tokens.float().log() / scale).to(key.dtype).clamp(min=least)
        source = key_head * mean_blocks + mean_set.flatten()
        columns.append((*(tensor.flatten(0, 2)[:, None] for tensor in means), source, added.flatten(0, 2)))
    if sinks is not None:
        nothing = key.new_zeros(key.shape[0] * key.shape[1], 1, 1, key.shape[-1])
        # A finite sink must not become infinite in half precision; it stays far above all logits of such queries and keys.
        most = torch.finfo(key.dtype).max
        added = sinks / scale
        added = added.where(sinks.isinf(), added.clamp(-most, most)).to(key.dtype).clamp(min=least)
        columns.append((nothing, nothing, key_head, added[None, :, None].expand(index.counts.shape).reshape(-1, 1)))
    return columns
