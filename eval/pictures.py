"""Pictures of results, light on ink: thin lines, no frames, colour only where it says something.

Every function takes rows or summaries as the JSON files hold them and returns a matplotlib figure that no window shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#9aa5b1"
SERIES = (BLUE, ORANGE, "#2f855a", "#805ad5", "#b7791f", "#4a5568")
# Right answers are paper; only what is lost takes ink.
LOSSES = LinearSegmentedColormap.from_list("losses", ["#c0392b", "#f5b7a5", "#ffffff"])


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes, without touching the state of pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(labelsize=8, color=GREY)
    return figure, axes


def tokens(length: int) -> str:
    """4096 as 4K."""
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)


def length_axis(axis: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic axis of lengths in tokens with a tick at each."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(lengths), [tokens(length) for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("prompt length in tokens", fontsize=9)


def draw_needle(rows: list[dict], title: str) -> Figure:
    """Share of right answers by length and depth: a line of panels per placement, unpatched beside patched."""
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    placements = sorted({row["placement"] for row in rows})
    size = (3 + 1.3 * len(lengths), 1.2 + (0.6 + 0.35 * len(depths)) * len(placements))
    figure, axes = new_figure(*size, len(placements), 2, sharex=True, sharey=True, squeeze=False)
    for line, placement in zip(axes, placements, strict=True):
        for axis, state in zip(line, ("unpatched", "patched"), strict=True):
            grid = []
            for depth in depths:
                cells = [
                    [r[f"{state}_correct"] for r in rows if (r["placement"], r["length"], r["depth"]) == (placement, n, depth)]
                    for n in lengths
                ]
                grid.append([sum(cell) / len(cell) if cell else float("nan") for cell in cells])
            axis.imshow(grid, vmin=0, vmax=1, cmap=LOSSES, aspect="auto")
            axis.spines[:].set(visible=True, color="#e2e8f0")
            for y, line_values in enumerate(grid):
                for x, value in enumerate(line_values):
                    colour = "white" if value < 0.4 else "#4a5568"
                    axis.text(
                        x, y, "" if value != value else f"{value:.0%}", ha="center", va="center", fontsize=8, color=colour
                    )
            axis.set_title(f"question {'at the end' if placement == 'end' else 'in the middle'}, {state}", fontsize=9)
            axis.tick_params(length=0)
            axis.set_xticks(range(len(lengths)), [tokens(n) for n in lengths])
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    figure.supxlabel("prompt length in tokens", fontsize=9)
    figure.supylabel("depth of the fact", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
