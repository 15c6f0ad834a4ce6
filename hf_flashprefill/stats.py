"""What the prefill calls of a patched model did: counts, reasons and densities, read only when asked."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .audit import Alarm, HostCopy
from .block_index import BlockIndex
from .compiled_counts import CompiledCounts, audits_together
from .fitting import layer_number

# Where a patched model's attention layers keep their record. An attribute, and not a table by module, because a compiled
# graph finds its way from the module it is in to a tensor only along attributes.
ATTRIBUTE = "_block_sparse_prefill"

# Threads may prefill with one model: what is counted outside of graphs is read and written under this lock.
_COUNTING = threading.Lock()


@dataclass
class LayerRecord:
    """What one attention layer did. A deep copy or an unpickled one starts empty.

    ``revive`` is a function and its arguments that unpickling calls for the new record; None for a plain one.
    """

    revive: tuple[Callable[..., LayerRecord], tuple] | None = None
    sparse_calls: int = 0
    dense_calls: dict[str, int] = field(default_factory=dict)
    kept: torch.Tensor | None = None
    visible: int | torch.Tensor = 0
    # ``RowAudit.dropped`` of all audited calls together.
    audit: torch.Tensor | None = None
    audit_limit: float = 1.0
    audit_copy: HostCopy | None = None
    # Made when it is needed: a compiled graph that makes a record can make no such object.
    alarm: Alarm | None = None
    # Calls of compiled graphs, which are in none of the above.
    compiled: CompiledCounts | None = None

    def __deepcopy__(self, memo: dict) -> LayerRecord:
        return LayerRecord(self.revive)

    def __reduce__(self) -> tuple:
        return self.revive or (LayerRecord, ())

    @property
    def was_called(self) -> bool:
        return bool(self.sparse_calls or self.dense_calls) or (self.compiled is not None and self.compiled.was_called())

    def add_index(self, index: BlockIndex) -> None:
        kept, visible = index.counts.sum((0, 2), dtype=torch.int64), index.visible_total()
        with _COUNTING:
            # A layer that moved to another device starts from what it had there.
            self.kept = kept if self.kept is None else self.kept.to(kept.device) + kept
            if isinstance(self.visible, torch.Tensor):
                self.visible = self.visible.to(kept.device)
            self.visible = self.visible + visible

    def add_audit(self, dropped: torch.Tensor, limit: float) -> None:
        """``RowAudit.dropped`` of one call, and the share from which on it is worth a warning."""
        with _COUNTING:
            self.audit = dropped if self.audit is None else audits_together(self.audit.to(dropped.device), dropped)
            self.audit_limit = limit

    def check_audit(self) -> None:
        """Warn if the audit of earlier calls is above its limit, as far as that has reached the host. Never waits."""
        # What a CUDA graph captures may not ask whether a copy has arrived.
        is_captured = self.audit.is_cuda and torch.cuda.is_current_stream_capturing()
        if is_captured or (self.alarm is not None and self.alarm.has_rung):
            return
        arrived = None if self.audit_copy is None else self.audit_copy.arrived()
        if arrived is not None:
            self.warn_above_limit(_mean_dropped(arrived))
        if arrived is not None or self.audit_copy is None:
            self.audit_copy = HostCopy(self.audit)

    def warn_above_limit(self, dropped: float) -> None:
        if self.alarm is None:
            self.alarm = Alarm()
        self.alarm.check(dropped, self.audit_limit)


def _mean_dropped(audit: torch.Tensor) -> float:
    total, calls, _ = audit.tolist()
    return total / max(calls, 1)


# Records of layers that are no longer patched, so that they can still be read.
_PAST: WeakKeyDictionary[nn.Module, LayerRecord] = WeakKeyDictionary()


def attach_record(module: nn.Module, revive: tuple[Callable[..., LayerRecord], tuple] | None) -> None:
    """Give a layer that is being patched its record: the one it has or had, else an empty one."""
    record = module.__dict__.get(ATTRIBUTE) or _PAST.pop(module, None) or LayerRecord()
    compiled = record.compiled or CompiledCounts.for_layer(module)
    setattr(module, ATTRIBUTE, replace(record, revive=revive, compiled=compiled))


def has_record(module: nn.Module) -> bool:
    """Whether the layer was patched, or called under a registered name before."""
    return ATTRIBUTE in module.__dict__


def detach_record(module: nn.Module) -> None:
    """Take the record off a layer that is no longer patched; ``prefill_stats`` still finds it."""
    record = module.__dict__.pop(ATTRIBUTE, None)
    if record is not None:
        _PAST[module] = record


Records = list[tuple[nn.Module, "LayerRecord | None", "LayerRecord | None"]]


def saved_records(model: nn.Module) -> Records:
    """What ``restore_records`` needs to undo later changes of the records of ``model``."""
    return [(module, module.__dict__.get(ATTRIBUTE), _PAST.get(module)) for module in model.modules()]


def restore_records(saved: Records) -> None:
    """Put the records back as they were."""
    for module, attached, past in saved:
        for home, key, record in ((module.__dict__, ATTRIBUTE, attached), (_PAST, module, past)):
            home.pop(key, None)
            if record is not None:
                home[key] = record


def record_dense(module: nn.Module, reason: str, query: torch.Tensor | None = None, calls: int = 1) -> None:
    """Count dense calls; a compiled graph needs their ``query``, [B, Hq, Sq, D]."""
    if not torch.compiler.is_compiling():
        counts = _record(module).dense_calls
        with _COUNTING:
            counts[reason] = counts.get(reason, 0) + calls
    elif reason != "decode":
        _compiled_counts(_record(module), query).add_dense(reason)


def record_sparse(module: nn.Module, calls: int = 1) -> LayerRecord:
    """Count sparse calls and return where its blocks are to be added."""
    record = _record(module)
    with _COUNTING:
        record.sparse_calls += calls
    return record


def record_compiled_sparse(module: nn.Module, query: torch.Tensor, kept: torch.Tensor, visible: torch.Tensor) -> LayerRecord:
    """Count a sparse call of a compiled graph: kept blocks of each head, int64 [Hq], and visible blocks of one head, int64 [].

    Returns the record, for the call's audit.
    """
    record = _record(module)
    _compiled_counts(record, query).add_sparse(kept, visible)
    return record


def record_compiled_audit(record: LayerRecord, dropped: torch.Tensor, limit: float) -> None:
    """``RowAudit.dropped`` of the call that ``record_compiled_sparse`` counted, and the share worth a warning."""
    record.compiled.add_audit(dropped)
    record.audit_limit = limit


def _compiled_counts(record: LayerRecord, query: torch.Tensor) -> CompiledCounts:
    if record.compiled is None:
        record.compiled = CompiledCounts.zeros(query.shape[1], query.device)
    elif not record.compiled.fits(query):
        record.compiled = record.compiled.moved(query)
    return record.compiled


def _record(module: nn.Module) -> LayerRecord:
    # A model that was loaded under a registered name, without patch_model, gets its records here.
    record = getattr(module, ATTRIBUTE, None)
    if record is None:
        record = LayerRecord()
        setattr(module, ATTRIBUTE, record)
    return record


@dataclass(frozen=True)
class LayerStats:
    """One attention layer.

    Attributes:
        layer: Number of the layer; None if its module does not say, as layers that share one cannot.
        sparse_calls: Calls that ran sparse.
        dense_calls: Calls that stayed dense, by reason.
        density: Kept over causally visible key blocks, all sparse calls together; None if there were none.
        head_density: The same for each query head.
        dropped_mass: Share of the exact attention of the audited queries that fell on dropped blocks, mean over queries,
            heads and calls; None without an audit (``audit_rows``).
        largest_dropped_mass: The largest such share of a single query and head.
    """

    layer: int | None
    sparse_calls: int
    dense_calls: dict[str, int]
    density: float | None
    head_density: list[float]
    dropped_mass: float | None = None
    largest_dropped_mass: float | None = None


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
        audited = any(layer.dropped_mass is not None for layer in self.layers)
        lines = [f"layer  sparse   dense  density  {'dropped mean, max  ' if audited else ''}head min-max"]
        for layer in self.layers:
            density = "-" if layer.density is None else f"{layer.density:.3f}"
            heads = f"{min(layer.head_density):.3f}-{max(layer.head_density):.3f}" if layer.head_density else "-"
            dense = sum(layer.dense_calls.values())
            dropped = f"{_dropped_cell(layer):>17}  " if audited else ""
            number = "-" if layer.layer is None else layer.layer
            lines.append(f"{number:>5} {layer.sparse_calls:7d} {dense:7d}  {density:>7}  {dropped}{heads}")
        lines += [f"dense because: {reason} ({count})" for reason, count in sorted(self.dense_calls.items())]
        return "\n".join(lines)


def _dropped_cell(layer: LayerStats) -> str:
    return "-" if layer.dropped_mass is None else f"{layer.dropped_mass:.4f}, {layer.largest_dropped_mass:.4f}"


def prefill_stats(model: nn.Module) -> PrefillStats:
    """What the attention layers of ``model`` have done since it was patched, or since ``reset_prefill_stats``.

    Waits for the device. Layers that were never called are left out. Warns, once, if the audit of a layer is above its limit.

    Raises:
        TypeError: ``model`` is not a torch module.
    """
    _require_module(model)
    layers = []
    for module in model.modules():
        record = _known_record(module)
        if record is not None and record.was_called:
            layers.append(layer_stats(module, layer_number(module)))
            record.warn_above_limit(layers[-1].dropped_mass or 0.0)
    return PrefillStats(layers)


def layer_stats(module: nn.Module, number: int | None, dense_calls: Counter | None = None) -> LayerStats:
    """What one attention layer has done, as layer ``number``; ``dense_calls`` are further ones, counted elsewhere."""
    record = _known_record(module) or LayerRecord()
    calls, dense, audit = record.sparse_calls, Counter(record.dense_calls), record.audit
    kept, visible = [] if record.kept is None else record.kept.tolist(), int(record.visible)
    compiled = record.compiled
    if compiled is not None:
        dense += compiled.dense_calls_by_reason()
    if compiled is not None and compiled.sparse_calls > 0:
        calls += int(compiled.sparse_calls)
        kept = [sum(counts) for counts in zip_longest(kept, compiled.kept.tolist(), fillvalue=0)]
        visible += int(compiled.visible)
        if compiled.audit[1] > 0:
            audit = compiled.audit if audit is None else audits_together(audit.to(compiled.audit.device), compiled.audit)
    # Every head sees the same blocks.
    heads = [count / max(visible, 1) for count in kept]
    return LayerStats(
        layer=number,
        sparse_calls=calls,
        dense_calls=dict(dense + (dense_calls or Counter())),
        density=sum(heads) / len(heads) if heads else None,
        head_density=heads,
        dropped_mass=None if audit is None else _mean_dropped(audit),
        largest_dropped_mass=None if audit is None else audit[2].item(),
    )


def reset_prefill_stats(model: nn.Module) -> None:
    """Forget what the layers of ``model`` have done.

    Raises:
        TypeError: ``model`` is not a torch module.
    """
    _require_module(model)
    alarm = Alarm()
    for module in model.modules():
        reset_layer(module, alarm)


def reset_layer(module: nn.Module, alarm: Alarm | None = None) -> None:
    """Forget what one attention layer has done; layers with the same ``alarm`` warn once together."""
    _PAST.pop(module, None)
    record = module.__dict__.get(ATTRIBUTE)
    if record is not None:
        setattr(module, ATTRIBUTE, LayerRecord(record.revive, alarm=alarm, compiled=CompiledCounts.for_layer(module)))


def _require_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")


def _known_record(module: nn.Module) -> LayerRecord | None:
    return module.__dict__.get(ATTRIBUTE) or _PAST.get(module)
