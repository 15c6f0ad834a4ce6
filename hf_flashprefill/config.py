"""Every setting of a sparse prefill: its default, unit and allowed range."""

from __future__ import annotations

import json
import math
import numbers
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .checks import is_number

SELECTORS = ("blend", "share", "peak", "flashprefill", "topk", "topp")
# They sort each row of scores. No kernel does that: torch selects for them on every device, and only attention is fast.
SORTING_SELECTORS = ("topk", "topp")
BACKENDS = ("auto", "triton", "torch", "reference")
BLOCK_SIZES = (64, 128)
MEAN_BLOCKS = (1, 2, 4, 8, 16)
POOL_SIZES = (4, 8, 16, 32)
QUERY_STRIDES = (1, 2, 4, 8, 16, 32, 64)
CHOICES = {"block_size": BLOCK_SIZES, "pool_size": POOL_SIZES, "query_stride": QUERY_STRIDES, "mean_blocks": MEAN_BLOCKS}
AUTO = "auto"

# What None stands for in these fields. The published method keeps 256 tokens of sinks and 512 of window and has no correction
# (arXiv 2603.06199, Table 9). The finer probes find by themselves what matters there; at 32K tokens the correction lowered the
# rise of a trained model's perplexity from .65 % to none (benchmarks/results/selection-2026-11-26-h200-32k).
OF_PUBLISHED_RULE = {"sink_blocks": 2, "window_blocks": 4, "correction": False}
OF_FINER_PROBES = {"sink_blocks": 1, "window_blocks": 2, "correction": True}
# The finer probes' keep about as much at 32K tokens, but for "peak", which keeps less (README). FlashPrefill V2 runs everything
# at .1, the first version at .08 to .18 by model; its ablation drops 7/8 of the blocks or .1 of the mass (Tables 8 and 9).
DEFAULT_ALPHAS = {"blend": 0.006, "share": 0.005, "peak": 0.05, "flashprefill": 0.1, "topk": 0.875, "topp": 0.1}


@dataclass(frozen=True)
class FlashPrefillConfig:
    """Settings of the sparse prefill. Values are checked on construction.

    Attributes:
        alpha: The threshold on scores, from 0 to 1; 0 keeps every block, which is dense attention up to rounding. What
            it is compared with depends on the selector, so equal values of different selectors mean nothing. None: .006 for
            ``"blend"``, .005 for ``"share"``, .05 for ``"peak"``, .1 for ``"flashprefill"`` and ``"topp"``, .875 for
            ``"topk"``.
        selector: The rule that scores key blocks for a query block and head.
            ``"share"``: of every ``query_stride`` queries the one with the largest 2-norm spreads a softmax over all pooled
            keys it sees; a block's score is the largest share that any of these queries gives any pooled key of the block;
            kept from ``alpha`` on. Products are of 8-bit integers, and the softmax's normaliser is reckoned from a part of
            the pooled keys (reference.probe.probe_shares).
            ``"blend"``: the score of ``"share"``, or 16 times the geometric mean over the queries of the largest share that
            each gives, if that is larger; kept from ``alpha`` on. At equal density it raises the perplexity less.
            ``"peak"``: the score of ``"share"``, kept from ``alpha`` times the query block's largest on.
            ``"flashprefill"``: the published rule (arXiv 2603.06199): energies of block means, summed over the block's
            queries, kept from ``alpha`` times the largest on.
            ``"topk"``, ``"topp"``: baselines to compare with, slow to select. The first drops the fraction ``alpha`` of the
            visible blocks that have the smallest shares; the second drops the blocks with the least mass, as the same
            probe estimates it, as long as they hold less than ``alpha`` of it together.
        pool_size: Tokens averaged into one pooled key by every selector but ``"flashprefill"``: 4, 8, 16 or 32. Half as many
            cost twice the time and find answers that a coarser pool averages away.
        query_stride: Of how many queries one probes, for the same selectors: a power of two up to 64. It is the longest,
            which can be certain of a key where shorter ones spread their attention.
        block_size: Tokens in a query block and in a key block, 64 or 128.
        sink_blocks: Blocks at the start of the prompt that are always kept, >= 0. None: 1, and 2 for ``"flashprefill"``.
        window_blocks: Blocks up to and including the query's own that are always kept, >= 1. None: 2, and 4 for
            ``"flashprefill"``.
        dense_tail_blocks: Query blocks at the end of the prompt that see every block, >= 0. In a prefill in chunks each
            chunk's end counts, because a chunk does not tell whether another follows.
        correction: Whether each dropped block takes part in the softmax through a mean key and a mean value, weighted by its
            tokens. None: True, and False for ``"flashprefill"``, whose first version has no correction.
        mean_blocks: Blocks averaged into one such mean, 1, 2, 4, 8 or 16, counted back from the query block. 1 is the
            correction of FlashPrefill V2; 8 leaves an eighth of the means to attend and answers as well (docs/results.md).
        min_seq_len: Tokens. A model's call with fewer queries than this stays dense, >= 0; or ``"auto"``: from where sparse
            prefill was faster when ``warmup`` measured it on this machine, else 12288 tokens on Hopper GPUs, 8192 on CPUs and
            16384 on other GPUs and for small layers. With ``"auto"`` a chunk of 1024 or more queries counts as the whole prompt
            whose queries see as many keys, so that chunks run sparse, too, once enough stands before them. On one H200 the
            operator was 0.92 times as fast as torch's dense attention at 8192 tokens and 1.51 times at 12288; the other numbers
            are guesses.
        dense_layers: Layers, counted from 0, that stay dense.
        layer_alphas: One alpha for each layer of a model, as ``calibrate`` finds them; they replace ``alpha``. None: all
            layers have ``alpha``. The operator by itself knows no layers and takes ``alpha``.
        audit_rows: Query rows of each sparse call of a layer, spread over the prompt, that are compared with exact attention,
            >= 0; ``prefill_stats`` says how much of their attention fell on dropped blocks. 0 compares none. The cost grows
            with rows times tokens, and the keys are read once more.
        audit_limit: Share of the attention, from 0 to 1, averaged over the audited rows and heads of a layer. A layer that
            drops more brings one warning.
        backend: ``"triton"`` (NVIDIA GPU), ``"torch"`` (any device), ``"reference"`` (the specification, slow), or
            ``"auto"``: triton where it can run, else torch.

    Raises:
        ValueError: A value is out of its range; names the field, the value and the range.
        TypeError: A value is of the wrong type.
    """

    alpha: float | None = None
    selector: str = "blend"
    pool_size: int = 4
    query_stride: int = 8
    block_size: int = 128
    sink_blocks: int | None = None
    window_blocks: int | None = None
    dense_tail_blocks: int = 2
    correction: bool | None = None
    mean_blocks: int = 8
    min_seq_len: int | str = AUTO
    dense_layers: tuple[int, ...] = ()
    layer_alphas: tuple[float, ...] | None = None
    audit_rows: int = 0
    audit_limit: float = 0.05
    backend: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", None if self.alpha is None else _share("alpha", self.alpha))
        object.__setattr__(self, "audit_limit", _share("audit_limit", self.audit_limit))
        _require_choice("selector", self.selector, SELECTORS)
        _require_choice("backend", self.backend, BACKENDS)
        # Kept as Python's own integers, which alone Triton and JSON know.
        for name, choices in CHOICES.items():
            object.__setattr__(self, name, _integer_choice(name, getattr(self, name), choices))
        for name, least in (("sink_blocks", 0), ("window_blocks", 1), ("dense_tail_blocks", 0), ("audit_rows", 0)):
            if name not in OF_FINER_PROBES or getattr(self, name) is not None:
                object.__setattr__(self, name, _integer(name, getattr(self, name), least))
        object.__setattr__(self, "min_seq_len", _auto_or_integer("min_seq_len", self.min_seq_len, 0))
        if self.correction is not None and not isinstance(self.correction, bool):
            raise TypeError(f"correction must be True, False or None, got {self.correction!r}")
        layers = _sequence("dense_layers", self.dense_layers, "layer numbers")
        object.__setattr__(self, "dense_layers", tuple(_integer("dense_layers", layer, 0) for layer in layers))
        if self.layer_alphas is not None:
            alphas = _sequence("layer_alphas", self.layer_alphas, "numbers from 0 to 1")
            object.__setattr__(self, "layer_alphas", tuple(_share("layer_alphas", alpha) for alpha in alphas))
            if not alphas:
                raise ValueError("layer_alphas must hold one number for each layer or be None, got none")

    def resolved(self) -> FlashPrefillConfig:
        """The same settings with what None stands for in its place; a patched model's settings always are."""
        own = OF_PUBLISHED_RULE if self.selector == "flashprefill" else OF_FINER_PROBES
        own = {"alpha": DEFAULT_ALPHAS[self.selector]} | own
        missing = {name: value for name, value in own.items() if getattr(self, name) is None}
        return replace(self, **missing) if missing else self

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; ``FlashPrefillConfig(**d)`` restores them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_json(self, path: str | os.PathLike) -> None:
        """Write the settings to a JSON file, which ``from_json`` reads and ``patch_model(config=path)`` takes."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> FlashPrefillConfig:
        """The settings in a JSON file; fields that it leaves out have their defaults.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not a JSON object of settings, or a value is out of its range.
            TypeError: A value is of the wrong type.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or not set(values) <= set(known):
            found = sorted(set(values) - set(known)) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{path} must hold a JSON object with fields of {known}, got {found}")
        return cls(**values)


def _share(name: str, value: Any) -> float:
    if not is_number(value, numbers.Real):
        raise TypeError(f"{name} must be a number from 0 to 1, got {value!r}")
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
    return float(value)


def _sequence(name: str, value: Any, entries: str) -> tuple:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a sequence of {entries}, got {value!r}")
    return tuple(value)


def _require_choice(name: str, value: Any, choices: tuple) -> None:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _integer_choice(name: str, value: Any, choices: tuple[int, ...]) -> int:
    if not is_number(value, numbers.Integral):
        raise TypeError(f"{name} must be one of {choices}, got {value!r}")
    _require_choice(name, value, choices)
    return int(value)


def _auto_or_integer(name: str, value: Any, least: int) -> int | str:
    if isinstance(value, str) and value == AUTO:
        return AUTO
    if not is_number(value, numbers.Integral):
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f'{name} must be "{AUTO}" or a whole number >= {least}, got {value!r}')
    return _integer(name, value, least)


def _integer(name: str, value: Any, least: int) -> int:
    if not is_number(value, numbers.Integral):
        raise TypeError(f"{name} must hold whole numbers >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value!r}")
    return int(value)
