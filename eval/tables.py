"""What summaries say and how tables put it: means, densities, perplexities, columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hf_flashprefill import FlashPrefillConfig


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows])


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def densities(rows: Sequence[dict]) -> dict[str, Any]:
    """For summaries: the density of the rows that ran sparse, and how many stayed dense."""
    return {"density": mean([row["density"] for row in rows]), "dense": sum(row["density"] is None for row in rows)}


def describe(config: FlashPrefillConfig | dict[str, Any]) -> str:
    """Selector and threshold, for titles; ``config`` may be what a result holds."""
    fields = config if isinstance(config, dict) else config.to_dict()
    alphas = fields.get("layer_alphas")
    alpha = f"{min(alphas):g} to {max(alphas):g} by layer" if alphas else f"{fields['alpha']:g}"
    return f"selector {fields['selector']}, alpha {alpha}"


def format_density(density: float | None) -> str:
    return "dense" if density is None else f"{density:.3f}"


def format_densities(summary: dict, counted: str) -> str:
    """What ``densities`` found, if the field ``counted`` says of how many rows; ``dense`` is missing in older results."""
    text, dense = format_density(summary["density"]), summary.get("dense")
    return f"{text}, {dense} of {summary[counted]} dense" if dense and summary["density"] is not None else text


def format_perplexity(nll: float) -> str:
    """The perplexity of a mean negative log-likelihood, which an untrained model can make too large for a float."""
    return f"{math.exp(nll):.2f}" if nll < 20 else f"e^{nll:.1f}"


def format_rise(rise: float, standard_error: float | None) -> str:
    return f"{rise:+.2%}" + ("" if standard_error is None else f" ± {standard_error:.2%}")
