"""The attention function transformers calls in every layer of a patched model: sparse, or dense with a counted reason.

The path of a tensor: the model asks ``masking.prefill_mask`` for its mask and, if the call is causal and long enough,
gets a CausalMask, which says no more than where padding is; a layer's own forward projects and rotates, then calls
``prefill_attention`` through transformers' AttentionInterface with query [B, Hq, Sq, D] and key, value [B, Hkv, Skv,
D]; ``dense_reason`` decides; a sparse call goes to ``functional.flash_prefill_attention``; the result goes back as [B,
Sq, Hq, D].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import modeling_flash_attention_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .audit import start_audit
from .block_index import BlockIndex
from .causal_mask import CausalMask
from .config import FlashPrefillConfig
from .crossover import LayerShape, is_long_enough, min_seq_len_for
from .custom_op import config_to_json, sparse_prefill
from .fitting import UnsupportedModelError, eager_attention_of, is_replaced, layer_number, misfit_of_layer
from .functional import flash_prefill_attention, lacks_kernel
from .masking import base_mask_for, is_captured, is_flash
from .operator_arguments import DTYPES
from .stats import has_record, record_compiled_audit, record_compiled_sparse, record_dense, record_sparse

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    # Before transformers 5 each layer hands its weights to the next.
    _active_collector = None

logger = logging.get_logger(__name__)

# Keyword arguments that change the attention itself. Any that is not None keeps the call dense.
FOREIGN_ARGUMENTS = {
    # One for each token. One for each head comes as s_aux and runs sparse.
    "sinks": "attention sinks",
    "softcap": "softcap",
    "position_bias": "position bias",
    "cu_seq_lens_q": "packed sequences",
    "indices": "the model's own sparse index",
    "block_indices": "the model's own sparse index",
    "cache": "continuous batching",
}

# A graph cannot look into a mask or at a static cache's length to see that the call is plain causal.
COMPILED_MASK = "mask unknown while compiling"


class LayerSettings(NamedTuple):
    """Settings with a single alpha, and the same as the custom op takes them."""

    config: FlashPrefillConfig
    json: str


@dataclass(frozen=True)
class PrefillSettings:
    """What one registered attention name stands for: the settings and the implementation that dense calls go to."""

    config: FlashPrefillConfig
    base: str
    layers: tuple[LayerSettings, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", self.config.resolved())
        alphas = self.config.layer_alphas or (self.config.alpha,)
        configs = [replace(self.config, alpha=alpha, layer_alphas=None) for alpha in alphas]
        object.__setattr__(self, "layers", tuple(LayerSettings(config, config_to_json(config)) for config in configs))

    def of_layer(self, module: nn.Module) -> LayerSettings:
        """The settings of a layer.

        Raises:
            ValueError: The settings hold one alpha per layer, and none for this one.
        """
        if self.config.layer_alphas is None:
            return self.layers[0]
        layer = layer_number(module)
        if layer is None or layer >= len(self.layers):
            raise ValueError(f"layer_alphas must hold an alpha for every layer, got {len(self.layers)} for layer {layer}")
        return self.layers[layer]


def prefill_attention(
    settings: PrefillSettings,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer: query [B, Hq, Sq, D], key and value [B, Hkv, Skv, D] -> [B, Sq, Hq, D] and the weights, if
    the dense implementation gave any.

    Raises:
        UnsupportedModelError: The layer does not fit; of a model that was loaded by the name of ``register_attention``.
    """
    # Vision towers of a model that was loaded by name come here, too, and never get a mask of ours.
    if not torch.compiler.is_compiling() and not has_record(module) and hasattr(module, "layer_idx"):
        misfit = misfit_of_layer(module, settings.base)
        if misfit is not None:
            raise UnsupportedModelError(misfit)
    reason = dense_reason(settings, module, query, key, value, attention_mask, dropout, kwargs)
    if isinstance(attention_mask, CausalMask):
        key, value = attention_mask.used(key), attention_mask.used(value)
    if reason is not None:
        record_dense(module, reason, query)
        if reason == "gradients needed" and not torch.compiler.is_compiling():
            logger.warning_once(
                "Prefill stays dense because gradients are enabled; wrap the call in torch.no_grad() for sparse prefill."
            )
        return dense_attention(
            settings.base, module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    sparse = _compiled_sparse_attention if torch.compiler.is_compiling() else _sparse_attention
    what_is_seen = (attention_mask.valid_ranges(), type(attention_mask).sliding_window, kwargs.get("s_aux"))
    return sparse(settings, module, query, key, value, scaling, *what_is_seen), None


# After a graph break dynamo would compile this alone, though it was called because nothing is being compiled.
@torch.compiler.disable
def _sparse_attention(settings, module, query, key, value, scale, valid_ranges, sliding_window, sinks) -> torch.Tensor:
    config, record = settings.of_layer(module).config, record_sparse(module)
    audit = start_audit(config, query, key, scale, sliding_window, sinks)

    def on_index(index: BlockIndex) -> None:
        record.add_index(index)
        if audit is not None:
            audit.add_index(index)

    output = flash_prefill_attention(
        query,
        key,
        value,
        config=config,
        scale=scale,
        valid_ranges=valid_ranges,
        sliding_window=sliding_window,
        sinks=sinks,
        on_index=on_index,
    )
    if audit is not None:
        record.add_audit(audit.dropped(), config.audit_limit)
        record.check_audit()
    return output.transpose(1, 2).contiguous()


def _compiled_sparse_attention(settings, module, query, key, value, scale, valid_ranges, sliding_window, sinks) -> torch.Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    config, text = settings.of_layer(module)
    output, kept, visible, dropped = sparse_prefill(query, key, value, valid_ranges, text, scale, sliding_window, sinks)
    record = record_compiled_sparse(module, query, kept, visible)
    if config.audit_rows and sliding_window is None:
        record_compiled_audit(record, dropped, config.audit_limit)
    return output


def dense_reason(
    settings: PrefillSettings,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this call stays dense, or None if it runs sparse."""
    config, query_len = settings.config, query.shape[2]
    if query_len == 1:
        return "decode"
    if query.device.type == "meta":
        return "meta device"
    shape = LayerShape(query.shape[1], key.shape[1], query.shape[3], query.dtype)
    # Any other mask may be that of a call that was found too short before.
    key_len = attention_mask.shape[1] if isinstance(attention_mask, CausalMask) else query_len
    if not is_long_enough(config, min_seq_len_for(config, shape, query.device), query_len, key_len):
        return "shorter than min_seq_len"
    if getattr(module, "layer_idx", None) in config.dense_layers:
        return "dense layer"
    if lacks_kernel(config.backend, query.device, query.dtype, query.shape[3]):
        return "no GPU kernel"
    if is_replaced(settings.base):
        return "attention replaced"
    for name, reason in FOREIGN_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            return reason
    sinks = kwargs.get("s_aux")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        return "attention sinks"
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return "not causal"
    if module.training:
        # Reentrant gradient checkpointing runs without gradients first, and again with them.
        return "training mode"
    tensors = [tensor for tensor in (query, key, value, sinks) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients needed"
    if not torch.compiler.is_compiling():
        # Forward mode: a tangent comes along without requires_grad and under torch.no_grad(), and kernels would lose it.
        if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
            return "gradients needed"
        if any(torch._C._functorch.is_batchedtensor(tensor) for tensor in tensors):
            return "torch.vmap"
        if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors):
            return "tensor subclass"
    if dropout:
        return "dropout"
    if _asks_for_weights(module, kwargs.get("output_attentions")):
        return "output_attentions"
    if not isinstance(attention_mask, CausalMask):
        return COMPILED_MASK if torch.compiler.is_compiling() else "mask is not plain causal"
    if not attention_mask.is_of(key):
        return "keys are not those of the mask"
    if is_flash(settings.base) and kwargs.get("position_ids") is not None:
        is_packed = _is_packed(attention_mask, kwargs["position_ids"], query.shape[0])
        if is_packed is None:
            return COMPILED_MASK
        if is_packed:
            return "packed sequences"
    window = kwargs.get("sliding_window") or key_len
    if (window if window < key_len else None) != type(attention_mask).sliding_window:
        return "the layer's window is not the mask's"
    if value.shape != key.shape or key.shape[-1] != query.shape[-1]:
        return "value head_dim differs"
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return "unsupported dtype"
    return None


def _asks_for_weights(module: nn.Module, given: bool | None) -> bool:
    """Whether attention weights are asked for, by the call or by the model's config."""
    if given is None:
        given = getattr(getattr(module, "config", None), "output_attentions", False)
    if given or _active_collector is None:
        return bool(given)
    # Not every layer passes on what its model was asked for, but transformers collects what layers return all the same.
    collected = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    return collected is not None and "attentions" in collected


def _is_packed(mask: CausalMask, position_ids: torch.Tensor, batch: int) -> bool | None:
    """Whether flash attention takes the row for several sequences, as their positions say; None if it cannot be known here.

    transformers' masks look for them only where there is no cache, flash attention in every layer, if it gets no mask.
    """
    if batch != 1 or mask.is_padded() or type(mask).is_of_buffer:
        return False
    if torch.compiler.is_compiling() or is_captured(position_ids):
        return None
    # The layers share mask and positions. Asked once, the device is waited for once.
    known, answer = getattr(mask, "packing", (None, None))
    if known is not position_ids:
        answer = bool(modeling_flash_attention_utils._is_packed_sequence(position_ids, batch))
        mask.packing = (position_ids, answer)
    return answer


def dense_attention(
    base: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The implementation the model had before it was patched, with the mask it would have got.

    Of a static cache's keys those that ``attention_mask`` knows must have been cut out already.
    """
    if isinstance(attention_mask, CausalMask):
        attention_mask = base_mask_for(base, attention_mask, query, module.config)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"][..., : key.shape[2]]
    if base == "eager":
        function = eager_attention_of(type(module))
    else:
        function = ALL_ATTENTION_FUNCTIONS[base]
        if is_flash(base):
            module = _UnderBaseName(module, base)
    return function(module, query, key, value, attention_mask, **kwargs)


class _UnderBaseName:
    """A view of an object whose config names the base implementation: flash attention picks its kernel by that name."""

    def __init__(self, viewed: Any, base: str):
        self._viewed, self._base = viewed, base

    def __getattr__(self, name: str) -> Any:
        if name == "config":
            return _UnderBaseName(self._viewed.config, self._base)
        if name == "_attn_implementation":
            return self._base
        return getattr(self._viewed, name)
