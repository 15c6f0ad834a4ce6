"""What fits the seam, judged by the source of the model's own classes: transformers has no other way to ask."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel, modeling_flash_attention_utils
from transformers.integrations import flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class UnsupportedModelError(ValueError):
    """The model's attention cannot be patched; the message names the class and the reason."""


@functools.cache
def _sources(cls: type) -> tuple[tuple[type, str], ...]:
    """A layer's class and those it inherits from, up to torch's own, each with its source, "" if it has none."""
    found = []
    for each in cls.__mro__:
        if each is nn.Module:
            break
        try:
            found.append((each, inspect.getsource(each)))
        except (OSError, TypeError):
            found.append((each, ""))
    return tuple(found)


def source_of(cls: type) -> str:
    """The source of a class and of those it inherits from."""
    return "\n".join(source for _, source in _sources(cls))


# A graph takes the answer as it is: it cannot read sources, nor leave a cached function alone.
@torch._dynamo.assume_constant_result
def uses_interface(config_module: str) -> bool:
    """Whether any class of the modelling file that belongs to a config's module calls the AttentionInterface; True where
    there is no such file."""
    modelling = sys.modules.get(config_module.replace("configuration_", "modeling_"))
    return modelling is None or _calls_interface(modelling)


@functools.cache
def _calls_interface(modelling: ModuleType) -> bool:
    classes = [each for each in vars(modelling).values() if isinstance(each, type) and issubclass(each, nn.Module)]
    # PreTrainedModel names the interface, too, whatever its model does.
    sources = [source for cls in classes for each, source in _sources(cls) if each is not PreTrainedModel]
    return not sources or any("ALL_ATTENTION_FUNCTIONS" in source for source in sources)


# What ``eager_attention_of`` found. A graph can look it up, but cannot read sources.
_EAGER_ATTENTION: dict[type, Callable[..., Any] | None] = {}


def eager_attention_of(cls: type) -> Callable[..., Any] | None:
    """The function that layers of this class call for "eager", which is no registered name: each modelling file brings its own.

    None if there is none that can be called in the layer's place.
    """
    if cls not in _EAGER_ATTENTION:
        if torch.compiler.is_compiling():
            # Of a model that was unpickled and compiled at once.
            return getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        _EAGER_ATTENTION[cls] = _find_eager_attention(cls)
    return _EAGER_ATTENTION[cls]


def _find_eager_attention(cls: type) -> Callable[..., Any] | None:
    for each, source in _sources(cls):
        for name in re.findall(r"\b\w*eager_attention_forward\b", source):
            function = getattr(sys.modules.get(each.__module__), name, None)
            if function is not None:
                return function
    return None


# A mask of ours is none to calculate with. Choosing the encoder's, which GPT-2 can, is harmless, and so is adding the mask to
# something, which it does with reorder_and_upcast_attn only. A line of a docstring's list begins with "-" or "*".
_CALCULATES_WITH_MASK = re.compile(
    r"\battention_mask(\s=\s(?!encoder_)|\s[&|*+-]=?\s|[.\[])|(\s[&|]\s|\S\s[*-]\s|~)attention_mask\b"
)


def misfit_of_layer(layer: nn.Module, base: str) -> str | None:
    """Why an attention layer does not fit, or None; ``base`` is the implementation that its dense calls go to."""
    name, source = type(layer).__name__, source_of(type(layer))
    if re.search(r"\b(block_)?indices=", source):
        return f"{name} brings its own sparse index"
    if re.search(_CALCULATES_WITH_MASK, source):
        return f"{name} changes the attention mask it is given"
    if base == "eager":
        if getattr(layer, "reorder_and_upcast_attn", False):
            return f"{name} computes eager attention in a way of its own, reorder_and_upcast_attn"
        if eager_attention_of(type(layer)) is None:
            return f"{name} brings no eager attention that can be called"
    if cuts_masks(getattr(layer, "config", None)) and base not in ("sdpa", "eager"):
        return f"{name} belongs to a model that cuts masks, which {base} does not allow"
    return None


# By the names that transformers gives a meaning. What others have put under one of them before is not taken for its own.
_OWN_FUNCTIONS = {
    name: function if function.__module__.startswith("transformers.") else None
    for name, function in AttentionInterface._global_mapping.items()
}


@torch._dynamo.assume_constant_result
def is_replaced(base: str) -> bool:
    """Whether somebody has put another attention where a base implementation of transformers was.

    Sequence parallelism does so (DeepSpeed's Ulysses under the name, others in the functions below it), with layers that hold a
    part of the prompt each: what is causal there only the replacement knows.
    """
    if base in _OWN_FUNCTIONS and ALL_ATTENTION_FUNCTIONS[base] is not _OWN_FUNCTIONS[base]:
        return True
    if base == "sdpa":
        return F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention
    own = modeling_flash_attention_utils._flash_attention_forward
    return "flash" in base and flash_attention._flash_attention_forward is not own


def heads_of(layer: nn.Module) -> int | None:
    """Query heads of a layer, or None if neither it nor its config tells."""
    config = getattr(layer, "config", None)
    try:
        return getattr(config, "num_attention_heads", None)
    except RuntimeError:
        # They differ between layers.
        return getattr(layer, "num_heads", None) or getattr(layer, "num_attention_heads", None)


def layer_number(layer: nn.Module) -> int | None:
    """Which of the model's layers it is, or None: Zamba2's share their modules, and these say -1."""
    number = getattr(layer, "layer_idx", None)
    return number if isinstance(number, int) and number >= 0 else None


def cuts_masks(config: PretrainedConfig | None) -> bool:
    """Whether a model cuts masks to the queries whose logits are kept, as Gemma 4 does for layers that share keys."""
    is_gemma4 = getattr(config, "model_type", "").startswith("gemma4")
    return is_gemma4 and bool(getattr(config, "num_kv_shared_layers", None))
