"""What a density costs, selector by selector: the curves that defaults are chosen by.

    python -m eval.selection                                             # the bundled model, 8192 tokens
    python -m eval.selection --lengths 4096 --prompts 1 --curves blend:0.006,0.02 flashprefill:0.05,0.2 oracle-mean:0.01
    python -m eval.selection --model meta-llama/Llama-3.1-8B-Instruct --lengths 32768 65536

A curve is a selector with some thresholds, and other fields of the config after an @: ``blend:0.006,0.01@pool_size=8``.
``oracle-mean`` and ``oracle-max`` keep blocks by their true share of the attention (eval.oracle); they cost more than dense
attention, and show what any probe could reach at best.

The prompts are those of eval.recall: questions all over the second half, and no dense tail blocks, so that the selection
decides every answer. The answers of the unpatched model are computed once per prompt; each point is one more forward call.
While the unpatched model runs, every point also selects on the tensors of each of its layers: the **kept mass** is the exact
softmax mass of sampled queries that falls on kept blocks; **index** is pool and select, **operator** all stages called one
after the other, medians over layers and prompts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tqdm import tqdm
from transformers import PreTrainedModel

from eval import commands, models, options, recording, tables
from eval.pictures import draw_selection
from eval.probe import observed_attention
from eval.recall import RecallScore, score
from eval.recall_prompts import RecallPrompt, check_prompt_arguments, make_prompts
from eval.runner import process_rank
from eval.selection_layers import LayerMeasurements, LayerObserver, sampled_rows
from eval.selection_points import DEFAULT_CURVES, Point, parse_curves
from eval.statistics import paired_difference, perplexity_rise
from eval.texts import add_text_arguments, corpus_ids
from hf_flashprefill import prefill_stats


@dataclass(frozen=True)
class SelectionRow:
    """One point on one prompt in the JSON.

    ``selector`` is the curve without its thresholds. ``density`` and the lists by layer are of the layers that ran sparse;
    density is None and lists are empty if none did. Questions are counted from 0 in the order they stand in the prompt;
    ``nll`` is the mean over the ``text_tokens`` tokens of ordinary text. Times are empty if they were not taken.
    """

    length: int
    prompt: str
    selector: str
    alpha: float
    density: float | None
    questions: int
    unpatched_wrong: list[int]
    patched_wrong: list[int]
    text_tokens: int
    unpatched_nll: float
    patched_nll: float
    layer_density: list[float]
    layer_kept_mass: list[float]
    layer_index_seconds: list[float]
    layer_operator_seconds: list[float]


def measure(
    model: PreTrainedModel, prompt: RecallPrompt, points: Sequence[Point], mass_rows: int, seed: int, take_times: bool
) -> list[SelectionRow]:
    """All points on one prompt, in their order."""
    observer = LayerObserver(points, sampled_rows(len(prompt.ids), mass_rows, seed), take_times)
    with observed_attention(model, observer):
        before = score(model, prompt)
    rows = []
    bar = tqdm(points, desc=prompt.name, unit="point", leave=False, disable=process_rank() > 0)
    for point, measurements in zip(bar, observer.measurements, strict=True):
        rows.append(measure_point(model, prompt, point, before, measurements))
    return rows


def measure_point(
    model: PreTrainedModel, prompt: RecallPrompt, point: Point, before: RecallScore, measurements: LayerMeasurements
) -> SelectionRow:
    """One point on one prompt: its answers and losses, beside ``before`` and what was measured on the layers' tensors."""
    with point.applied(model):
        after = score(model, prompt)
        stats = prefill_stats(model)
    sparse = [layer for layer in stats.layers if layer.density is not None]

    def of_sparse_layers(values: dict[int, float]) -> list[float]:
        return [values[layer.layer] for layer in sparse if layer.layer in values]

    return SelectionRow(
        length=len(prompt.ids),
        prompt=prompt.name,
        selector=point.curve,
        alpha=point.config.alpha,
        density=stats.density,
        questions=len(prompt.questions),
        unpatched_wrong=(~before.correct).nonzero().flatten().tolist(),
        patched_wrong=(~after.correct).nonzero().flatten().tolist(),
        text_tokens=int(prompt.text.sum()),
        unpatched_nll=before.nll[prompt.text].double().mean().item(),
        patched_nll=after.nll[prompt.text].double().mean().item(),
        layer_density=[layer.density for layer in sparse],
        layer_kept_mass=of_sparse_layers(measurements.kept_mass),
        layer_index_seconds=of_sparse_layers(measurements.index_seconds),
        layer_operator_seconds=of_sparse_layers(measurements.operator_seconds),
    )


def summarise(rows: list[dict]) -> list[dict]:
    """Per length and point: density, recall with the interval of its change, perplexity with the standard error of its
    rise, mean kept mass, median times of a layer; shortest prompts first, points in their order."""
    groups = dict.fromkeys((row["length"], row["selector"], row["alpha"]) for row in rows)
    keyed = {key: [row for row in rows if (row["length"], row["selector"], row["alpha"]) == key] for key in groups}
    return [
        dict(zip(("length", "selector", "alpha"), key, strict=True)) | summarise_point(keyed[key])
        for key in sorted(groups, key=lambda key: key[0])
    ]


def summarise_point(rows: list[dict]) -> dict:
    """The summary of the rows of one point at one length."""
    before, after = (
        [number not in row[f"{state}_wrong"] for row in rows for number in range(row["questions"])]
        for state in ("unpatched", "patched")
    )
    change = paired_difference(before, after)
    rise = perplexity_rise([row["patched_nll"] - row["unpatched_nll"] for row in rows])

    def of_layers(name: str) -> list[float]:
        return list(itertools.chain.from_iterable(row[f"layer_{name}"] for row in rows))

    times = {name: of_layers(name) for name in ("index_seconds", "operator_seconds")}
    return {
        "prompts": len(rows),
        "questions": len(before),
        **tables.densities(rows),
        "unpatched_recall": sum(before) / len(before),
        "recall": sum(after) / len(after),
        "recall_change": change.estimate,
        "recall_change_low": change.low,
        "recall_change_high": change.high,
        "unpatched_nll": tables.mean([row["unpatched_nll"] for row in rows]),
        "perplexity_rise": rise.rise,
        "perplexity_rise_standard_error": rise.standard_error,
        "kept_mass": tables.mean(of_layers("kept_mass")),
        **{name: statistics.median(values) if values else None for name, values in times.items()},
    }


def summary_table(summary: list[dict]) -> str:
    has_times = any(row["operator_seconds"] for row in summary)
    header = ["tokens", "selector", "alpha", "density", "recall", "change (95 %)", "perplexity", "kept mass"]
    header += ["index ms", "operator ms", "index"] * has_times
    cells = []
    for row in summary:
        low, high = 100 * row["recall_change_low"], 100 * row["recall_change_high"]
        cell = [
            str(row["length"]),
            row["selector"],
            f"{row['alpha']:g}",
            tables.format_densities(row, "prompts"),
            f"{row['recall']:.1%}",
            f"{100 * row['recall_change']:+.1f} pt ({low:+.1f} to {high:+.1f})",
            tables.format_rise(row["perplexity_rise"], row["perplexity_rise_standard_error"]),
            "" if row["kept_mass"] is None else f"{row['kept_mass']:.4f}",
        ]
        index, operator = row["index_seconds"], row["operator_seconds"]
        if has_times:
            cell += [f"{1e3 * index:.2f}", f"{1e3 * operator:.2f}", f"{index / operator:.0%}"] if operator else [""] * 3
        cells.append(cell)
    return tables.format_table(header, cells)


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("selection", __doc__)
    options.add_run_arguments(parser, "selection", lengths=[8192], has_rule=False)
    add_text_arguments(parser)
    parser.add_argument(
        "--curves",
        nargs="+",
        default=list(DEFAULT_CURVES),
        metavar="SELECTOR:ALPHA,...[@FIELD=VALUE,...]",
        help="what to measure (default: %(default)s)",
    )
    parser.add_argument("--prompts", type=int, default=2, help="per length (default: %(default)s)")
    parser.add_argument("--facts", type=int, default=16, help="in each prompt (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=48, help="in each prompt (default: %(default)s)")
    parser.add_argument(
        "--mass-rows", type=int, default=256, help="queries of a prompt whose attention is looked at (default: %(default)s)"
    )
    parser.add_argument(
        "--times", action=argparse.BooleanOptionalAction, default=True, help="time the stages (default: they are timed)"
    )
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    # What the user sets comes later and wins.
    args.set = ["dense_tail_blocks=0", *args.set]
    config = options.check_run_arguments(args)
    check_prompt_arguments(args)
    options.check_range("--mass-rows", args.mass_rows, 1)
    points = parse_curves(args.curves, config)
    model, tokenizer = models.load_model(args.model, args.device, args.dtype)
    models.check_context(model, max(args.lengths))
    corpus = corpus_ids(tokenizer, args)
    try:
        groups = [
            make_prompts(tokenizer, corpus, length, args.prompts, args.facts, args.questions, args.seed)
            for length in dict.fromkeys(args.lengths)
        ]
    except ValueError as error:
        raise commands.UsageError(f"--lengths: {error}") from None
    prompts = options.limited(groups, args.limit)

    def work(i: int) -> list[dict]:
        return [asdict(row) for row in measure(model, prompts[i], points, args.mass_rows, args.seed, args.times)]

    names = [prompt.name for prompt in prompts]
    result = recording.run_and_record("selection", args, model, config, names, work, summarise, corpus, shows_times=args.times)
    if result:
        figure, picture = draw_selection(result.summary), args.output.with_suffix(".png")
        print(summary_table(result.summary))
        if figure is None:
            print(f"every layer stayed dense, so there is no picture\nwrote {args.output}")
        else:
            figure.savefig(picture, dpi=130)
            print(f"wrote {args.output} and {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
