"""Which points eval.selection measures: selectors with their thresholds, written as on the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from eval.commands import UsageError
from eval.options import parse_field
from eval.oracle import ORACLES, oracle_selection
from hf_flashprefill import FlashPrefillConfig, patched
from hf_flashprefill.config import SELECTORS, SORTING_SELECTORS

# Thresholds of different selectors do not compare. Each list runs from little loss to much of it at 8K to 64K tokens.
DEFAULT_CURVES = (
    "blend:0.003,0.006,0.01,0.02,0.05",
    "blend:0.006,0.01,0.02,0.05@query_stride=4",
    "blend:0.006,0.01,0.02,0.05@pool_size=8",
    "blend:0.006,0.01,0.02,0.05@correction=false",
    "share:0.005,0.01,0.02",
    "peak:0.01,0.02,0.05,0.1,0.2",
    "flashprefill:0.01,0.02,0.05,0.1,0.2,0.4",
    "topk:0.5,0.7,0.8,0.9",
    "topp:0.01,0.02,0.05,0.1",
    "oracle-mean:0.001,0.002,0.005,0.01,0.02",
    "oracle-max:0.01,0.02,0.05,0.1,0.2",
)


@dataclass(frozen=True)
class Point:
    """One threshold of one curve.

    Attributes:
        curve: As on the command line, without the thresholds: ``"share@pool_size=4"``.
        oracle: Which oracle selects, or None: the config's selector does.
        config: Settings, with the threshold as ``alpha``.
    """

    curve: str
    oracle: str | None
    config: FlashPrefillConfig

    @contextlib.contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """The model patched with this point's selection, for a ``with`` block."""
        selection = contextlib.nullcontext() if self.oracle is None else oracle_selection(self.oracle)
        with selection, patched(model, config=self.config):
            yield


def parse_curves(curves: Sequence[str], base: FlashPrefillConfig) -> list[Point]:
    """The points of curves ``SELECTOR:ALPHA[,ALPHA...][@FIELD=VALUE[,FIELD=VALUE...]]``, each once, in their order.

    Args:
        curves: SELECTOR is one of the config's or an oracle; fields are the config's.
        base: All other fields; what is None there is what suits the curve's selector.

    Raises:
        UsageError: A curve is written in another way or holds a value out of range.
    """
    return list({(point.curve, point.config.alpha): point for curve in curves for point in _points(curve, base)}.values())


def _points(curve: str, base: FlashPrefillConfig) -> list[Point]:
    rule, _, settings = curve.partition("@")
    selector, colon, alphas = rule.partition(":")
    if not colon or selector not in (*SELECTORS, *ORACLES):
        known = ", ".join((*SELECTORS, *ORACLES))
        raise UsageError(f"--curves takes SELECTOR:ALPHA,ALPHA...[@FIELD=VALUE,...], SELECTOR one of {known}, got {curve!r}")
    try:
        thresholds = [float(alpha) for alpha in alphas.split(",")]
        fields = dict(parse_field(setting) for setting in settings.split(",") if setting)
        if fields.keys() & {"alpha", "layer_alphas", "selector"}:
            raise ValueError("the selector and its alphas stand before the @")
        if selector in SELECTORS:
            fields["selector"] = selector
        elif base.selector in SORTING_SELECTORS:
            # They would select on a backend of their own, past the oracle's.
            fields["selector"] = "share"
        configs = [replace(base, alpha=alpha, **({"layer_alphas": None} | fields)).resolved() for alpha in thresholds]
    except (ValueError, TypeError) as error:
        raise UsageError(f"--curves {curve}: {error}") from None
    if any(config.backend == "reference" for config in configs):
        raise UsageError(f"--curves {curve}: backend must be auto, triton or torch")
    label = f"{selector}@{settings}" if settings else selector
    return [Point(label, None if selector in SELECTORS else selector, config) for config in configs]
