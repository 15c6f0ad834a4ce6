"""What the attention layers of a model are given, and what of its attention the kept blocks hold: for looking closely.

Everything here computes whole attention maps of one head, so it is meant for prompts of some thousand tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from hf_flashprefill import BlockIndex


class AttentionInput(NamedTuple):
    """Query [1, Hq, S, D], key and value [1, Hkv, S, D] of one layer, with positions applied."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@contextlib.contextmanager
def observed_attention(model: PreTrainedModel, observe: Callable[[nn.Module, AttentionInput, float], None]) -> Iterator[None]:
    """Inside, ``observe`` is called with each attention layer, its inputs and its scale, before the layer attends.

    The model may be patched or not; its outputs are as usual.

    Raises:
        ValueError: The model's attention is not in transformers' registry, as eager is not.
    """
    name = model.config.get_text_config(decoder=True)._attn_implementation
    if name not in AttentionInterface():
        raise ValueError(f"the model's attention must be a registered one such as sdpa, got {name!r}")
    attend = AttentionInterface()[name]

    def observing(module, query, key, value, *args, **kwargs):
        scale = kwargs.get("scaling")
        observe(module, AttentionInput(query, key, value), query.shape[-1] ** -0.5 if scale is None else scale)
        return attend(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(name, observing)
    try:
        yield
    finally:
        AttentionInterface.register(name, attend)


@torch.no_grad()
def attention_inputs(model: PreTrainedModel, ids: torch.Tensor) -> list[AttentionInput]:
    """The inputs of every attention layer, in the order of their calls, for one prompt of token ids [S].

    The model may be patched or not.

    Raises:
        ValueError: The model's attention is not in transformers' registry, as eager is not.
    """
    seen: list[AttentionInput] = []
    with observed_attention(model, lambda module, inputs, scale: seen.append(inputs)):
        model(ids[None].to(model.device), logits_to_keep=1)
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
