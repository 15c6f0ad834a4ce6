"""Pooled keys that the calls on one growing cache hand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .geometry import PrefillGeometry


class KeptPools:
    """What calls of ``flash_prefill_attention`` on one growing cache have pooled, so that each pools only what is new to it.

    Without it a prefill in chunks pools every key and value once in each chunk that follows. Begin with an empty one for every
    cache and give it to each call; the results are the same as without, bit by bit but where torch pools on a GPU, whose sums
    then may be rounded otherwise.

    The caller promises that the keys and values before a call's first query are those that earlier calls found there. Nothing
    can check that: blocks that have changed would be chosen by what they were, and dropped ones be stood for by what they were.
    A cache that was cropped keeps this promise if whatever was appended since went through calls with these pools; one that
    was reordered or filled anew does not.

    Kept are pooled keys, 1 / ``pool_size`` as many numbers as the keys, bytes on a GPU, and with the correction the means of
    whole blocks of keys and of values, 1 / ``block_size`` as many each.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._made_for: dict[str, Any] = {}
        # [B, Hkv, rows, ...] each: pooled keys and, with the correction, means of blocks of keys and of values.
        self._pools: tuple[torch.Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the cache whose pools the next call may take over; it does so in whole tiles of pooled keys."""
        return self._tokens

    def require(self, made_for: dict[str, Any]) -> None:
        """Raise ValueError if what is kept was ``made_for`` something else."""
        for name, kept in self._made_for.items():
            if made_for[name] != kept:
                raise ValueError(f"kept_pools must be new for another {name}: pooled with {kept}, got {made_for[name]}")

    def forget_from(self, first_query: int) -> None:
        """Keys from a call's first query on, in tokens, are its own, whether it pools them or, with a window, does not."""
        self._tokens = min(self._tokens, first_query)

    def extended(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        geometry: PrefillGeometry,
        pool: Callable[[torch.Tensor, torch.Tensor, PrefillGeometry], tuple[torch.Tensor, ...]],
        made_for: dict[str, Any],
        together: int,
        row_tokens: tuple[int, ...],
    ) -> tuple[torch.Tensor, ...]:
        """What ``pool(key, value, geometry)`` gives, of which the part that is kept need not be pooled.

        Args:
            key: [B, Hkv, Skv, D].
            value: [B, Hkv, Skv, D].
            geometry: Of the call, without padding.
            pool: Pools keys and values, into tensors [B, Hkv, rows, ...].
            made_for: All that they depend on beside keys and values.
            together: Tokens of which multiples may be pooled apart.
            row_tokens: How many tokens make a row, for each of the tensors.
        """
        old = self._tokens // together * together
        rest = replace(geometry, kv_len=geometry.kv_len - old, query_offset=geometry.query_offset - old)
        pools = pool(key[:, :, old:], value[:, :, old:], rest)
        if old:
            parts = zip(self._pools, pools, row_tokens, strict=True)
            pools = tuple(torch.cat([kept[:, :, : old // tokens], new], 2) for kept, new, tokens in parts)
        # What stands behind the last query may not be the next call's.
        self._tokens, self._made_for, self._pools = geometry.query_offset + geometry.query_len, made_for, pools
        return pools
