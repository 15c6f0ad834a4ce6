"""Switching sparse prefill on and off for one model instance, through transformers' own registries.

Each combination of settings and previous implementation is registered once under a name of its own, and a patched model
is a model whose config carries such a name. Nothing else changes, so ``deepcopy`` and ``save_pretrained`` need no help.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from .attention import PrefillSettings, prefill_attention
from .config import FlashPrefillConfig
from .fitting import UnsupportedModelError, layer_number, misfit_of_layer, source_of
from .masking import prefill_mask, prefill_mask_by_name
from .stats import LayerRecord, attach_record, detach_record, reset_prefill_stats, restore_records, saved_records

ModelT = TypeVar("ModelT", bound=nn.Module)

# Settings, or the JSON file that FlashPrefillConfig.to_json wrote.
ConfigLike = FlashPrefillConfig | str | os.PathLike

# The name must not contain "flash", "sdpa", "flex_attention" or "/": transformers takes meaning from those.
NAME = "block_sparse_prefill"

_SETTINGS: dict[str, PrefillSettings] = {}


def patch_model(model: ModelT, alpha: float | None = None, *, config: ConfigLike | None = None, **overrides: Any) -> ModelT:
    """Give ``model`` sparse prefill, in place. Decode, short prompts and whatever is not plain causal stay dense.

    Patching a patched model replaces its settings and starts its statistics anew. Models that share one config object are
    patched together.

    Args:
        model: A ``PreTrainedModel`` whose layers go through transformers' AttentionInterface, or a PEFT model around one.
            Of a multimodal model only the text part is patched.
        alpha: For all layers; replaces ``config.alpha`` and ``config.layer_alphas``.
        config: Settings, or the path of a JSON file of them; ``FlashPrefillConfig()`` if None.
        **overrides: Single fields of FlashPrefillConfig.

    Returns:
        The same model.

    Raises:
        TypeError: Not a transformers model, or an argument that FlashPrefillConfig does not have.
        ValueError: A setting is out of range, or ``layer_alphas`` is not as long as the model has layers.
        OSError: ``config`` is a path that cannot be read.
        UnsupportedModelError: The model does not fit; nothing was changed.
    """
    settings_config = _merged_config(alpha, config, overrides)
    part = _SeamPart.of(model)
    part.require_supported()
    part.require_layers(settings_config)
    name = _register(PrefillSettings(settings_config, part.base))
    with part.undone_on_error():
        part.set_implementation(name)
        reset_prefill_stats(model)
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Give ``model`` back the attention implementation it had, in place; a model that is not patched stays as it is."""
    part = _SeamPart.of(model)
    if part.implementation in _SETTINGS:
        with part.undone_on_error():
            part.set_implementation(part.base)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether ``patch_model`` is in effect on ``model``."""
    return _SeamPart.of(model).implementation in _SETTINGS


def patched_config(model: nn.Module) -> FlashPrefillConfig | None:
    """The settings in effect on ``model``, or None if it is not patched."""
    settings = _SETTINGS.get(_SeamPart.of(model).implementation)
    return None if settings is None else settings.config


@contextlib.contextmanager
def patched(
    model: ModelT, alpha: float | None = None, *, config: ConfigLike | None = None, **overrides: Any
) -> Iterator[ModelT]:
    """``patch_model`` for a ``with`` block; whatever was in effect before is restored, also after an exception."""
    part = _SeamPart.of(model)
    previous = part.implementation
    try:
        patch_model(model, alpha, config=config, **overrides)
        yield model
    finally:
        if part.implementation != previous:
            part.set_implementation(previous)


@contextlib.contextmanager
def unpatched(model: ModelT) -> Iterator[ModelT]:
    """``unpatch_model`` for a ``with`` block; whatever was in effect before is restored, also after an exception."""
    part = _SeamPart.of(model)
    previous = part.implementation
    try:
        unpatch_model(model)
        yield model
    finally:
        if part.implementation != previous:
            part.set_implementation(previous)


@contextlib.contextmanager
def attention_replaced(
    model: nn.Module, config: FlashPrefillConfig, attention: Callable[..., Any] = prefill_attention
) -> Iterator[PreTrainedModel]:
    """For a ``with`` block, layers call ``attention(settings, module, query, ...)`` as those of a patched model do.

    The block gets the transformers model inside of ``model``, with empty statistics. Afterwards the model and its
    statistics are as before, also after an exception.
    """
    part = _SeamPart.of(model)
    part.require_supported()
    part.require_layers(config)
    previous, records, name = part.implementation, saved_records(part.model), f"{NAME}_replaced"
    try:
        part.set_implementation(_register(PrefillSettings(config, part.base), name, attention))
        reset_prefill_stats(part.model)
        yield part.model
    finally:
        if part.implementation != previous:
            part.set_implementation(previous)
        restore_records(records)
        for registry in (_SETTINGS, AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
            registry.pop(name, None)


def register_attention(config: FlashPrefillConfig | None = None, *, base: str = "sdpa") -> str:
    """Register settings as an attention implementation and return its name, ``"block_sparse_prefill"``.

    Afterwards ``from_pretrained(..., attn_implementation="block_sparse_prefill")`` loads patched models. Calling it again
    replaces the settings of that name, also for models that carry it. Layers that do not fit raise UnsupportedModelError
    when they are first called.

    Args:
        config: Settings; ``FlashPrefillConfig()`` if None.
        base: The implementation that dense calls go to.
    """
    settings = PrefillSettings(_merged_config(None, config, {}), base)
    _register(settings, NAME)
    AttentionMaskInterface.register(NAME, functools.partial(prefill_mask_by_name, settings.base, settings.config))
    return NAME


def _merged_config(alpha: float | None, config: ConfigLike | None, overrides: dict[str, Any]) -> FlashPrefillConfig:
    if isinstance(config, (str, os.PathLike)):
        config = FlashPrefillConfig.from_json(config)
    config = FlashPrefillConfig() if config is None else config
    if not isinstance(config, FlashPrefillConfig):
        raise TypeError(f"config must be a FlashPrefillConfig or a path, got {type(config).__name__}")
    known = [field.name for field in fields(FlashPrefillConfig)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise TypeError(f"unknown settings {unknown}; FlashPrefillConfig has {known}")
    if alpha is not None:
        overrides = overrides | {"alpha": alpha}
    if "alpha" in overrides:
        # Whoever names one alpha for all layers means it.
        overrides = {"layer_alphas": None} | overrides
    return replace(config, **overrides)


def _register(settings: PrefillSettings, name: str | None = None, attention: Callable[..., Any] = prefill_attention) -> str:
    if name is None:
        content = json.dumps([settings.config.to_dict(), settings.base], sort_keys=True)
        name = f"{NAME}_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    _SETTINGS[name] = settings
    AttentionMaskInterface.register(name, functools.partial(prefill_mask, settings.base, settings.config))
    AttentionInterface.register(name, functools.partial(attention, settings))
    return name


class _SeamPart:
    """The part of a model that is patched: the model itself, or the text part of a multimodal one."""

    def __init__(self, model: PreTrainedModel, key: str | None):
        self.model, self.key = model, key

    @classmethod
    def of(cls, model: nn.Module) -> _SeamPart:
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
    def base(self) -> str:
        """The implementation that is in effect without us."""
        settings = _SETTINGS.get(self.implementation)
        return self.implementation if settings is None else settings.base

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
        settings = _SETTINGS.get(name)
        for module in self.attention_modules():
            if settings is None:
                detach_record(module)
            else:
                attach_record(module, (_revived_record, (name, settings.config, settings.base)))


def _revived_record(name: str, config: FlashPrefillConfig, base: str) -> LayerRecord:
    """Unpickling a layer of a patched model: register in this process what the model's config names."""
    _register(PrefillSettings(config, base), name)
    return LayerRecord((_revived_record, (name, config, base)))
