"""Pictures of results, light on ink: thin lines, no frames, colour only where it says something.

Every function takes rows or summaries as the JSON files hold them and returns a matplotlib figure that no window shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, SymmetricalLogLocator

BLUE, ORANGE, GREY, INK = "#2b6cb0", "#c05621", "#9aa5b1", "#2d3748"
SERIES = (BLUE, ORANGE, "#2f855a", "#805ad5", "#b7791f", "#4a5568", "#d53f8c", "#0f766e", "#7f1d1d", "#90cdf4")
# Beyond so many lines, the same colours with another marker.
MARKERS = "os^D"
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


def _plain_log_axis(axis: Axes, which: str) -> None:
    """A logarithmic axis with ticks at 1, 2, 3 and 5 times powers of ten, written as plain numbers.

    With a single tick on it matplotlib would set others of its own, over one another.
    """
    getattr(axis, f"set_{which}scale")("log")
    one = getattr(axis, f"{which}axis")
    one.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    one.set_major_formatter(lambda value, _: f"{value:g}")
    one.set_minor_locator(NullLocator())


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


def draw_recall(summary: list[dict]) -> Figure:
    """Recall at the longest length by distance to the fact and by position in the prompt."""
    entry = summary[-1]
    figure, axes = new_figure(8, 2.6, 1, 2, sharey=True)
    for axis, (field, label) in zip(
        axes,
        (("by_distance", "tokens from the nearest earlier copy of the code"), ("by_position", "position of the question")),
        strict=True,
    ):
        table = entry[field]
        middles = [(row["start"] + row["end"]) / 2 for row in table]
        for state, colour in (("unpatched", GREY), ("patched", BLUE)):
            axis.plot(middles, [row[state] for row in table], "o-", color=colour, lw=1.2, ms=4, label=state)
        axis.set_xlim(0, entry["length"])
        axis.set_ylim(-0.03, 1.05)
        axis.set_xlabel(label, fontsize=9)
    axes[0].set_ylabel("answers right", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{entry['length']} tokens, {entry['questions']} questions", fontsize=10)
    return figure


def draw_perplexity(summary: list[dict]) -> Figure:
    """Rise of the prefill's perplexity by position, a line per length, with standard errors; the continuation as a bar."""
    figure, (left, right) = new_figure(8, 2.8, 1, 2, sharey=True, width_ratios=[3, 1])
    for entry, colour in zip(summary, SERIES, strict=False):
        table = entry["by_position"]
        middles = [(row["start"] + row["end"]) / 2 for row in table]
        _with_errors(
            left, middles, [(row["rise"], row["rise_standard_error"]) for row in table], colour, tokens(entry["length"])
        )
    rises = [(entry["continuation"]["rise"], entry["continuation"]["rise_standard_error"]) for entry in summary]
    _with_errors(right, list(range(len(summary))), rises, INK, None, line="")
    for axis in (left, right):
        axis.axhline(0, color=GREY, lw=0.8)
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.1f} %")
    left.set(title="prefill, by position", xlabel="position in tokens", ylabel="rise of perplexity")
    right.set(title="continuation", xlabel="prompt length", xlim=(-0.6, len(summary) - 0.4))
    right.set_xticks(range(len(summary)), [tokens(entry["length"]) for entry in summary])
    for axis in (left, right):
        axis.title.set_size(9)
        axis.xaxis.label.set_size(9)
        axis.yaxis.label.set_size(9)
    left.legend(fontsize=8, frameon=False)
    return figure


def _with_errors(
    axis: Axes, x: list[float], values: list[tuple[float, float | None]], colour: str, label: str | None, line: str = "-"
) -> None:
    errors = [error or 0.0 for _, error in values]
    style = {"color": colour, "fmt": "o" + line, "lw": 1.2, "ms": 4, "elinewidth": 0.8, "capsize": 2}
    axis.errorbar(x, [value for value, _ in values], errors, label=label, **style)


def draw_ruler(summary: list[dict]) -> Figure:
    """Scores by task, a panel per length: a ring unpatched, a dot patched, a line between them."""
    lengths = sorted({entry["length"] for entry in summary})
    names = list(dict.fromkeys(entry["task"] for entry in summary))
    figure, axes = new_figure(2.0 + 2.2 * len(lengths), 0.9 + 0.24 * len(names), 1, len(lengths), sharey=True, squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        for entry in summary:
            if entry["length"] == length:
                y = names.index(entry["task"])
                axis.plot([entry["unpatched"], entry["patched"]], [y, y], color=GREY, lw=1)
                axis.plot(entry["unpatched"], y, "o", mfc="white", mec=GREY, ms=6, label="unpatched" if y == 0 else None)
                axis.plot(entry["patched"], y, "o", color=BLUE, ms=4, label="patched" if y == 0 else None)
        axis.set_title(f"{tokens(length)} tokens", fontsize=9)
        axis.set_xlim(-0.05, 1.05)
        axis.set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.supxlabel("score", fontsize=9)
    return figure


# What is drawn of a selection summary, by field.
SELECTION_PANELS = {
    "recall": "answers right",
    "perplexity_rise": "rise of perplexity",
    "kept_mass": "attention kept",
    "operator_seconds": "operator, ms a layer",
}


def draw_selection(summary: list[dict]) -> Figure | None:
    """Recall, rise of perplexity and, where they were measured, kept mass and time against density: a line of panels per
    length, a line per selector, oracles dashed. None if every layer stayed dense."""
    known = [row for row in summary if row["density"] is not None]
    if not known:
        return None
    lengths = sorted({row.get("length", 0) for row in known})
    fields = [field for field in SELECTION_PANELS if any(row.get(field) is not None for row in known)]
    names = list(dict.fromkeys(row["selector"] for row in known))
    figure, axes = new_figure(1 + 3.2 * len(fields), 0.6 + 2.7 * len(lengths), len(lengths), len(fields), squeeze=False)
    for line, length in zip(axes, lengths, strict=True):
        for axis, field in zip(line, fields, strict=True):
            for number, name in enumerate(names):
                chosen = [row for row in known if (row["selector"], row.get("length", 0)) == (name, length)]
                marker = MARKERS[number // len(SERIES) % len(MARKERS)]
                _draw_curve(axis, chosen, field, SERIES[number % len(SERIES)], marker)
            _selection_axis(axis, field, [row["density"] for row in known if row.get("length", 0) == length])
        if length:
            line[0].set_title(f"{tokens(length)} tokens", fontsize=9, loc="left")
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def _draw_curve(axis: Axes, rows: list[dict], field: str, colour: str, marker: str) -> None:
    rows = sorted((row for row in rows if row.get(field) is not None), key=lambda row: row["density"])
    if rows:
        factor = 1e3 if field == "operator_seconds" else 1
        style = marker + ("--" if rows[0]["selector"].startswith("oracle") else "-")
        values = [factor * row[field] for row in rows]
        axis.plot([row["density"] for row in rows], values, style, color=colour, lw=1.2, ms=3.5, label=rows[0]["selector"])


def _selection_axis(axis: Axes, field: str, densities: list[float]) -> None:
    if max(densities) > 3 * min(densities):
        _plain_log_axis(axis, "x")
    if field == "perplexity_rise":
        # Linear around 0, where the noise is, and logarithmic above: defaults are told apart by tenths of a percent.
        axis.set_yscale("symlog", linthresh=0.002)
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=0.002, subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.1f} %")
        axis.axhline(0, color=GREY, lw=0.8)
    axis.set_xlabel("density", fontsize=9)
    axis.set_ylabel(SELECTION_PANELS[field], fontsize=9)


def draw_ttft(rows: list[dict]) -> Figure:
    """Seconds to the first token against length; where it was measured, with attention that costs nothing: the ceiling."""
    rows = sorted(rows, key=lambda row: row["length"])
    lengths = [row["length"] for row in rows]
    figure, (left, right) = new_figure(8, 2.8, 1, 2)
    for state, colour, style in (("unpatched", GREY, "o-"), ("patched", BLUE, "o-"), ("free_attention", ORANGE, "o--")):
        known = [row for row in rows if row.get(state)]
        if known:
            x, label = [row["length"] for row in known], state.replace("_", " ")
            left.plot(x, [row[state]["median_s"] for row in known], style, color=colour, lw=1.2, ms=4, label=label)
            ratios = [row["unpatched"]["median_s"] / row[state]["median_s"] for row in known]
            right.plot(x, ratios, style, color=colour, lw=1.2, ms=4)
    _plain_log_axis(left, "y")
    left.set_ylabel("seconds to the first token", fontsize=9)
    right.set_ylabel("times as fast as unpatched", fontsize=9)
    left.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        length_axis(axis, lengths)
    return figure


def draw_operator(rows: list[dict]) -> Figure:
    """Speed-up of the operator over each dense baseline against length."""
    lengths = sorted({row["length"] for row in rows})
    figure, axis = new_figure(5, 2.8)
    names = [name for name in rows[0] if name.startswith("speedup_over_")]
    shapes = list(dict.fromkeys((row.get("head_dim"), row.get("batch")) for row in rows))
    lines = [(name, shape) for name in names for shape in shapes]
    for (name, shape), colour in zip(lines, SERIES * len(lines), strict=False):
        chosen = sorted((r for r in rows if (r.get("head_dim"), r.get("batch")) == shape), key=lambda row: row["length"])
        label = f"over {name.removeprefix('speedup_over_').replace('_', ' ')}"
        if len(shapes) > 1:
            label += f", head dim {shape[0]}, batch {shape[1]}"
        values = [row.get(name) for row in chosen]
        axis.plot([row["length"] for row in chosen], values, "o-", color=colour, lw=1.2, ms=4, label=label)
    axis.axhline(1, color=GREY, lw=0.8)
    axis.set_ylabel("speed-up", fontsize=9)
    if lines:
        axis.legend(fontsize=8, frameon=False)
    length_axis(axis, lengths)
    return figure
