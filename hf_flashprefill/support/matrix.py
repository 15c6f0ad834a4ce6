"""The support matrix: every situation in every family on every base implementation, patched against unpatched."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..fitting import UnsupportedModelError
from ..patch import patched
from ..seam import SeamPart
from ..stats import PrefillStats, prefill_stats
from .families import FAMILIES, tiny_model
from .situations import SITUATIONS, Outcome, Situation

# The base implementations, each with the families it is tried on; none means all.
BASES: dict[str, tuple[str, ...]] = {"sdpa": (), "eager": (), "flex_attention": ("llama", "mistral", "gemma3")}
SETTINGS = {"min_seq_len": 32, "block_size": 64}

# Every generation has these; they say nothing about a situation.
EVERYDAY = ("decode", "shorter than min_seq_len")


@dataclass(frozen=True)
class Cell:
    """What one situation did in one model.

    Attributes:
        sparse_layers: Attention layers with a sparse call.
        layers: Attention layers called.
        reasons: Reasons of dense calls, without decode and short calls.
        not_run: Why the unpatched model cannot run it, or why it cannot be patched; None if neither.
        wrong: What differs from the unpatched model at alpha=0, or was not counted; None if nothing.
    """

    sparse_layers: int = 0
    layers: int = 0
    reasons: tuple[str, ...] = ()
    not_run: str | None = None
    wrong: str | None = None

    @property
    def verdict(self) -> str:
        """ "sparse", "part sparse", "dense", "n/a" or "WRONG"."""
        if self.wrong is not None:
            return "WRONG"
        if self.not_run is not None:
            return "n/a"
        if not self.sparse_layers:
            return "dense"
        return "part sparse" if self.reasons else "sparse"


Column = dict[str, Cell]


def columns(families: Iterable[str] = FAMILIES, bases: Iterable[str] = tuple(BASES)) -> Iterator[tuple[str, str]]:
    """The pairs of family and base implementation that the matrix covers."""
    for base in bases:
        yield from ((family, base) for family in families if not BASES[base] or family in BASES[base])


def check_column(family: str, base: str, situations: Iterable[str] = SITUATIONS) -> Column:
    """One cell for each situation, by its name; a family's model is made once."""
    tried = [
        situation
        for situation in (SITUATIONS[name] for name in situations)
        # What is compiled does not depend on the base implementation.
        if (not situation.families or family in situation.families) and not (situation.compiled and base != "sdpa")
    ]
    try:
        model = tiny_model(family, base)
    # The installed transformers does not have the family, or refuses the implementation for it.
    except (ValueError, AttributeError) as error:
        return {situation.name: Cell(not_run=_one_line(error)) for situation in tried}
    return {situation.name: check(model, situation) for situation in tried}


def check(model: PreTrainedModel, situation: Situation) -> Cell:
    """Run one situation unpatched and, with alpha=0, patched; ``model`` is left as it was."""
    with torch.set_grad_enabled(situation.with_gradients):
        try:
            expected = _run(model, situation)
        # Whatever the unpatched model raises is its own affair and goes into the table.
        except Exception as error:
            return Cell(not_run=_one_line(error))
        try:
            with patched(model, alpha=0, **SETTINGS), _counted_calls(model) as calls:
                actual = _run(model, situation)
                stats = prefill_stats(model)
        except UnsupportedModelError as error:
            return Cell(not_run=f"`patch_model` refuses: {_one_line(error)}")
        except Exception as error:
            return Cell(wrong=f"raises {_one_line(error)}")
        wrong = _difference(actual, expected)
        if wrong is not None and SeamPart.of(model).base == "flex_attention" and _agrees_with_sdpa(model, situation, actual):
            return Cell(not_run="unpatched, flex_attention gives other numbers than sdpa; patched it gives those of sdpa")
    # Hooks are no part of a compiled graph.
    if wrong is None and not situation.compiled:
        wrong = _uncounted(stats, calls, SeamPart.of(model).config)
    return Cell(
        sparse_layers=sum(layer.sparse_calls > 0 for layer in stats.layers),
        layers=len(stats.layers),
        reasons=tuple(sorted(set(stats.dense_calls) - set(EVERYDAY))),
        wrong=wrong,
    )


def _agrees_with_sdpa(model: PreTrainedModel, situation: Situation, actual: Outcome) -> bool:
    part = SeamPart.of(model)
    previous = part.implementation
    part.set_implementation("sdpa")
    try:
        return _difference(actual, _run(model, situation)) is None
    finally:
        part.set_implementation(previous)


def _run(model: PreTrainedModel, situation: Situation) -> Outcome:
    torch.manual_seed(0)
    if situation.compiled:
        torch.compiler.reset()
        return situation.run(model)
    # flex_attention compiles itself, for half a minute a shape on a CPU; uncompiled it computes the same.
    with torch.compiler.set_stance("force_eager"):
        return situation.run(model)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:100] + '...' if len(text) > 100 else text}".rstrip(": ")


@contextlib.contextmanager
def _counted_calls(model: PreTrainedModel) -> Iterator[Counter]:
    """Forward calls of every attention layer, counted without our help."""
    calls: Counter = Counter()

    def count(module, *_):
        calls[module.layer_idx] += 1

    handles = [module.register_forward_pre_hook(count) for module in SeamPart.of(model).attention_modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _uncounted(stats: PrefillStats, calls: Counter, config: PretrainedConfig) -> str | None:
    counted = {layer.layer: layer.sparse_calls + sum(layer.dense_calls.values()) for layer in stats.layers}
    if counted != dict(calls):
        return f"calls per layer {dict(calls)}, counted {counted}"
    full = [layer for layer in stats.layers if not _has_window(config, layer.layer)]
    if any(layer.density not in (None, 1) for layer in full):
        return f"density {stats.density} at alpha=0"
    return None


def _has_window(config: PretrainedConfig, layer: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None and (kinds is None or kinds[layer] == "sliding_attention")


def _difference(actual: Outcome, expected: Outcome) -> str | None:
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != theirs.shape:
            return f"result {number} has shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"result {number}: other tokens"
            continue
        if not ours.isfinite().all() and theirs.isfinite().all():
            return f"result {number} is not finite"
        # Float32, two layers: exact methods differ by the order of summation only.
        error = (ours - theirs).abs().nan_to_num().max().item()
        allowed = 2e-5 * max(1.0, theirs.abs().nan_to_num().max().item())
        if error > allowed:
            return f"result {number} is off by {error:.1e}"
    return None
