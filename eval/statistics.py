"""Differences between two states of a model on the same prompts, with their uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Two-sided 95 % of a normal distribution.
Z95 = statistics.NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    estimate: float
    low: float
    high: float


class Rise(NamedTuple):
    """A relative rise (0.01 is 1 %) and its standard error; None where one group alone cannot tell."""

    rise: float
    standard_error: float | None


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """Change in the share of right answers to the same questions, ``after`` minus ``before``.

    The interval is Agresti and Min's (2005), which adds half a question to each of the four cells of the paired table:
    unlike the usual one it does not shrink to nothing when no answer changed. It takes questions as independent.

    Raises:
        ValueError: The lists differ in length or are empty.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"before and after must be equally long and not empty, got {len(before)} and {len(after)}")
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    count = len(before) + 2
    centre = (gained - lost) / count
    half = Z95 * math.sqrt(lost + gained + 1 - (gained - lost) ** 2 / count) / count
    return Interval((gained - lost) / len(before), max(-1.0, centre - half), min(1.0, centre + half))


def perplexity_rise(differences: Sequence[float], weights: Sequence[float] | None = None) -> Rise:
    """Relative rise of a perplexity from paired differences of mean negative log-likelihoods.

    Args:
        differences: Nats per token, after minus before, one per group of neighbouring tokens. Groups should be long
            enough to be nearly independent; single tokens are not.
        weights: Tokens of each group; equal if None.

    Returns:
        ``exp(weighted mean difference) - 1`` and its standard error by the delta method, from the spread of the groups.
    """
    weights = [1.0] * len(differences) if weights is None else weights
    total = sum(weights)
    mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / total
    count = len(differences)
    if count < 2:
        return Rise(math.expm1(mean), None)
    spread = sum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True))
    return Rise(math.expm1(mean), math.exp(mean) * math.sqrt(count / (count - 1) * spread) / total)


def paired_mean(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean of paired differences and its standard error, which a single one does not have."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    return mean, statistics.stdev(differences) / math.sqrt(len(differences))
