"""One self-contained HTML page, and its pictures as PNG files, from the JSON files that the harnesses wrote.

    python -m eval.report results/*.json --output results/report.html

Files of eval.needle, recall, perplexity, ruler, lm_eval_adapter, selection, calibrate, ttft, vllm_ttft, operator_speed and
layout_speed, of one run or of many; several of one kind are shown one after the other. Pictures are inside the page and, for
other uses, in a folder beside it.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eval import (
    calibrate,
    commands,
    lm_eval_adapter,
    needle,
    options,
    perplexity,
    pictures,
    recall,
    ruler,
    selection,
    tables,
    vllm_ttft,
)
from hf_flashprefill import LayerStats, PrefillStats
from hf_flashprefill.plotting import plot_density

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2d3748; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-weight: 600; font-size: 1.5rem; } h2 { font-weight: 600; font-size: 1.15rem; margin-top: 2.5rem; }
/* Tables may stand out to the right of the text, and scroll where that is not enough. */
pre { font: 13px/1.45 ui-monospace, monospace; overflow-x: auto; width: max-content; max-width: max(100%, calc(50vw + 30rem)); }
@media print { pre { font-size: 7.5px; } }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption, .run { color: #718096; font-size: 0.88rem; }
nav a { color: #2b6cb0; text-decoration: none; margin-right: 1.2em; }
"""


@dataclass(frozen=True)
class Picture:
    """A figure with its file name and what it shows."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Kind:
    """How the results of one harness are shown."""

    title: str
    intro: str
    table: Callable[[dict], str]
    pictures: Callable[[dict], list[Picture]]


def density_picture(record: dict) -> list[Picture]:
    """Density per layer and head of the longest prompts, if the rows hold it."""
    longest = max(row["length"] for row in record["rows"])
    grids = [row["head_density"] for row in record["rows"] if row["length"] == longest and any(row.get("head_density") or [])]
    if not grids:
        return []
    layers = []
    for layer in range(len(grids[0])):
        heads = [sum(values) / len(grids) for values in zip(*(grid[layer] for grid in grids), strict=True)]
        layers.append(LayerStats(layer, len(grids), {}, tables.mean(heads), heads))
    heads = max(len(layer.head_density) for layer in layers)
    figure, axis = pictures.new_figure(min(12, 2 + 0.45 * heads), min(12, 1.2 + 0.3 * len(layers)))
    plot_density(PrefillStats(layers), ax=axis)
    return [Picture("density", figure, f"Share of the visible blocks that each head keeps, prompts of {longest} tokens.")]


def selection_picture(record: dict) -> list[Picture]:
    """None if every layer stayed dense."""
    figure = pictures.draw_selection(record["summary"])
    return [] if figure is None else [Picture("selection", figure, "What a density costs.")]


def rows_table(record: dict, columns: dict[str, Callable[[dict], Any]]) -> str:
    """A table of rows; values that a row lacks stay empty."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    return tables.format_table(list(columns), [[cell(value(row)) for value in columns.values()] for row in record["rows"]])


def ttft_table(record: dict) -> str:
    def seconds(state: str) -> Callable[[dict], float | None]:
        return lambda row: (row.get(state) or {}).get("median_s")

    columns = {"tokens": lambda row: row["length"]}
    if any(row.get("chunk") for row in record["rows"]):
        columns["in chunks of"] = lambda row: row.get("chunk")
    columns |= {"density": lambda row: row["density"], "unpatched s": seconds("unpatched"), "patched s": seconds("patched")}
    if any(row.get("free_attention") for row in record["rows"]):
        columns["free attention s"] = seconds("free_attention")
    return rows_table(record, columns | {"speed-up": lambda row: row["speedup"]})


def operator_table(record: dict) -> str:
    first = record["rows"][0]
    columns = {"tokens": lambda row: row["length"], "density": lambda row: row["density"]}
    columns |= {n.replace("_", " "): (lambda row, n=n: row.get(n)) for n in ("head_dim", "batch") if n in first}
    for name, value in first.items():
        if isinstance(value, dict) and "median_ms" in value:
            columns[f"{name.replace('_', ' ')} ms"] = lambda row, name=name: (row.get(name) or {}).get("median_ms")
        elif name.startswith("speedup_over_"):
            columns[f"x {name.removeprefix('speedup_over_')}"] = lambda row, name=name: row.get(name)
    return rows_table(record, columns)


KINDS = {
    "needle": Kind(
        "Needle in a haystack",
        "One fact, one question. At the end of the prompt the question's rows are dense by rule; in the middle the block "
        "selection decides. White is right.",
        lambda record: needle.summary_table(record["summary"]),
        lambda record: [Picture("needle", pictures.draw_needle(record["rows"], ""), "Answers right by length and depth.")],
    ),
    "recall": Kind(
        "Recall of many facts",
        "Dozens of questions all over the prompt, each answer teacher-forced. Changes are paired per question.",
        lambda record: recall.summary_table(record["summary"]),
        lambda record: [
            Picture("recall", pictures.draw_recall(record["summary"]), "Recall by distance and by position."),
            *density_picture(record),
        ],
    ),
    "perplexity": Kind(
        "Perplexity",
        "Prefill: every token of one long prompt. Continuation: the last tokens, on the cache that a sparse prefill left.",
        lambda record: perplexity.summary_table(record["summary"]),
        lambda record: [
            Picture("perplexity", pictures.draw_perplexity(record["summary"]), "Rise against unpatched, ± one standard error."),
            *density_picture(record),
        ],
    ),
    "ruler": Kind(
        "RULER",
        "Scores in percent, unpatched beside patched.",
        lambda record: ruler.summary_table(record["summary"]),
        lambda record: [Picture("ruler", pictures.draw_ruler(record["summary"]), "Rings: unpatched. Dots: patched.")],
    ),
    "lm_eval": Kind(
        "lm-evaluation-harness",
        "Means over samples, their changes paired, ± one standard error; without one, what lm_eval aggregated.",
        lambda record: lm_eval_adapter.table(record["rows"], record["summary"][0]["density"]),
        lambda record: [],
    ),
    "selection": Kind(
        "Quality against density",
        "Each line is a selector, each point a threshold. Oracles know the true attention, which costs more than dense. Kept "
        "mass and times are of the unpatched model's tensors, times of one layer; index is pool and select.",
        lambda record: selection.summary_table(record["summary"]),
        selection_picture,
    ),
    "calibrate": Kind(
        "Calibration",
        "The alpha of each layer and the share of the attention it keeps: measured on dense layers, and, held out, on prompts "
        "that took no part with all layers sparse.",
        lambda record: calibrate.layer_table(record["rows"]),
        lambda record: [],
    ),
    "ttft": Kind(
        "Time to the first token",
        "Medians. The dashed line, where it was measured, is the model with attention that costs nothing: the ceiling.",
        ttft_table,
        lambda record: [Picture("ttft", pictures.draw_ttft(record["rows"]), "Time and speed-up against prompt length.")],
    ),
    "vllm_ttft": Kind(
        "Time to the first token inside vLLM",
        "Medians. Unpatched is vLLM's own FlashAttention backend.",
        vllm_ttft.table,
        lambda record: [],
    ),
    "operator_speed": Kind(
        "Operator",
        "Pool, select and attend together, against dense attention on the same tensors.",
        operator_table,
        lambda record: [Picture("operator", pictures.draw_operator(record["rows"]), "Speed-up against prompt length.")],
    ),
    "layout_speed": Kind(
        "Batches, padding and chunks",
        "The operator's time over that of the same work as prompts of their own, less 1.",
        lambda record: rows_table(
            record,
            {name: (lambda row, name=name: row[name]) for name in ("length", "layout", "density", "median_ms", "overhead")},
        ),
        lambda record: [],
    ),
}


def read_record(path: Path) -> dict:
    """A harness's JSON.

    Raises:
        UsageError: It cannot be read or is of no harness that the report knows.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise commands.UsageError(f"{path}: {commands.first_line(error)}") from None
    kind = record.get("harness") if isinstance(record, dict) else None
    if kind not in KINDS:
        raise commands.UsageError(f"{path}: harness must be one of {', '.join(KINDS)}, got {kind!r}")
    if not record.get("rows"):
        raise commands.UsageError(f"{path}: there are no rows in it")
    return record


def describe_run(record: dict, path: Path) -> str:
    """Model, device, settings, commit and file of a run in one line."""
    model, environment, config = record.get("model"), record.get("environment", {}), record.get("config") or {}
    parts = [model["name"] if isinstance(model, dict) else model, environment.get("device")]
    if record["harness"] not in ("selection", "ttft", "vllm_ttft", "operator_speed", "layout_speed") and config:
        parts.append(tables.describe(config))
    parts += [environment.get("time"), f"commit {environment['commit']}" if environment.get("commit") else None, path.name]
    return " · ".join(str(part) for part in parts if part)


def section(path: Path, record: dict, anchor: str) -> tuple[str, dict[str, bytes]]:
    """HTML of one file, and its pictures by file name."""
    kind = KINDS[record["harness"]]
    try:
        table, drawn = kind.table(record), kind.pictures(record)
    # What a missing or another value leads to, in the tables here or in matplotlib.
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise commands.UsageError(f"{path}: not a result of eval.{record['harness']} ({error!r})") from None
    figures, files = [], {}
    for picture in drawn:
        file = io.BytesIO()
        picture.figure.savefig(file, format="png", dpi=160)
        files[f"{anchor}-{picture.name}.png"] = file.getvalue()
        data, caption = base64.b64encode(file.getvalue()).decode(), html.escape(picture.caption)
        width = round(picture.figure.get_figwidth() * 96)
        image = f'<img src="data:image/png;base64,{data}" width="{width}" alt="{caption}">'
        figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    text = (
        f'<h2 id="{anchor}">{html.escape(kind.title)}</h2>\n<p>{html.escape(kind.intro)}</p>\n'
        f'<p class="run">{html.escape(describe_run(record, path))}</p>\n'
        f"{''.join(figures)}\n<pre>{html.escape(table)}</pre>\n"
    )
    return text, files


def page(paths: list[Path]) -> tuple[str, dict[str, bytes]]:
    """The whole page, and the pictures in it by file name."""
    records = [(path, read_record(path)) for path in paths]
    records.sort(key=lambda entry: list(KINDS).index(entry[1]["harness"]))
    links, sections, files = [], [], {}
    used: set[str] = set()
    for path, record in records:
        name = f"{record['harness']}-{re.sub('[^A-Za-z0-9.]+', '-', path.stem)}"
        # A number may make it the name of another file.
        anchor = next(a for a in (name, *(f"{name}-{i}" for i in range(2, len(records) + 2))) if a not in used)
        used.add(anchor)
        alone = sum(other["harness"] == record["harness"] for _, other in records) == 1
        label = KINDS[record["harness"]].title + ("" if alone else f" ({path.stem})")
        links.append(f'<a href="#{anchor}">{html.escape(label)}</a>')
        text, drawn = section(path, record, anchor)
        sections.append(text)
        files |= drawn
    text = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>hf_flashprefill report</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>What sparse prefill costs and gains</h1>\n<nav>{''.join(links)}</nav>\n"
        f"{''.join(sections)}</body>\n</html>\n"
    )
    return text, files


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("report", __doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSON files of the harnesses")
    parser.add_argument("--output", type=Path, default=Path("results/report.html"), help="(default: %(default)s)")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if args.output.suffix != ".html":
        raise commands.UsageError(f"--output must end in .html, got {args.output}")
    options.check_writable(args.output)
    options.check_writable(args.output.with_suffix("") / "picture.png")
    text, files = page(args.results)
    folder = args.output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    args.output.write_text(text, encoding="utf-8")
    print(f"wrote {args.output} and its pictures to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
