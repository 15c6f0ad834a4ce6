"""What the attention layers of a model are given, and what of its attention the kept blocks hold: for looking closely.

Everything here computes whole attention maps of one head, so it is meant for prompts of some thousand tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel

from hf_flashprefill import BlockIndex


class AttentionInput(NamedTuple):
    """Query [1, Hq, S, D], key and value [1, Hkv, S, D] of one layer, with positions applied."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@torch.no_grad()
def attention_inputs(model: PreTrainedModel, ids: torch.Tensor) -> list[AttentionInput]:
    """The inputs of every attention layer, in the order of their calls, for one prompt of token ids [S].

    The model may be patched or not; its outputs are as usual.

    Raises:
        ValueError: The model's attention is not in transformers' registry, as eager is not.
    """
    name = model.config.get_text_config(decoder=True)._attn_implementation
    if name not in AttentionInterface():
        raise ValueError(f"the model's attention must be a registered one such as sdpa, got {name!r}")
    attend = AttentionInterface()[name]
    seen: list[AttentionInput] = []

    def recording(module, query, key, value, *args, **kwargs):
        seen.append(AttentionInput(query, key, value))
        return attend(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(name, recording)
    try:
        model(ids[None].to(model.device), logits_to_keep=1)
    finally:
        AttentionInterface.register(name, attend)
    return seen


@torch.no_grad()
def attention_map(query: torch.Tensor, key: torch.Tensor, head: int) -> torch.Tensor:
    """Causal attention probabilities [S, S] of one query head of a whole prompt, in float32."""
    group = query.shape[1] // key.shape[1]
    logits = query[0, head].float() @ key[0, head // group].float().T * query.shape[-1] ** -0.5
    ahead = torch.ones(logits.shape, dtype=torch.bool, device=logits.device).triu(1)
    return logits.masked_fill_(ahead, float("-inf")).softmax(-1)


def kept_mass(index: BlockIndex, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Mean share of the attention of a query that falls on kept blocks, per head [Hq], for a whole unpadded prompt."""
    block, length = index.geometry.block_size, query.shape[2]
    kept = index.to_mask()[0]
    masses = []
    for head in range(query.shape[1]):
        tokens = kept[head].repeat_interleave(block, 0)[:length].repeat_interleave(block, 1)[:, :length]
        masses.append((attention_map(query, key, head) * tokens).sum(-1).mean())
    return torch.stack(masses)
