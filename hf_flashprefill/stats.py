"""What the prefill calls of a patched model did: counts, reasons and densities, read only when asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .block_index import BlockIndex


@dataclass
class _LayerRecord:
    sparse_calls: int = 0
    dense_calls: Counter = field(default_factory=Counter)
    kept: torch.Tensor | None = None
    visible: int | torch.Tensor = 0

    def add_index(self, index: BlockIndex) -> None:
        kept = index.counts.sum((0, 2), dtype=torch.int64)
        visible = index.visible_total()
        # A layer that moved to another device starts from what it had there.
        self.kept = kept if self.kept is None else self.kept.to(kept.device) + kept
        if isinstance(self.visible, torch.Tensor):
            self.visible = self.visible.to(kept.device)
        self.visible = self.visible + visible


# Keyed by the attention module itself: a deep copy is another module and starts empty, and a deleted model takes its
# records with it.
_RECORDS: WeakKeyDictionary[nn.Module, _LayerRecord] = WeakKeyDictionary()


def record_dense(module: nn.Module, reason: str, calls: int = 1) -> None:
    _record(module).dense_calls[reason] += calls


def record_sparse(module: nn.Module, calls: int = 1) -> _LayerRecord:
    record = _record(module)
    record.sparse_calls += calls
    return record


def _record(module: nn.Module) -> _LayerRecord:
    return _RECORDS.setdefault(module, _LayerRecord())


@dataclass(frozen=True)
class LayerStats:
    """One attention layer.

    Attributes:
        layer: Number of the layer.
        sparse_calls: Calls that ran sparse.
        dense_calls: Calls that stayed dense, by reason.
        density: Kept over causally visible key blocks, all sparse calls together; None if there were none.
        head_density: The same for each query head.
    """

    layer: int
    sparse_calls: int
    dense_calls: dict[str, int]
    density: float | None
    head_density: list[float]


@dataclass(frozen=True)
class PrefillStats:
    """All layers of a model, in order. ``print`` it for a table; ``to_dict`` for plain values."""

    layers: list[LayerStats]

    @property
    def sparse_calls(self) -> int:
        """Layer calls that ran sparse."""
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Layer calls that stayed dense, by reason."""
        return dict(sum((Counter(layer.dense_calls) for layer in self.layers), Counter()))

    @property
    def density(self) -> float | None:
        """Mean density of the layers that ran sparse; None if none did."""
        known = [layer.density for layer in self.layers if layer.density is not None]
        return sum(known) / len(known) if known else None

    def to_dict(self) -> dict:
        return {
            "density": self.density,
            "sparse_calls": self.sparse_calls,
            "dense_calls": self.dense_calls,
            "layers": [vars(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        lines = ["layer  sparse   dense  density  head min-max"]
        for layer in self.layers:
            density = "-" if layer.density is None else f"{layer.density:.3f}"
            heads = f"{min(layer.head_density):.3f}-{max(layer.head_density):.3f}" if layer.head_density else "-"
            dense = sum(layer.dense_calls.values())
            lines.append(f"{layer.layer:5d} {layer.sparse_calls:7d} {dense:7d}  {density:>7}  {heads}")
        lines += [f"dense because: {reason} ({count})" for reason, count in sorted(self.dense_calls.items())]
        return "\n".join(lines)


def prefill_stats(model: nn.Module) -> PrefillStats:
    """What the attention layers of ``model`` have done since it was patched, or since ``reset_prefill_stats``.

    Waits for the device. Layers that were never called are left out.
    """
    layers = []
    for module in model.modules():
        if module in _RECORDS:
            layers.append(layer_stats(module, getattr(module, "layer_idx", len(layers))))
    return PrefillStats(layers)


def layer_stats(module: nn.Module, number: int, dense_calls: Counter | None = None) -> LayerStats:
    """What one attention layer has done, as layer ``number``; ``dense_calls`` are further ones, counted elsewhere."""
    record = _RECORDS.get(module) or _LayerRecord()
    heads = []
    if record.kept is not None:
        # Every head sees the same blocks.
        visible = max(int(record.visible), 1)
        heads = [kept / visible for kept in record.kept.tolist()]
    return LayerStats(
        layer=number,
        sparse_calls=record.sparse_calls,
        dense_calls=dict(record.dense_calls + (dense_calls or Counter())),
        density=sum(heads) / len(heads) if heads else None,
        head_density=heads,
    )


def reset_prefill_stats(model: nn.Module) -> None:
    """Forget what the layers of ``model`` have done."""
    for module in model.modules():
        reset_layer(module)


def reset_layer(module: nn.Module) -> None:
    _RECORDS.pop(module, None)
