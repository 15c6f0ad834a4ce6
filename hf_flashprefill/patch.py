"""Switching sparse prefill on and off for one model instance, through transformers' own registries."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import PrefillSettings, prefill_attention
from .config import FlashPrefillConfig
from .masking import prefill_mask_by_name
from .seam import NAME, SeamPart, register, unregister
from .stats import reset_prefill_stats, restore_records, saved_records

ModelT = TypeVar("ModelT", bound=nn.Module)

# Settings, or the JSON file that FlashPrefillConfig.to_json wrote.
ConfigLike = FlashPrefillConfig | str | os.PathLike


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
    part = SeamPart.of(model)
    part.require_supported()
    part.require_layers(settings_config)
    name = register(PrefillSettings(settings_config, part.base))
    with part.undone_on_error():
        part.set_implementation(name)
        reset_prefill_stats(model)
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Give ``model`` back the attention implementation it had, in place; a model that is not patched stays as it is.

    Raises:
        TypeError: Not a transformers model.
    """
    part = SeamPart.of(model)
    if part.settings is not None:
        with part.undone_on_error():
            part.set_implementation(part.base)
    else:
        # It may have been, until somebody gave it another implementation by transformers' own set_attn_implementation.
        part.detach_records()
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether ``patch_model`` is in effect on ``model``."""
    return SeamPart.of(model).settings is not None


def patched_config(model: nn.Module) -> FlashPrefillConfig | None:
    """The settings in effect on ``model``, or None if it is not patched."""
    settings = SeamPart.of(model).settings
    return None if settings is None else settings.config


@contextlib.contextmanager
def patched(
    model: ModelT, alpha: float | None = None, *, config: ConfigLike | None = None, **overrides: Any
) -> Iterator[ModelT]:
    """``patch_model`` for a ``with`` block, with its errors; what was in effect before is restored, also after an exception.

    Blocks of several threads around one model must nest, as each restores what it found.
    """
    part = SeamPart.of(model)
    previous = part.implementation
    try:
        patch_model(model, alpha, config=config, **overrides)
        yield model
    finally:
        if part.implementation != previous:
            part.set_implementation(previous)


@contextlib.contextmanager
def unpatched(model: ModelT) -> Iterator[ModelT]:
    """``unpatch_model`` for a ``with`` block; whatever was in effect before is restored, also after an exception.

    Raises:
        TypeError: Not a transformers model.
    """
    part = SeamPart.of(model)
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
    part = SeamPart.of(model)
    part.require_supported()
    part.require_layers(config)
    previous, records, name = part.implementation, saved_records(part.model), f"{NAME}_replaced"
    try:
        part.set_implementation(register(PrefillSettings(config, part.base), name, attention))
        reset_prefill_stats(part.model)
        yield part.model
    finally:
        if part.implementation != previous:
            part.set_implementation(previous)
        restore_records(records)
        unregister(name)


def register_attention(config: FlashPrefillConfig | None = None, *, base: str = "sdpa") -> str:
    """Register settings as an attention implementation and return its name, ``"block_sparse_prefill"``.

    Afterwards ``from_pretrained(..., attn_implementation="block_sparse_prefill")`` loads patched models. Calling it again
    replaces the settings of that name, also for models that carry it. Layers that do not fit raise UnsupportedModelError
    when they are first called.

    Args:
        config: Settings; ``FlashPrefillConfig()`` if None.
        base: The implementation that dense calls go to: "eager" or a name that transformers' AttentionInterface knows.

    Raises:
        TypeError: ``config`` is no FlashPrefillConfig.
        ValueError: ``base`` is another name, or our own.
    """
    known = sorted({"eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if not name.startswith(NAME))})
    if base not in known:
        raise ValueError(f"base must be one of {known}, got {base!r}")
    settings = PrefillSettings(_merged_config(None, config, {}), base)
    register(settings, NAME)
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
