"""Tasks of the lm-evaluation-harness, unpatched against patched, in one process on the same samples.

    pip install lm_eval
    python -m eval.lm_eval_adapter --model meta-llama/Llama-3.1-8B-Instruct --tasks longbench_hotpotqa --limit 50
    python -m eval.lm_eval_adapter --tasks my_task --include-path folder_with_yaml        # a task of your own

The harness needs no changes: its `HFLM` takes a model object, and a patched model is a model. In a script of your own,
`lm_eval.simple_evaluate(model=HFLM(pretrained=patch_model(model), tokenizer=tokenizer), tasks=[...])` is all there is.

What this adds is the pairing: per task and metric the change between the two states and its standard error over samples,
and the density, which tells whether a task's prompts are long enough for the result to mean anything. Most tasks of the
harness are short. Prompts run one at a time: in a padded batch, scores of the padding's rows would take part in the choice of
blocks for the last real rows.

After an interruption the same command takes up the answers that the unpatched model has given, from lm_eval's request cache
beside the output. The patched model starts again, because the density is counted while it answers.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
    """One metric of one task in the JSON; means over samples."""

    task: str
    metric: str
    samples: int
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
) -> dict[str, list[dict]]:
    """The harness's samples by task, for the model as it is; ``cache`` is where its answers are kept."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=args.max_length)
    results = simple_evaluate(
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
    return results["samples"]


def cache_path(run: Result, output: Path, weights: int) -> Path:
    """Where the answers of the unpatched model are kept, but for what lm_eval appends; of this run's settings alone."""
    settings = recording.run_settings(run) | {"weights": weights, "lm_eval": recording.package_version("lm_eval")}
    return output.with_name(f"{output.stem}.{settings_key(settings)}.unpatched")


def remove_cache(cache: Path) -> None:
    """Delete the answers that are kept there."""
    for path in cache.parent.glob(f"{cache.name}_rank*.db*"):
        path.unlink()


def pair(before: dict, after: dict) -> list[LmEvalRow]:
    """Metrics that every sample has, task by task, paired by document."""
    rows = []
    for task in before:
        after_by_document = {(s["doc_id"], s.get("filter")): s for s in after[task]}
        pairs = [(s, after_by_document[s["doc_id"], s.get("filter")]) for s in before[task]]
        for filtered in dict.fromkeys(s.get("filter") for s, _ in pairs):
            chosen = [(was, now) for was, now in pairs if was.get("filter") == filtered]
            for metric in chosen[0][0].get("metrics", []):
                values = [(was[metric], now[metric]) for was, now in chosen]
                if not all(isinstance(value, (int, float)) for both in values for value in both):
                    continue
                change, error = paired_mean([float(now) - float(was) for was, now in values])
                means = (sum(float(both[i]) for both in values) / len(values) for i in (0, 1))
                name = metric if filtered in (None, "none") else f"{metric},{filtered}"
                rows.append(LmEvalRow(task, name, len(values), *means, change, error))
    return rows


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
    except ImportError:
        raise commands.UsageError("the lm-evaluation-harness is not installed: pip install lm_eval") from None
    model, tokenizer = models.load_model(args.model, args.device, args.dtype)
    run = recording.model_run("lm_eval", args, args.model, model, config)
    cache = cache_path(run, args.output, recording.fingerprint(model))
    try:
        manager = TaskManager(include_path=args.include_path)
        before = evaluate(model, tokenizer, manager, args, cache)
        with patched(model, config=config):
            after = evaluate(model, tokenizer, manager, args)
            density = prefill_stats(model).density
    except (UnsupportedModelError, KeyError, ValueError) as error:
        # Unknown tasks arrive as KeyError or ValueError, by version.
        remove_cache(cache)
        raise commands.UsageError(f"--tasks {' '.join(args.tasks)}: {commands.first_line(error)}") from None
    rows = [asdict(row) for row in pair(before, after)]
    if rows:
        recording.write_result(run, args.output, [{"tasks": args.tasks, "density": density}], rows)
    remove_cache(cache)
    if not rows:
        raise commands.UsageError(f"--tasks {' '.join(args.tasks)}: no metric with a value per sample")
    print(table(rows, density))
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
