"""Tasks of the lm-evaluation-harness, unpatched against patched, in one process on the same samples.

    pip install -e ".[lm-eval]"
    python -m eval.lm_eval_adapter --model meta-llama/Llama-3.1-8B-Instruct --tasks longbench_hotpotqa --limit 50
    python -m eval.lm_eval_adapter --tasks my_task --include-path folder_with_yaml        # a task of your own

The harness needs no changes: its `HFLM` takes a model object, and a patched model is a model. In a script of your own,
`lm_eval.simple_evaluate(model=HFLM(pretrained=patch_model(model), tokenizer=tokenizer), tasks=[...])` is all there is.

What this adds is the pairing: per task and metric the change between the two states and its standard error over samples,
and the density, which tells whether a task's prompts are long enough for the result to mean anything. A metric that is no
mean over samples, such as perplexity, has two rows: the harness's aggregates, without a standard error, and the paired values,
whose name says what they are. Most tasks of the harness are short. Prompts run one at a time: in a padded batch, scores of
the padding's rows would take part in the choice of blocks for the last real rows.

After an interruption the same command takes up the answers that the unpatched model has given, from lm_eval's request cache
beside the output. The patched model starts again, because the density is counted while it answers.
"""

from __future__ import annotations

import argparse
import glob
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval import commands, models, options, recording, tables
from eval.runner import settings_key
from eval.schema import Result
from eval.statistics import paired_mean
from hf_flashprefill import UnsupportedModelError, patched, prefill_stats

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class LmEvalRow:
    """One metric of one task in the JSON: means over samples that are paired, or else what lm_eval aggregated."""

    task: str
    metric: str
    samples: int
    paired: bool
    unpatched: float
    patched: float
    change: float
    change_standard_error: float | None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manager: TaskManager,
    args: argparse.Namespace,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The harness's samples and aggregates by task, for the model as it is; ``cache`` is where its answers are kept."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=args.max_length)
    return simple_evaluate(
        model=language_model,
        tasks=args.tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        use_cache=None if cache is None else str(cache),
        task_manager=manager,
        apply_chat_template=args.apply_chat_template,
        bootstrap_iters=0,
        random_seed=args.seed,
        numpy_random_seed=args.seed,
        torch_random_seed=args.seed,
        fewshot_random_seed=args.seed,
        log_samples=True,
    )


def cache_path(run: Result, output: Path, weights: int) -> Path:
    """Where the answers of the unpatched model are kept, but for what lm_eval appends; of this run's settings alone."""
    settings = recording.run_settings(run) | {"weights": weights, "lm_eval": recording.package_version("lm_eval")}
    return output.with_name(f"{output.stem}.{settings_key(settings)}.unpatched")


def remove_cache(cache: Path, *, only_empty: bool = False) -> None:
    """Delete the answers that are kept there; with ``only_empty``, the file that lm_eval makes before the first one."""
    for path in cache.parent.glob(f"{glob.escape(cache.name)}_rank*.db*"):
        if not (only_empty and _holds_answers(path)):
            path.unlink()


def _holds_answers(path: Path) -> bool:
    from sqlitedict import SqliteDict

    with SqliteDict(str(path)) as answers:
        return len(answers) > 0


def pair(before: dict, after: dict) -> tuple[list[LmEvalRow], list[str]]:
    """The metrics of both states' results, paired by document, and a line for each metric that cannot be paired."""
    rows, unpaired = [], []
    for task in before["samples"]:
        after_by_document = {(s["doc_id"], s.get("filter")): s for s in after["samples"][task]}
        pairs = [(s, after_by_document[s["doc_id"], s.get("filter")]) for s in before["samples"][task]]
        for filtered in dict.fromkeys(s.get("filter") for s, _ in pairs):
            chosen = [(was, now) for was, now in pairs if was.get("filter") == filtered]
            for metric in dict.fromkeys(name for both in chosen for sample in both for name in sample.get("metrics", [])):
                key = f"{metric},{filtered or 'none'}"
                name = key.removesuffix(",none")
                aggregates = [state["results"].get(task, {}).get(key) for state in (before, after)]
                if not all(isinstance(number, Real) and math.isfinite(number) for number in aggregates):
                    aggregates = []
                values = [(was.get(metric), now.get(metric)) for was, now in chosen]
                row, reason = _paired_row(task, name, values, aggregates)
                if aggregates and (row is None or row.metric != name):
                    was, now = map(float, aggregates)
                    rows.append(LmEvalRow(task, name, len(values), False, was, now, now - was, None))
                rows += [row] if row else []
                unpaired += [f"{task} {name}: {reason}"] if reason else []
    return rows, unpaired


def _paired_row(
    task: str, name: str, values: list[tuple[Any, Any]], aggregates: Sequence[float]
) -> tuple[LmEvalRow | None, str | None]:
    """The row of a metric's values per sample, or why there is none; its name says what they are if not what lm_eval says."""
    if any(value is None for both in values for value in both):
        return None, "not every sample has it"
    weighted = [tuple(_weighted(value) for value in both) for both in values]
    if any(one is None for both in weighted for one in both):
        return None, "its values per sample are not numbers"
    counts = [sum(not math.isfinite(both[i][0]) for both in weighted) for i in (0, 1)]
    if any(counts):
        # From NaN in the logits, say. Differences of infinities are no numbers either.
        found = f"{counts[0]} unpatched and {counts[1]} patched of {len(values)} samples"
        return None, f"the model's answers are not numbers (NaN or infinite: {found})"
    weights = [was[1] for was, _ in weighted]
    if weights != [now[1] for _, now in weighted]:
        return None, "the weights of its samples differ between the states"
    total = sum(weights)
    means = [sum(both[i][0] for both in weighted) / total for i in (0, 1)]

    def aggregated_as(formula: Callable[[float], float]) -> bool:
        return bool(aggregates) and all(
            math.isclose(formula(mean), number, rel_tol=1e-6) for mean, number in zip(means, aggregates, strict=True)
        )

    if any(isinstance(value, (tuple, list)) for both in values for value in both):
        # Tuples may also be something else, such as the right class and the model's: the aggregate tells.
        if not (aggregated_as(_perplexity) or aggregated_as(lambda mean: -mean / math.log(2))):
            return None, "its values per sample are not log-likelihoods with weights"
        name += " (log-likelihood per unit of weight)"
    elif aggregated_as(_perplexity):
        name += " (log-likelihood per sample)"
    elif not aggregated_as(lambda mean: mean):
        name += " (values per sample)"
    change = means[1] - means[0]
    # What a sample adds to the change beyond its weight's share: linear in the sums, whose ratio the change is.
    rest = [(now[0] - was[0] - change * now[1]) * len(values) / total for was, now in weighted]
    return LmEvalRow(task, name, len(values), True, *means, change, paired_mean(rest)[1]), None


def _weighted(value: Any) -> tuple[float, float] | None:
    """A sample's value and its weight, which is 1 for a number alone; None for anything else."""
    parts = value if isinstance(value, (tuple, list)) else (value, 1)
    if len(parts) != 2 or not all(isinstance(part, Real) for part in parts) or not parts[1] > 0:
        return None
    return float(parts[0]), float(parts[1])


def _perplexity(log_likelihood: float) -> float:
    return math.exp(min(-log_likelihood, 700.0))


def table(rows: list[dict], density: float | None) -> str:
    header = ["task", "metric", "samples", "unpatched", "patched", "change"]
    cells = [
        [
            row["task"],
            row["metric"],
            str(row["samples"]),
            f"{row['unpatched']:.4f}",
            f"{row['patched']:.4f}",
            f"{row['change']:+.4f}" + (f" ± {e:.4f}" if (e := row["change_standard_error"]) is not None else ""),
        ]
        for row in rows
    ]
    return f"{tables.format_table(header, cells)}\ndensity {tables.format_density(density)}"


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("lm_eval_adapter", __doc__)
    options.add_model_arguments(parser)
    options.add_config_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, help="as for lm_eval")
    parser.add_argument("--include-path", help="folder with task YAML files of your own")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--max-length", type=int, help="tokens; default: what the model's config says")
    parser.add_argument("--apply-chat-template", action="store_true")
    parser.add_argument("--limit", type=int, help="at most this many samples of each task")
    parser.add_argument("--output", type=Path, default=Path("results/lm_eval.json"), help="JSON file (default: %(default)s)")
    options.add_seed_argument(parser)
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    config = options.check_config_arguments(args).resolved()
    options.check_one_process("lm_eval_adapter")
    if args.include_path and not Path(args.include_path).is_dir():
        raise commands.UsageError(f"--include-path {args.include_path}: there is no such folder")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "lm_eval":
            raise commands.UsageError('the lm-evaluation-harness is not installed: pip install -e ".[lm-eval]"') from None
        raise commands.UsageError(f"lm_eval cannot be imported: {commands.first_line(error)}") from None
    model, tokenizer = models.load_model(args.model, args.device, args.dtype)
    run = recording.model_run("lm_eval", args, args.model, model, config)
    recording.check_replaceable(run, args.output)
    try:
        # Before the first arm, which may take hours.
        with patched(model, config=config):
            pass
    except UnsupportedModelError as error:
        raise commands.UsageError(f"--model {args.model}: {commands.first_line(error)}") from None
    except ValueError as error:
        raise commands.UsageError(commands.first_line(error)) from None
    cache = cache_path(run, args.output, recording.fingerprint(model))
    try:
        manager = TaskManager(include_path=args.include_path)
        before = evaluate(model, tokenizer, manager, args, cache)
        with patched(model, config=config):
            after = evaluate(model, tokenizer, manager, args)
            density = prefill_stats(model).density
    except (KeyError, ValueError) as error:
        # Unknown tasks arrive as KeyError or ValueError, by version.
        remove_cache(cache, only_empty=True)
        raise commands.UsageError(f"--tasks {' '.join(args.tasks)}: {commands.first_line(error)}") from None
    compared, unpaired = pair(before, after)
    if not compared:
        reasons = "; ".join(unpaired) or "its samples have no metric"
        raise commands.UsageError(f"--tasks {' '.join(args.tasks)}: nothing to compare: {reasons}")
    rows = [asdict(row) for row in compared]
    recording.write_result(run, args.output, [{"tasks": args.tasks, "density": density}], rows)
    # Aggregates alone are half a result: the answers may yet be wanted.
    if any(row.paired for row in compared):
        remove_cache(cache)
    print(table(rows, density))
    for line in unpaired:
        print(f"not paired: {line}")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
