"""Pooled keys that the calls on one growing cache hand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .geometry import PrefillGeometry

# Pooled keys and, with the correction, the means of whole blocks of keys and of values: [B, Hkv, rows, D] each.
Pools = tuple[torch.Tensor, ...]


class KeptPools:
    """What calls of ``flash_prefill_attention`` on one growing cache have pooled, so that each pools only what is new to it.

    Without it a prefill in chunks pools every key and value once in each chunk that follows. Begin with an empty one for every
    cache and give it to each call; the results are the same as without, bit by bit but where torch pools on a GPU, whose sums
    then may be rounded otherwise.

    The caller promises that the keys and values before a call's first query are those that earlier calls found there. Nothing
    can check that: blocks that have changed would be chosen by what they were, and dropped ones be stood for by what they were.
    A cache that was cropped keeps this promise if whatever was appended since went through calls with these pools; one that
    was reordered or filled anew does not.

    Kept are 1 / ``pool_size`` of the keys' numbers and, with the correction, 2 / ``block_size``.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._made_for: dict[str, Any] = {}
        self._pools: Pools = ()

    @property
    def tokens(self) -> int:
        """Tokens that the last call's queries ended with."""
        return self._tokens

    def require(self, made_for: dict[str, Any]) -> None:
        """Raise ValueError if what is kept was ``made_for`` something else."""
        for name, kept in self._made_for.items():
            if made_for[name] != kept:
                raise ValueError(f"kept_pools must be new for another {name}: pooled with {kept}, got {made_for[name]}")

    def extended(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        geometry: PrefillGeometry,
        pool: Callable[[torch.Tensor, torch.Tensor, PrefillGeometry], Pools],
        made_for: dict[str, Any],
        together: int,
        row_tokens: tuple[int, ...],
    ) -> Pools:
        """What ``pool(key, value, geometry)`` gives, of which the part before the first query is taken from earlier calls.

        Args:
            key: [B, Hkv, Skv, D].
            value: [B, Hkv, Skv, D].
            geometry: Of the call, without padding.
            pool: Makes pools of keys and values.
            made_for: All that pools depend on beside keys and values.
            together: Tokens, of which multiples can be pooled apart.
            row_tokens: How many tokens make a row, of each tensor of the pools.
        """
        first_query = geometry.query_offset
        old = min(self._tokens, first_query) // together * together
        rest = replace(geometry, kv_len=geometry.kv_len - old, query_offset=first_query - old)
        pools = pool(key[:, :, old:], value[:, :, old:], rest)
        if old:
            parts = zip(self._pools, pools, row_tokens, strict=True)
            pools = tuple(torch.cat([kept[:, :, : old // tokens], new], 2) for kept, new, tokens in parts)
        # What stands behind the last query may not be the next call's.
        self._tokens, self._made_for, self._pools = first_query + geometry.query_len, made_for, pools
        return pools
