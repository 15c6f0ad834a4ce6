"""How surprised a model is by every token of a long prompt, without holding the logits of the whole prompt."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from eval import models

# Logits of this many entries at a time, 256 MiB in float32: 512 rows of a vocabulary of 128K.
LOGITS_AT_ONCE = 1 << 26


class TokenScores(NamedTuple):
    """Per token of a prompt, given all tokens before it.

    Attributes:
        nll: float32 [S] on the CPU, negative log-likelihood in nats.
        first_choice: bool [S] on the CPU, whether the token is the most likely one.
    """

    nll: torch.Tensor
    first_choice: torch.Tensor


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel,
    ids: torch.Tensor,
    past_key_values: Cache | None = None,
    last_hidden: torch.Tensor | None = None,
) -> TokenScores:
    """Score every token in one forward call of the model as it is, patched or not.

    Args:
        model: A causal language model whose logits are its output embedding of its last hidden state, up to the scales
            and the softcap that transformers' configs know.
        ids: int64 [S] on any device.
        past_key_values: Cache of what stands before ``ids``; it grows by S tokens. None if nothing does.
        last_hidden: Last hidden state [H] of the token before ``ids``, which predicts the first of them.

    Returns:
        Scores of all S tokens. Without ``last_hidden`` nothing predicts the first one: NaN and False.

    Raises:
        ValueError: The model computes its logits in another way, or they are not numbers.
    """
    hidden = hidden_states(model, ids, past_key_values)
    targets = ids.to(hidden.device)
    nll = torch.full((len(ids),), float("nan"))
    first_choice = torch.zeros(len(ids), dtype=torch.bool)
    first = 1
    if last_hidden is not None:
        hidden, first = torch.cat([last_hidden[None].to(hidden), hidden]), 0
    # Row i of hidden[:-1] predicts token first + i.
    for start, logits in _logits(model, hidden[:-1]):
        rows = slice(first + start, first + start + len(logits))
        wanted, total = targets[rows, None], logits.logsumexp(-1)
        models.check_numbers(model, total)
        nll[rows] = (total - logits.gather(-1, wanted)[:, 0]).cpu()
        first_choice[rows] = (logits.argmax(-1) == wanted[:, 0]).cpu()
    return TokenScores(nll, first_choice)


@torch.no_grad()
def hidden_states(model: PreTrainedModel, ids: torch.Tensor, past_key_values: Cache | None = None) -> torch.Tensor:
    """Last hidden state [S, H] of every token of ``ids`` [S], from one forward call of the whole model.

    Raises:
        ValueError: The model's logits are not its output embedding of this state, or not numbers.
    """
    decoder = _inner_model(model)
    if decoder is None or model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no separate output embedding")
    states: list[torch.Tensor] = []
    hook = decoder.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    try:
        logits = model(ids[None].to(model.device), logits_to_keep=1, **_cache_arguments(model, past_key_values)).logits
    finally:
        hook.remove()
    hidden = states[0][0]
    models.check_numbers(model, logits[0, -1].float().logsumexp(-1))
    _, own = next(_logits(model, hidden[-1:]))
    if not torch.allclose(own[0], logits[0, -1].float(), rtol=0.02, atol=0.02 * own.abs().max().item()):
        raise ValueError(f"{type(model).__name__}: its logits are not its output embedding of its last hidden state")
    return hidden


def _inner_model(model: PreTrainedModel) -> nn.Module | None:
    """The part of the model that makes the last hidden state; None if there is none."""
    # Llama 4's text model calls it ``model`` but says ``language_model``, so that it takes itself for its inner model.
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return next((found for found in (model.base_model, *inner) if found is not model), None)


def _cache_arguments(model: PreTrainedModel, past_key_values: Cache | None) -> dict:
    """The cache under the name that this version of transformers gives it."""
    if past_key_values is None:
        return {"use_cache": False}
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: past_key_values, "use_cache": True}


def _logits(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, float32 logits of some rows) for all rows of ``hidden`` [S, H]."""
    head: nn.Module = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    step = max(1, LOGITS_AT_ONCE // config.vocab_size)
    for start in range(0, len(hidden), step):
        logits = head(hidden[start : start + step]).float() * scale
        yield start, logits if softcap is None else softcap * torch.tanh(logits / softcap)
