"""Every setting of a sparse prefill: its default, unit and allowed range."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields
from typing import Any

SELECTORS = ("share", "peak", "flashprefill", "topk", "topp")
# They sort each row of scores. No kernel does that: torch selects for them on every device, and only attention is fast.
SORTING_SELECTORS = ("topk", "topp")
BACKENDS = ("auto", "triton", "torch", "reference")
BLOCK_SIZES = (64, 128)
POOL_SIZES = (4, 8, 16, 32)
QUERY_STRIDES = (1, 2, 4, 8, 16, 32, 64)
AUTO = "auto"


@dataclass(frozen=True)
class FlashPrefillConfig:
    """Settings of the sparse prefill. Values are checked on construction.

    Attributes:
        alpha: The threshold on scores, from 0 to 1; 0 keeps every block, which is dense attention up to rounding. What
            it is compared with depends on the selector, so equal values of different selectors mean nothing.
        selector: The rule that scores key blocks for a query block and head.
            ``"share"``: every ``query_stride``-th query spreads a softmax over all pooled keys it sees; a block's score is
            the largest share that any of these queries gives any pooled key of the block; kept from ``alpha`` on.
            ``"peak"``: the same score, kept from ``alpha`` times the query block's largest on.
            ``"flashprefill"``: the published rule (arXiv 2603.06199): energies of block means, summed over the block's
            queries, kept from ``alpha`` times the largest on.
            ``"topk"``, ``"topp"``: baselines to compare with, slow to select. The first drops the fraction ``alpha`` of the
            visible blocks that have the smallest shares; the second drops the blocks with the least mass, as the same
            probe estimates it, as long as they hold less than ``alpha`` of it together.
        pool_size: Tokens averaged into one pooled key by every selector but ``"flashprefill"``: 4, 8, 16 or 32. Half as many
            cost twice the time and find answers that a coarser pool averages away.
        query_stride: Of how many queries one probes, for the same selectors: a power of two up to 64.
        block_size: Tokens in a query block and in a key block, 64 or 128.
        sink_blocks: Blocks at the start of the prompt that are always kept, >= 0.
        window_blocks: Blocks up to and including the query's own that are always kept, >= 1.
        dense_tail_blocks: Query blocks at the end of the prompt that see every block, >= 0. In a prefill in chunks each
            chunk's end counts, because a chunk does not tell whether another follows.
        correction: Whether each dropped block takes part in the softmax through its mean key and mean value, weighted by its
            tokens (FlashPrefill V2). Has no Hopper kernel yet: attention runs in the portable one.
        min_seq_len: Tokens. A model's call with fewer queries than this stays dense, >= 0; or ``"auto"``: from where sparse
            prefill was faster when ``warmup`` measured it on this machine, else 8192 tokens on Hopper GPUs and on CPUs and
            16384 on other GPUs and for small layers. On one H200 the operator was 0.62 times as fast as cuDNN's dense
            attention at 4096 tokens and 1.43 times at 8192; the other numbers are guesses.
        dense_layers: Layers, counted from 0, that stay dense.
        backend: ``"triton"`` (NVIDIA GPU), ``"torch"`` (any device), ``"reference"`` (the specification, slow), or
            ``"auto"``: triton where it can run, else torch.

    Raises:
        ValueError: A value is out of its range; names the field, the value and the range.
        TypeError: A value is of the wrong type.
    """

    alpha: float = 0.005
    selector: str = "share"
    pool_size: int = 8
    query_stride: int = 8
    block_size: int = 128
    sink_blocks: int = 2
    window_blocks: int = 4
    dense_tail_blocks: int = 2
    correction: bool = False
    min_seq_len: int | str = AUTO
    dense_layers: tuple[int, ...] = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, numbers.Real):
            raise TypeError(f"alpha must be a number from 0 to 1, got {self.alpha!r}")
        if not (math.isfinite(self.alpha) and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha!r}")
        object.__setattr__(self, "alpha", float(self.alpha))
        _require_choice("selector", self.selector, SELECTORS)
        _require_choice("backend", self.backend, BACKENDS)
        for name, choices in (("block_size", BLOCK_SIZES), ("pool_size", POOL_SIZES), ("query_stride", QUERY_STRIDES)):
            _require_choice(name, getattr(self, name), choices)
        for name, least in (("sink_blocks", 0), ("window_blocks", 1), ("dense_tail_blocks", 0)):
            _require_integer(name, getattr(self, name), least)
        _require_auto_or_integer("min_seq_len", self.min_seq_len, 0)
        if not isinstance(self.correction, bool):
            raise TypeError(f"correction must be True or False, got {self.correction!r}")
        if isinstance(self.dense_layers, (str, bytes)) or not hasattr(self.dense_layers, "__iter__"):
            raise TypeError(f"dense_layers must be a sequence of layer numbers, got {self.dense_layers!r}")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for layer in self.dense_layers:
            _require_integer("dense_layers", layer, 0)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; ``FlashPrefillConfig(**d)`` restores them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["dense_layers"] = list(self.dense_layers)
        return values


def _require_choice(name: str, value: Any, choices: tuple) -> None:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _require_auto_or_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, str):
        if value != AUTO:
            raise ValueError(f'{name} must be "{AUTO}" or a whole number >= {least}, got {value!r}')
    else:
        _require_integer(name, value, least)


def _require_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must hold whole numbers >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value!r}")
