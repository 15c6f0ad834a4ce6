"""Pictures of what a sparse prefill does. Needs matplotlib, which is imported when a picture is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .block_index import BlockIndex
from .stats import PrefillStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT, DROPPED, INK = (0.74, 0.86, 0.96), (0.955, 0.955, 0.955), (0.10, 0.13, 0.20)
# Attention below this probability is not drawn.
FAINTEST = 1e-3
# Pixels along the longer side of the attention map.
RESOLUTION = 768


def plot_block_index(
    index: BlockIndex,
    attention: torch.Tensor | None = None,
    *,
    head: int = 0,
    row: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw which key blocks one head keeps, over the attention map they stand for.

    Kept blocks are blue and dropped ones grey; what no query may see stays white. Attention is drawn on top in ink, darker
    for larger probabilities on a logarithmic scale, the largest of each pixel: ink on grey is attention that is lost. A
    key that many queries attend to shows as a vertical, attention to a fixed distance as a slash.

    Args:
        index: Lists of kept blocks, from ``flash_prefill_attention(..., return_index=True)``.
        attention: Probabilities [Sq, Skv] of that head, of the same queries and keys; None to draw the blocks alone.
        head: Query head, 0 to Hq - 1.
        row: Batch row, 0 to B - 1.
        ax: Where to draw; a new figure's axes if None.

    Returns:
        The axes. Their units are blocks; the origin is at the top left.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no such head or row, the attention's shape does not fit, or it comes with a padded index.
    """
    batch, heads, _ = index.counts.shape
    for name, value, count in (("head", head, heads), ("row", row, batch)):
        if not 0 <= value < count:
            raise ValueError(f"{name} must be from 0 to {count - 1}, got {value}")
    geometry = index.geometry
    if attention is not None:
        expected = (geometry.query_len, geometry.kv_len)
        if tuple(attention.shape) != expected:
            raise ValueError(f"attention must have the shape [queries, keys] {expected}, got {tuple(attention.shape)}")
        if geometry.valid_ranges is not None:
            raise ValueError("attention must be None for an index of padded rows, whose blocks have their own origin")
    ax = _axes(ax, (5, 5))
    kept = index.to_mask()[row, head].cpu()
    visible = index.visible_counts()[row].cpu()
    colours = torch.ones(*kept.shape, 3)
    seen = torch.arange(kept.shape[1]) < visible[:, None]
    colours[seen] = torch.tensor(DROPPED)
    colours[kept] = torch.tensor(KEPT)
    # Query blocks lie on the key blocks' grid: the last one that a query block sees is its own.
    used = visible > 0
    top = int(visible[used][0]) - 1 if used.any() else 0
    bottom = top + max(1, int(used.sum()))
    ax.imshow(colours[: bottom - top], extent=(0, kept.shape[1], bottom, top), interpolation="nearest", aspect="equal")
    if attention is not None:
        block = geometry.block_size
        ink = _ink(attention.detach().float().cpu())
        end = (geometry.query_offset + geometry.query_len) / block
        ax.imshow(ink, extent=(0, geometry.kv_len / block, end, geometry.query_offset / block), aspect="equal")
    ax.set(xlim=(0, kept.shape[1]), ylim=(bottom, top))
    share = kept[used].sum().item() / max(1, int(visible.sum()))
    ax.set_title(f"head {head}: {share:.0%} of the blocks kept", fontsize=9)
    ax.set_xlabel("key block", fontsize=9)
    ax.set_ylabel("query block", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_density(stats: PrefillStats, ax: Axes | None = None) -> Axes:
    """Draw the density of every layer and head: the share of the causally visible key blocks that were kept.

    Args:
        stats: From ``prefill_stats(model)``. Layers that never ran sparse stay empty.
        ax: Where to draw; a new figure's axes if None.

    Returns:
        The axes, heads across and layers down.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No layer ran sparse.
    """
    heads = max((len(layer.head_density) for layer in stats.layers), default=0)
    if heads == 0:
        raise ValueError("stats must hold a layer that ran sparse; see stats.dense_calls for the reasons")
    # Layers may have fewer heads than others.
    grid = [layer.head_density + [float("nan")] * (heads - len(layer.head_density)) for layer in stats.layers]
    ax = _axes(ax, (1.5 + 0.32 * heads, 1.2 + 0.28 * len(grid)))
    image = ax.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
    if heads * len(grid) <= 128:
        for layer, values in enumerate(grid):
            for head, value in enumerate(values):
                if value == value:
                    ax.text(
                        head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value > 0.6 else "k"
                    )
    ax.set_xticks(range(0, heads, max(1, heads // 16)))
    step = max(1, len(grid) // 16)
    numbers = ["-" if layer.layer is None else str(layer.layer) for layer in stats.layers]
    ax.set_yticks(range(0, len(grid), step), numbers[::step])
    ax.set_xlabel("head", fontsize=9)
    ax.set_ylabel("layer", fontsize=9)
    ax.tick_params(labelsize=8, length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8)
    bar.set_label("density", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return ax


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError('pictures need matplotlib: pip install "matplotlib>=3.8"') from None
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _ink(attention: torch.Tensor) -> torch.Tensor:
    """RGBA picture of probabilities: one colour, opaque for 1, transparent from FAINTEST down."""
    cell = max(1, -(-max(attention.shape) // RESOLUTION))
    largest = F.max_pool2d(attention[None], cell, ceil_mode=True)[0]
    opacity = 1 - largest.clamp(FAINTEST, 1).log() / torch.tensor(FAINTEST).log()
    return torch.cat([torch.tensor(INK).expand(*opacity.shape, 3), opacity[..., None]], -1)
