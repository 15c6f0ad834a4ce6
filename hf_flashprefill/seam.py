"""What of a model is patched, and the names under which transformers finds the attention that takes over there.

Each combination of settings and previous implementation is registered once under a name of its own, and a patched model
is a model whose config carries such a name. Nothing else changes, so ``deepcopy`` and ``save_pretrained`` need no help.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from .attention import PrefillSettings, prefill_attention
from .config import FlashPrefillConfig
from .fitting import UnsupportedModelError, layer_number, misfit_of_layer, source_of
from .masking import prefill_mask
from .stats import LayerRecord, attach_record, detach_record, restore_records, saved_records

# The name must not contain "flash", "sdpa", "flex_attention" or "/": transformers takes meaning from those.
NAME = "block_sparse_prefill"

_SETTINGS: dict[str, PrefillSettings] = {}


def register(settings: PrefillSettings, name: str | None = None, attention: Callable[..., Any] = prefill_attention) -> str:
    """Make transformers know the settings by a name, one of their own if none is given, and return it."""
    if name is None:
        content = json.dumps([settings.config.to_dict(), settings.base], sort_keys=True)
        name = f"{NAME}_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    _SETTINGS[name] = settings
    AttentionMaskInterface.register(name, functools.partial(prefill_mask, settings.base, settings.config))
    AttentionInterface.register(name, functools.partial(attention, settings))
    return name


def unregister(name: str) -> None:
    """Make transformers forget a name of ``register``."""
    for registry in (_SETTINGS, AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        registry.pop(name, None)


class SeamPart:
    """The part of a model that is patched: the model itself, or the text part of a multimodal one."""

    def __init__(self, model: PreTrainedModel, key: str | None):
        self.model, self.key = model, key

    @classmethod
    def of(cls, model: nn.Module) -> SeamPart:
        if not isinstance(model, PreTrainedModel):
            # PEFT wraps the model and offers this; it does not inherit from PreTrainedModel.
            inner = model.get_base_model() if hasattr(model, "get_base_model") else None
            if not isinstance(inner, PreTrainedModel):
                name = type(model).__name__
                raise TypeError(
                    f"model must be a transformers PreTrainedModel, got {name}; patch a wrapped one before wrapping it"
                )
            model = inner
        text = model.config.get_text_config(decoder=True)
        if text is model.config:
            return cls(model, None)
        for key in model.config.sub_configs:
            if getattr(model.config, key, None) is text:
                return cls(model, key)
        raise UnsupportedModelError(f"{type(model).__name__}: its text config is not among its sub-configs")

    @property
    def config(self) -> Any:
        return self.model.config if self.key is None else getattr(self.model.config, self.key)

    @property
    def implementation(self) -> str:
        return self.config._attn_implementation

    @property
    def settings(self) -> PrefillSettings | None:
        """Those in effect, or None if the model is not patched."""
        return _SETTINGS.get(self.implementation)

    @property
    def base(self) -> str:
        """The implementation that is in effect without us."""
        return self.implementation if self.settings is None else self.settings.base

    def attention_modules(self) -> list[nn.Module]:
        """Modules of the patched part that call the AttentionInterface."""
        return [
            module
            for module in self.model.modules()
            if getattr(module, "config", None) is self.config
            and hasattr(module, "layer_idx")
            and "ALL_ATTENTION_FUNCTIONS" in source_of(type(module))
        ]

    def require_supported(self) -> None:
        name = type(self.model).__name__
        modules = self.attention_modules()
        if not self.model._can_set_attn_implementation() or not modules:
            raise UnsupportedModelError(f"{name}: its attention does not go through transformers' AttentionInterface")
        for module in modules:
            reason = misfit_of_layer(module, self.base)
            if reason is not None:
                raise UnsupportedModelError(f"{name}: {reason}")
        if getattr(self.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{name}: encoder-decoder models have no causal prefill")

    def require_layers(self, config: FlashPrefillConfig) -> None:
        """Raise ValueError unless the settings name layers that the model has, and its modules say which they are."""
        name = "dense_layers" if config.dense_layers else "layer_alphas" if config.layer_alphas is not None else None
        nameless = [module for module in self.attention_modules() if layer_number(module) is None]
        if name and nameless:
            raise ValueError(f"{name} must not be set here: {type(nameless[0]).__name__} does not say which layer it is")
        layers = getattr(self.config, "num_hidden_layers", None)
        if layers is None:
            return
        if any(layer >= layers for layer in config.dense_layers):
            raise ValueError(f"dense_layers must lie from 0 to {layers - 1}, got {config.dense_layers}")
        if config.layer_alphas is not None and len(config.layer_alphas) != layers:
            raise ValueError(f"layer_alphas must hold {layers} numbers, one a layer, got {len(config.layer_alphas)}")

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Leave the implementation and the records as they were if anything is raised inside, Ctrl-C too."""
        previous, records = self.implementation, saved_records(self.model)
        try:
            yield
        except BaseException:
            if self.implementation != previous:
                self._switch(previous)
            restore_records(records)
            raise

    def _switch(self, name: str) -> None:
        # A plain name would go to all sub-configs, too.
        self.model.set_attn_implementation({self.key or "": name})

    def set_implementation(self, name: str) -> None:
        """Set the implementation and attach or detach the layers' records.

        Raises:
            UnsupportedModelError: A layer did not take it.
        """
        self._switch(name)
        # transformers only warns about classes it cannot switch.
        stuck = [module for module in self.attention_modules() if module.config._attn_implementation != name]
        if self.implementation != name or stuck:
            culprit = type(stuck[0]).__name__ if stuck else type(self.model).__name__
            raise UnsupportedModelError(f"{culprit} did not take the attention implementation")
        settings = self.settings
        if settings is None:
            self.detach_records()
            return
        for module in self.attention_modules():
            attach_record(module, (_revived_record, (name, settings.config, settings.base)))

    def detach_records(self) -> None:
        """Take the records off the layers."""
        for module in self.attention_modules():
            detach_record(module)


def _revived_record(name: str, config: FlashPrefillConfig, base: str) -> LayerRecord:
    """Unpickling a layer of a patched model: register in this process what the model's config names."""
    register(PrefillSettings(config, base), name)
    return LayerRecord((_revived_record, (name, config, base)))
