"""What each point of eval.selection does with the tensors that a layer of the unpatched model is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from eval.oracle import BlockMasses, block_masses, index_from_masses
from eval.probe import AttentionInput
from eval.selection_points import Point
from eval.stages import stage_runs
from hf_flashprefill import BlockIndex
from hf_flashprefill.attention_mass import exact_shares, kept_shares
from hf_flashprefill.crossover.timing import median_ms
from hf_flashprefill.functional import resolve_backend, select_in_rounds, selection_rule
from hf_flashprefill.geometry import PrefillGeometry

# Of each stage on each layer; the medians that are shown are over all layers and prompts.
RUNS = 3


@dataclass
class LayerMeasurements:
    """By layer number, for one point; times stay empty if they are not taken.

    Attributes:
        kept_mass: Mean share of the sampled queries' attention that falls on kept blocks, all heads together.
        index_seconds: Pool and select; with the mean correction, its pools too.
        operator_seconds: Pool, select and attend over the point's own lists, called one after the other.
    """

    kept_mass: dict[int, float] = field(default_factory=dict)
    index_seconds: dict[int, float] = field(default_factory=dict)
    operator_seconds: dict[int, float] = field(default_factory=dict)


class LayerObserver:
    """Measures every point on every layer it is called with, all points on the same tensors; not on sliding windows.

    Args:
        points: What to measure; results are in ``measurements``, in the same order.
        rows: int64 [R], ascending: the queries whose attention is looked at.
        take_times: Whether to time the stages, which an oracle does not have.
    """

    def __init__(self, points: Sequence[Point], rows: torch.Tensor, take_times: bool):
        self.measurements = [LayerMeasurements() for _ in points]
        self._points, self._rows, self._take_times = points, rows, take_times

    @torch.no_grad()
    def __call__(self, module: nn.Module, tensors: AttentionInput, scale: float) -> None:
        layer, (query, key, _) = module.layer_idx, tensors
        if (getattr(module, "sliding_window", None) or query.shape[2]) < query.shape[2]:
            # Its window decides there, no selector.
            return
        rows = self._rows.to(query.device)[None]
        sizes = {point.config.block_size for point in self._points}
        geometries = {size: PrefillGeometry(1, query.shape[2], key.shape[2], 0, size) for size in sizes}
        shares = {size: exact_shares(query, key, geometries[size], rows, scale=scale) for size in sizes}
        asked = {point.config.block_size for point in self._points if point.oracle}
        true_masses = {size: block_masses(query, key, geometries[size], scale) for size in asked}
        for point, results in zip(self._points, self.measurements, strict=True):
            size = point.config.block_size
            index = point_index(point, tensors, geometries[size], scale, true_masses.get(size))
            results.kept_mass[layer] = kept_shares(shares[size], rows, index).mean().item()
            if self._take_times and point.oracle is None:
                self._time(results, layer, point, tensors, index, scale)

    def _time(
        self, results: LayerMeasurements, layer: int, point: Point, tensors: AttentionInput, index: BlockIndex, scale: float
    ) -> None:
        backend, device = resolve_backend(point.config.backend, tensors.query), tensors.query.device
        runs = stage_runs(backend, tensors, index, point.config, scale)
        seconds = {
            stage: median_ms(run, device, 0.0, least=RUNS)["median_ms"] / 1e3
            for stage, run in runs.items()
            if stage != "attend"
        }
        results.index_seconds[layer] = seconds["pool"] + seconds["select"]
        results.operator_seconds[layer] = seconds["operator"]


def point_index(
    point: Point, tensors: AttentionInput, geometry: PrefillGeometry, scale: float, true_masses: BlockMasses | None
) -> BlockIndex:
    """The blocks that a point keeps of a whole prompt; an oracle needs the true masses."""
    if point.oracle:
        rule = selection_rule(point.config)
        names = ("alpha", "sink_blocks", "window_blocks", "dense_tail_blocks")
        return index_from_masses(true_masses.of(point.oracle), geometry, **{name: rule[name] for name in names})
    return BlockIndex.concatenate(list(select_in_rounds(tensors.query, tensors.key, geometry, point.config, scale)))


def sampled_rows(length: int, count: int, seed: int) -> torch.Tensor:
    """``count`` queries of a prompt of ``length`` tokens at random, all of them if it has no more: int64 [R], ascending."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values
