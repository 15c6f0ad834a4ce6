"""Alpha per layer from a target: how much of the attention on the user's own prompts the kept blocks must hold.

Each layer is measured by itself, on the output of dense layers: for every candidate alpha the backend's own selection, and
for a few query rows exact attention, so that the cost is linear in the prompt but for the dense pass. A layer gets the
largest alpha whose kept mass reaches the target. What that gives with all layers sparse at once is then audited on prompts
that took no part.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .arithmetic import exact_arithmetic, wider_dtypes
from .attention import dense_attention, dense_reason
from .attention_mass import exact_shares, kept_shares, spread_positions
from .causal_mask import CausalMask
from .checks import is_number
from .config import FlashPrefillConfig
from .crossover import AUTO, min_seq_len_of_model
from .fitting import UnsupportedModelError, layer_number
from .functional import select_in_rounds
from .geometry import PrefillGeometry
from .patch import attention_replaced
from .stats import PrefillStats, prefill_stats

# From keeping all to keeping little by any selector, each 1.76 times the one before.
ALPHAS = (0.0, *(1e-4 * 5000 ** (i / 15) for i in range(16)))
# What ``dense_reason`` says.
TOO_SHORT = "shorter than min_seq_len"


@dataclass(frozen=True)
class LayerCalibration:
    """One layer.

    Attributes:
        layer: Its number.
        alpha: The largest candidate that reaches the target.
        density: Kept over causally visible key blocks on the calibration prompts with dense layers before this one.
        mass: Share of the attention that the kept blocks hold there, mean over sampled queries and heads.
        lowest_head_mass: The same of the head that keeps least.
        held_out_density: Density on the held-out prompts with all layers sparse; None without held-out prompts.
        held_out_mass: Kept share there.
    """

    layer: int
    alpha: float
    density: float
    mass: float
    lowest_head_mass: float
    held_out_density: float | None = None
    held_out_mass: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` found. ``print`` it for a table.

    Attributes:
        config: Settings with ``layer_alphas``, for ``patch_model(model, config=...)`` or ``config.to_json(path)``.
        target: The kept share that was asked for.
        layers: The layers that can run sparse, in order; ``config.layer_alphas`` has 0 for all others.
        prompts: Prompts that the alphas follow from.
        held_out: Prompts that the result was audited on.
    """

    config: FlashPrefillConfig
    target: float
    layers: list[LayerCalibration]
    prompts: int
    held_out: int

    @property
    def held_out_mass(self) -> float | None:
        """Kept share of the attention on the held-out prompts, mean over the layers; None without such prompts."""
        return _mean([layer.held_out_mass for layer in self.layers])

    @property
    def held_out_density(self) -> float | None:
        """Density on the held-out prompts, mean over the layers; None without such prompts."""
        return _mean([layer.held_out_density for layer in self.layers])

    def __str__(self) -> str:
        lines = ["layer    alpha  density    mass  lowest head  held-out density    mass"]
        for layer in self.layers:
            known = layer.held_out_mass is not None
            held = f"{layer.held_out_density:16.3f}  {layer.held_out_mass:.4f}" if known else f"{'-':>16}  {'-':>6}"
            cells = f"{layer.alpha:7.5f}  {layer.density:7.3f}  {layer.mass:.4f}  {layer.lowest_head_mass:11.4f}"
            lines.append(f"{layer.layer:5d}  {cells}  {held}")
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    prompts: Sequence[Any],
    *,
    target: float = 0.99,
    config: FlashPrefillConfig | None = None,
    held_out: Sequence[Any] | None = None,
    alphas: Sequence[float] = ALPHAS,
    rows: int = 64,
    every_head: bool = False,
    progress: bool = True,
) -> Calibration:
    """Find the alpha of each layer that keeps ``target`` of the attention on ``prompts`` at the least density.

    The share is a mean over queries spread evenly over the prompt, those included that see every block by rule, over
    heads and prompts; it is what the audit (``audit_rows``) reports as not dropped. The model runs once per prompt, dense;
    each held-out prompt then runs once with all layers sparse. The model is left as it was, patched or not, with its
    statistics, also after an exception.

    Args:
        model: As ``patch_model`` takes it.
        prompts: Token ids, one prompt each: lists of ints, or integer tensors [S] or [1, S]. They should be as long as those
            the model will get; a few suffice.
        target: Share of the attention to keep, above 0 and below 1.
        config: All other settings, such as the selector; ``FlashPrefillConfig()`` if None. Prompts shorter than its
            ``min_seq_len``, which would not run sparse, are left out.
        held_out: Prompts to audit the result on. None takes every fourth of ``prompts``, at least one, unless there is
            only one; an empty list audits nothing.
        alphas: Candidates, from 0 to 1. 0 is always among them, so every target can be reached.
        rows: Queries sampled from each prompt, >= 1.
        every_head: Whether every head of a layer by itself must reach the target, not only their mean.
        progress: Whether to show a progress bar.

    Returns:
        The settings and a table of the layers.

    Raises:
        TypeError: A prompt is neither a list of ints nor an integer tensor, or the model is no transformers model.
        ValueError: ``target``, ``alphas`` or ``rows`` is out of its range, no prompt is left, or the model makes NaN.
        UnsupportedModelError: The model does not fit, or none of its layers would run sparse.
    """
    config = FlashPrefillConfig() if config is None else config
    if not isinstance(config, FlashPrefillConfig):
        raise TypeError(f"config must be a FlashPrefillConfig, got {type(config).__name__}")
    config = config.resolved()
    measurement = _Measurement(_checked_candidates(target, alphas, rows), rows)
    fitting, audited = _split(_checked_prompts(prompts, "prompts"), held_out, _least_length(config))
    with tqdm(total=len(fitting) + len(audited), desc="calibrate", unit="prompt", disable=not progress) as bar:
        # One alpha for all, because whatever alphas there are may be meant for another number of layers.
        with attention_replaced(model, replace(config, layer_alphas=None), measurement.attention) as inner:
            longest = max(fitting, key=lambda prompt: prompt.shape[1])
            least = min_seq_len_of_model(config, inner.config.get_text_config(decoder=True), inner.dtype, inner.device)
            if longest.shape[1] < least:
                raise _too_short(config, longest)
            if config.min_seq_len == AUTO and not least:
                # Only the layers know, as where their shapes differ. If the longest is too short, the others need not run.
                fitting = [longest, *(prompt for prompt in fitting if prompt is not longest)]
                _run(inner, fitting[:1], bar)
                if measurement.dense == {TOO_SHORT} and not measurement.layers:
                    raise _too_short(config, longest)
                _run(inner, fitting[1:], bar)
            else:
                _run(inner, fitting, bar)
        if TOO_SHORT in measurement.dense and not measurement.layers:
            raise _too_short(config, longest)
        if not measurement.layers:
            raise UnsupportedModelError(f"{type(inner).__name__}: no layer would run sparse: {measurement.reasons()}")
        chosen = [sums.choose(layer, target, every_head) for layer, sums in sorted(measurement.layers.items())]
        _check_numbers(inner, {layer.layer: layer.mass for layer in chosen})
        # A layer that was not measured does not run sparse; should it ever, it keeps all.
        layer_alphas = dict.fromkeys(range(inner.config.get_text_config(decoder=True).num_hidden_layers), 0.0)
        layer_alphas |= {layer.layer: layer.alpha for layer in chosen}
        result = replace(config, layer_alphas=tuple(layer_alphas.values()))
        if audited:
            # A number is wanted here, not a warning.
            with attention_replaced(model, replace(result, audit_rows=rows, audit_limit=1.0)):
                _run(inner, audited, bar)
                chosen = _with_audit(chosen, prefill_stats(inner))
            _check_numbers(inner, {layer.layer: layer.held_out_mass for layer in chosen})
    return Calibration(result, target, chosen, len(fitting), len(audited))


@dataclass
class _LayerSums:
    """Sums over the prompts of one layer, for A candidates: kept share [A, Hq] and kept blocks [A], on the device."""

    alphas: Sequence[float]
    mass: torch.Tensor | float = 0.0
    kept: torch.Tensor | int = 0
    visible: int = 0
    prompts: int = 0

    def add(self, mass: torch.Tensor, kept: torch.Tensor, visible: int) -> None:
        self.mass, self.kept = self.mass + mass, self.kept + kept
        self.visible += visible
        self.prompts += 1

    def choose(self, layer: int, target: float, every_head: bool) -> LayerCalibration:
        """The largest alpha that reaches the target; candidates rise from 0, which keeps all."""
        heads = self.mass.double().cpu() / self.prompts
        means, lowest = heads.mean(1), heads.amin(1)
        reached = (lowest if every_head else means) >= target
        i = int(reached.nonzero().max()) if reached.any() else 0
        density = int(self.kept[i]) / self.visible
        return LayerCalibration(layer, self.alphas[i], density, means[i].item(), lowest[i].item())


@dataclass
class _Measurement:
    """Stands in for the attention of a model: attends densely, and measures every candidate where a call could be sparse."""

    alphas: Sequence[float]
    rows: int
    layers: dict[int, _LayerSums] = field(default_factory=dict)
    dense: set[str] = field(default_factory=set)

    def reasons(self) -> str:
        return ", ".join(sorted(self.dense)) or "their attention was not called"

    def attention(self, settings, module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        reason = dense_reason(settings, module, query, key, value, attention_mask, dropout, kwargs)
        if isinstance(attention_mask, CausalMask):
            key, value = attention_mask.used(key), attention_mask.used(value)
            if reason is None and attention_mask.sliding_window is not None:
                reason = "sliding window"
        if reason is None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            number = layer_number(module)
            if number is None:
                raise UnsupportedModelError(f"{type(module).__name__} does not say which layer it is, so it can get no alpha")
            sums = self.layers.setdefault(number, _LayerSums(self.alphas))
            sums.add(*self.measure(settings.config, query, key, scale, kwargs.get("s_aux")))
        else:
            self.dense.add(reason)
        return dense_attention(
            settings.base, module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    def measure(
        self, config: FlashPrefillConfig, query: torch.Tensor, key: torch.Tensor, scale: float, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Kept share [A, Hq], kept blocks of all heads [A], and the visible blocks of all heads, of one whole prompt."""
        heads, query_len, kv_len = query.shape[1], query.shape[2], key.shape[2]
        geometry = PrefillGeometry(1, query_len, kv_len, kv_len - query_len, config.block_size)
        positions = spread_positions(geometry, self.rows, query.device)
        with exact_arithmetic(query.device):
            shares = exact_shares(query, key, geometry, positions, scale=scale, sinks=sinks)
            # What a sink takes is not lost: dense attention gives it the same.
            mass = (1 - shares.sum(-1)).expand(len(self.alphas), -1, -1, -1).clone()
            kept = torch.zeros(len(self.alphas), dtype=torch.int64, device=query.device)
            for i, alpha in enumerate(self.alphas):
                for index in select_in_rounds(query, key, geometry, replace(config, alpha=alpha), scale):
                    mass[i] += kept_shares(shares, positions, index)
                    kept[i] += index.counts.sum()
        visible = int(geometry.visible_counts(torch.device("cpu")).sum())
        return mass.mean((1, 3)), kept, visible * heads


def _checked_candidates(target: float, alphas: Sequence[float], rows: int) -> tuple[float, ...]:
    if not is_number(target, (int, float)) or not 0 < target < 1:
        raise ValueError(f"target must be a number above 0 and below 1, got {target!r}")
    if not is_number(rows) or rows < 1:
        raise ValueError(f"rows must be a whole number >= 1, got {rows!r}")
    try:
        # The same checks as for an alpha.
        checked = FlashPrefillConfig(layer_alphas=(0.0, *alphas)).layer_alphas
    except (TypeError, ValueError):
        raise ValueError(f"alphas must be numbers from 0 to 1, got {alphas!r}") from None
    return tuple(sorted(set(checked)))


def _checked_prompts(prompts: Sequence[Any], name: str) -> list[torch.Tensor]:
    """Each prompt as int64 [1, S]."""
    if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__iter__"):
        raise TypeError(f"{name} must be a sequence of token-id lists or tensors, got {type(prompts).__name__}")
    checked = []
    for prompt in prompts:
        try:
            ids = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError):
            ids = torch.empty(0)
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(
                f"{name} must hold lists of token ids or integer tensors [S] or [1, S], got {type(prompt).__name__}"
            )
        checked.append(ids.long()[None])
    return checked


def _split(
    prompts: list[torch.Tensor], held_out: Sequence[Any] | None, least: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Prompts to measure and to audit, those that are long enough."""
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    long = [prompt for prompt in prompts if prompt.shape[1] >= least]
    if not long:
        longest = max(prompt.shape[1] for prompt in prompts)
        raise ValueError(
            f"prompts must hold one of at least {least} tokens, the longest has {longest}; shorter ones stay dense "
            "(min_seq_len) or see every block by rule (sink_blocks, window_blocks, dense_tail_blocks)"
        )
    if held_out is not None:
        return long, [prompt for prompt in _checked_prompts(held_out, "held_out") if prompt.shape[1] >= least]
    if len(long) == 1:
        return long, []
    audited = long[3::4] or long[-1:]
    kept = {id(prompt) for prompt in audited}
    return [prompt for prompt in long if id(prompt) not in kept], audited


def _least_length(config: FlashPrefillConfig) -> int:
    """Tokens from which on a prompt runs sparse and the selector has anything to decide."""
    always = config.sink_blocks + config.window_blocks + config.dense_tail_blocks
    minimum = config.min_seq_len if isinstance(config.min_seq_len, int) else 0
    return max(minimum, always * config.block_size + 1)


def _too_short(config: FlashPrefillConfig, longest: torch.Tensor) -> ValueError:
    return ValueError(
        f"prompts must reach min_seq_len={config.min_seq_len!r} of config, the longest has {longest.shape[1]} tokens"
    )


@torch.no_grad()
def _run(model: PreTrainedModel, prompts: Sequence[torch.Tensor], bar: tqdm) -> None:
    # Logits of every position of a long prompt would take more memory than the model.
    few_logits = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for ids in prompts:
        model(input_ids=ids.to(model.device), **few_logits)
        bar.update()


def _check_numbers(model: PreTrainedModel, masses: dict[int, float | None]) -> None:
    """Raise if the attention of a layer is NaN, as where float16 overflows."""
    for layer, mass in masses.items():
        if mass is not None and math.isnan(mass):
            dtype, wider = str(model.dtype).removeprefix("torch."), wider_dtypes(model.dtype)
            hint = f"; {wider} may help" if wider else ""
            raise ValueError(f"{type(model).__name__}: the attention of layer {layer} is not a number in {dtype}{hint}")


def _with_audit(chosen: Sequence[LayerCalibration], stats: PrefillStats) -> list[LayerCalibration]:
    audited = {layer.layer: layer for layer in stats.layers if layer.dropped_mass is not None}
    return [
        replace(layer, held_out_density=audited[layer.layer].density, held_out_mass=1 - audited[layer.layer].dropped_mass)
        if layer.layer in audited
        else layer
        for layer in chosen
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
