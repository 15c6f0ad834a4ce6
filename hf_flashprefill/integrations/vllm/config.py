"""What a server's ``--additional-config`` says about the sparse prefill."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...checks import is_number
from ...config import AUTO, FlashPrefillConfig

KEY = "flashprefill"

# Tokens of prompt from which on rows prefill sparsely where the configuration leaves the length to us. A guess: what is
# measured for transformers is against another dense attention and without the copy out of the paged cache.
AUTO_MIN_SEQ_LEN = 8192


@dataclass(frozen=True)
class RowSettings:
    """Settings of one vLLM engine.

    Attributes:
        prefill: The settings of the operator. ``min_seq_len`` counts the row's whole sequence, cached tokens included,
            because a chunk of a long prompt is worth it at any length.
        min_query_len: Tokens. A row that brings fewer queries to a step stays dense, >= 2.
    """

    prefill: FlashPrefillConfig
    min_query_len: int = 512

    @property
    def min_seq_len(self) -> int:
        """Tokens of the row's sequence below which it stays dense."""
        return AUTO_MIN_SEQ_LEN if self.prefill.min_seq_len == AUTO else self.prefill.min_seq_len


def settings_from(additional_config: Any, speculative_tokens: int = 0, layers: int | None = None) -> RowSettings:
    """Read ``additional_config["flashprefill"]``: a FlashPrefillConfig's fields and ``min_query_len``.

    Args:
        additional_config: vLLM's ``additional_config``. Without our key every setting has its default.
        speculative_tokens: Draft tokens a speculative engine verifies in one row. Such rows are not prompts.
        layers: How many layers the engine has; None if that is not known.

    Raises:
        ValueError: A key is unknown or a value is out of its range, in one line that names it.
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    place = f'additional_config["{KEY}"]'
    if not isinstance(given, Mapping):
        raise ValueError(f"{place} must be an object of settings, got {given!r}")
    known = {field.name for field in fields(FlashPrefillConfig)} | {"min_query_len"}
    unknown = sorted(set(map(str, given)) - known)
    if unknown:
        raise ValueError(f"{place} must hold only {sorted(known)}, got {unknown}")
    values = dict(given)
    min_query_len = values.pop("min_query_len", RowSettings.min_query_len)
    # A parallel drafter can add as many mask slots again to the verified row.
    least = 2 + 2 * speculative_tokens
    if not is_number(min_query_len, numbers.Integral) or min_query_len < least:
        raise ValueError(f"{place}: min_query_len must be a whole number >= {least}, got {min_query_len!r}")
    try:
        prefill = FlashPrefillConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None
    for name in ("layer_alphas", "audit_rows"):
        if getattr(prefill, name):
            raise ValueError(f"{place}: {name} is for transformers models and not in vLLM, got {values[name]!r}")
    if layers is not None and any(layer >= layers for layer in prefill.dense_layers):
        raise ValueError(f"{place}: dense_layers must lie from 0 to {layers - 1}, got {prefill.dense_layers}")
    return RowSettings(prefill, int(min_query_len))
