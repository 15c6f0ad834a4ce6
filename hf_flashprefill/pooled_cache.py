"""A key-value cache that knows what was pooled of its keys, so that chunks of a prefill in ``generate`` need not pool anew.

The path of the pools: a layer's ``update`` appends to the keys and notes on the tensor that it returns what is pooled of the
keys before; the attention function gets that very tensor, asks ``pools_of`` it and hands the pools to the operator.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from .kept_pools import KeptPools


class PooledCache(DynamicCache):
    """A ``DynamicCache`` for a prefill in chunks: each chunk that runs sparse pools only its own keys and values.

        model.generate(**inputs, past_key_values=PooledCache(model.config), prefill_chunk_size=8192)

    A patched model gives the same output with it as with a ``DynamicCache``, bit by bit where its operator does (see
    KeptPools); an unpatched one does not notice it. The pools are used as long as the cache holds the tensors that were pooled
    and torch has counted no write to them: after the cache was cropped, reordered, deep-copied, moved or written to, the next
    chunk pools everything once more, and so does every chunk in inference mode, where torch does not count. It does not count
    writes through ``.data`` or by kernels of others either: nobody may write to the cache in these ways. Padded batches,
    compiled graphs, sliding windows and linear attention go without pools.

    With the default settings the pools take an eighth of the memory of the keys and values, for as long as the cache lives.

    Args:
        config: The model's.
        offloading: As for ``DynamicCache``; layers that went to the CPU and came back pool everything once more.
        offload_only_non_sliding: As for ``DynamicCache``.
    """

    def __init__(self, config: PretrainedConfig, offloading: bool = False, offload_only_non_sliding: bool = False):
        if not isinstance(config, PretrainedConfig):
            raise TypeError(f"config must be a model's PretrainedConfig, got {type(config).__name__}")
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        # Other kinds of layers forget keys or hold none.
        self.layers = [_PooledLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


class _PooledLayer(DynamicLayer):
    """A layer that appends, and says of its keys what was pooled of those before."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        before = _valid_note(self.keys, self.values) if self.get_seq_length() else None
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        # A copy: a cache that shares these tensors may go on from here in another way.
        _note(keys, values, before.settings if before else None, copy.copy(before.pools) if before else KeptPools())
        return keys, values


@dataclass
class _Note:
    """What is pooled of a key tensor, and what shows that it and its values are those that were pooled."""

    pools: KeptPools
    settings: str | None
    value: torch.Tensor
    versions: tuple[int, int]


_NOTES = WeakTensorKeyDictionary()


def pools_of(key: torch.Tensor, value: torch.Tensor, settings: str) -> KeptPools | None:
    """The pools of a ``PooledCache``'s keys, for a call with these settings to take over and to fill; None for any others.

    Args:
        key: [B, Hkv, Skv, D], the tensor that ``update`` returned.
        value: [B, Hkv, Skv, D], the other one.
        settings: All that pools depend on beside the tensors, as text. Pools that were made with others are dropped.
    """
    note = _valid_note(key, value)
    if note is None:
        return None
    if note.settings != settings:
        note.settings, note.pools = settings, KeptPools()
    return note.pools


def _note(key: torch.Tensor, value: torch.Tensor, settings: str | None, pools: KeptPools) -> None:
    if not (key.is_inference() or value.is_inference()):
        _NOTES[key] = _Note(pools, settings, value, (key._version, value._version))


def _valid_note(key: torch.Tensor, value: torch.Tensor) -> _Note | None:
    """The note on a key tensor if its value tensor is this one and neither was written to since."""
    note = _NOTES.get(key)
    return note if note is not None and note.value is value and note.versions == (key._version, value._version) else None
