"""The operator as a torch.library custom op, which torch.compile keeps whole instead of tracing through it.

``torch.ops.hf_flashprefill.sparse_prefill`` takes the settings as JSON, because a graph holds no Python objects, and
returns the counts of kept and visible blocks as tensors beside the output, because a graph cannot call back.
"""

from __future__ import annotations

import functools
import json

import torch

from .audit import start_audit
from .config import FlashPrefillConfig
from .functional import flash_prefill_attention


def config_to_json(config: FlashPrefillConfig) -> str:
    """The settings as the op takes them."""
    return json.dumps(config.to_dict(), sort_keys=True)


@functools.cache
def _config_from_json(text: str) -> FlashPrefillConfig:
    return FlashPrefillConfig(**json.loads(text))


@torch.library.custom_op("hf_flashprefill::sparse_prefill", mutates_args=())
def sparse_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid_ranges: torch.Tensor | None,
    config: str,
    scale: float,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``flash_prefill_attention`` of a call whose query ends where the keys end.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        value: [B, Hkv, Skv, D].
        valid_ranges: int32 [B, 2], each row's first valid position and the one after its last; None if nothing is padding.
        config: ``config_to_json(settings)``.
        scale: Multiplies query-key products.
        sliding_window: Tokens that a query sees, its own included; None if all before it.
        sinks: [Hq], the logit of each head's softmax column without a value; None if there is none.

    Returns:
        Output [B, Sq, Hq, D], contiguous; kept key blocks of each head, int64 [Hq]; visible key blocks of one head, int64 [];
        ``RowAudit.dropped``, float32 [3], zeros without an audit.
    """
    kept = torch.zeros(query.shape[1], dtype=torch.int64, device=query.device)
    visible = torch.zeros((), dtype=torch.int64, device=query.device)

    settings = _config_from_json(config)
    audit = start_audit(settings, query, key, scale, sliding_window, sinks)

    def count(index):
        if audit is not None:
            audit.add_index(index)
        kept.add_(index.counts.sum((0, 2), dtype=torch.int64))
        visible.add_(index.visible_total())

    output = flash_prefill_attention(
        query,
        key,
        value,
        config=settings,
        scale=scale,
        valid_ranges=valid_ranges,
        sliding_window=sliding_window,
        sinks=sinks,
        on_index=count,
    )
    dropped = torch.zeros(3, device=query.device) if audit is None else audit.dropped()
    return output.transpose(1, 2).contiguous(), kept, visible, dropped


@sparse_prefill.register_fake
def _(query, key, value, valid_ranges, config, scale, sliding_window=None, sinks=None):
    batch, heads, query_len, head_dim = query.shape
    return (
        query.new_empty(batch, query_len, heads, head_dim),
        query.new_empty(heads, dtype=torch.int64),
        query.new_empty((), dtype=torch.int64),
        query.new_empty(3, dtype=torch.float32),
    )
