"""Recall of many planted facts, asked all over a long prompt, and the perplexity of the text around them.

    python -m eval.recall                                                # the bundled model, minutes on two CPU cores
    python -m eval.recall --model meta-llama/Llama-3.1-8B-Instruct --lengths 32768 65536

A prompt is ordinary text with made-up facts ("The secret code of Dalomi is 481923.") and, later, the same sentences again.
The second time, the sentence up to the code is a question. The answer is teacher-forced: it counts as right if every token
of the code would have been the model's first choice, which is what greedy decoding would have said. One forward call so
answers dozens of questions, and because they stand all over the second half of the prompt and not at its end, it is the
block selection that decides them: the last query blocks see every key block by rule and hide what a selection loses.

The same prompts are scored unpatched and patched. Differences are paired: recall per question, with a 95 % interval
(Agresti and Min), perplexity per prompt over the tokens that belong to no planted sentence, with a standard error.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from eval import commands, models, options, recording, tables
from eval.recall_prompts import PLACEMENTS, RecallPrompt, check_prompt_arguments, make_prompts
from eval.scoring import score_tokens
from eval.statistics import paired_difference, perplexity_rise
from eval.texts import add_text_arguments, corpus_ids
from hf_flashprefill import FlashPrefillConfig, patched, prefill_stats


class RecallScore(NamedTuple):
    """What a model made of one prompt.

    Attributes:
        correct: bool [Q], per question.
        nll: float32 [S], negative log-likelihood of every token in nats; NaN for the first.
    """

    correct: torch.Tensor
    nll: torch.Tensor


def score(model: PreTrainedModel, prompt: RecallPrompt) -> RecallScore:
    """Answers and text perplexity of one prompt, in one forward call of the model as it is, patched or not.

    Raises:
        ValueError: The model computes its logits in a way that cannot be done in parts.
    """
    scores = score_tokens(model, prompt.ids)
    correct = [bool(scores.first_choice[question.answer].all()) for question in prompt.questions]
    return RecallScore(torch.tensor(correct), scores.nll)


@dataclass(frozen=True)
class QuestionRow:
    """One question in the JSON: where the answer stands, what it had to reach over, and who got it right."""

    position: int
    distance: int
    fact_distance: int
    asked_before: int
    unpatched_correct: bool
    patched_correct: bool


@dataclass(frozen=True)
class RecallRow:
    """One prompt in the JSON. ``nll`` is the mean over the ``text_tokens`` tokens of ordinary text."""

    length: int
    prompt: str
    density: float | None
    text_tokens: int
    unpatched_nll: float
    patched_nll: float
    unpatched_seconds: float
    patched_seconds: float
    head_density: list[list[float]]
    questions: list[QuestionRow]


def compare(model: PreTrainedModel, prompt: RecallPrompt, config: FlashPrefillConfig) -> RecallRow:
    """The same prompt unpatched and patched."""
    started = time.perf_counter()
    before = score(model, prompt)
    between = time.perf_counter()
    with patched(model, config=config):
        after = score(model, prompt)
        ended = time.perf_counter()
        density, heads = prefill_stats(model).density, models.head_densities(model)
    questions = [
        QuestionRow(q.answer.start, q.distance, q.fact_distance, q.asked_before, was, now)
        for q, was, now in zip(prompt.questions, before.correct.tolist(), after.correct.tolist(), strict=True)
    ]
    return RecallRow(
        length=len(prompt.ids),
        prompt=prompt.name,
        density=density,
        text_tokens=int(prompt.text.sum()),
        unpatched_nll=before.nll[prompt.text].double().mean().item(),
        patched_nll=after.nll[prompt.text].double().mean().item(),
        unpatched_seconds=between - started,
        patched_seconds=ended - between,
        head_density=heads,
        questions=questions,
    )


def summarise(rows: list[dict]) -> list[dict]:
    """Per length: recall with the interval of its change, perplexity with the standard error of its rise, density; and
    recall by eighths of the prompt, for distance and for position."""
    summary = []
    for length in sorted({row["length"] for row in rows}):
        chosen = [row for row in rows if row["length"] == length]
        questions = [question for row in chosen for question in row["questions"]]
        before, after = ([q[f"{state}_correct"] for q in questions] for state in ("unpatched", "patched"))
        change = paired_difference(before, after)
        rise = perplexity_rise([row["patched_nll"] - row["unpatched_nll"] for row in chosen])
        summary.append(
            {
                "length": length,
                "prompts": len(chosen),
                "questions": len(questions),
                **tables.densities(chosen),
                "unpatched_recall": sum(before) / len(before),
                "patched_recall": sum(after) / len(after),
                "recall_change": change.estimate,
                "recall_change_low": change.low,
                "recall_change_high": change.high,
                "unpatched_nll": tables.mean([row["unpatched_nll"] for row in chosen]),
                "patched_nll": tables.mean([row["patched_nll"] for row in chosen]),
                "perplexity_rise": rise.rise,
                "perplexity_rise_standard_error": rise.standard_error,
                "by_distance": by_eighth(questions, "distance", length),
                "by_position": by_eighth(questions, "position", length),
            }
        )
    return summary


def by_eighth(questions: list[dict], field: str, length: int) -> list[dict]:
    """Recall of the questions whose ``field`` lies in each eighth of ``length``; eighths without any are left out."""
    table = []
    for part in range(8):
        chosen = [question for question in questions if part * length <= 8 * question[field] < (part + 1) * length]
        if chosen:
            shares = {s: sum(q[f"{s}_correct"] for q in chosen) / len(chosen) for s in ("unpatched", "patched")}
            table.append({"start": part * length // 8, "end": (part + 1) * length // 8, "questions": len(chosen)} | shares)
    return table


def summary_table(summary: list[dict]) -> str:
    header = ["tokens", "asked", "density", "unpatched", "patched", "change (95 %)", "perplexity", "rise"]
    cells = []
    for row in summary:
        low, high = 100 * row["recall_change_low"], 100 * row["recall_change_high"]
        cells.append(
            [
                str(row["length"]),
                str(row["questions"]),
                tables.format_densities(row, "prompts"),
                f"{row['unpatched_recall']:.1%}",
                f"{row['patched_recall']:.1%}",
                f"{100 * row['recall_change']:+.1f} pt ({low:+.1f} to {high:+.1f})",
                tables.format_perplexity(row["unpatched_nll"]),
                tables.format_rise(row["perplexity_rise"], row["perplexity_rise_standard_error"]),
            ]
        )
    return tables.format_table(header, cells)


def detail_table(table: list[dict], what: str) -> str:
    header = [what, "asked", "unpatched", "patched"]
    cells = [
        [f"{row['start']}-{row['end']}", str(row["questions"]), f"{row['unpatched']:.1%}", f"{row['patched']:.1%}"]
        for row in table
    ]
    return tables.format_table(header, cells)


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("recall", __doc__)
    options.add_run_arguments(parser, "recall", lengths=[2048, 4096, 8192])
    add_text_arguments(parser)
    parser.add_argument("--prompts", type=int, default=4, help="per length (default: %(default)s)")
    parser.add_argument("--facts", type=int, default=16, help="in each prompt (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=48, help="in each prompt (default: %(default)s)")
    parser.add_argument(
        "--placement", choices=PLACEMENTS, default="second-half", help="of the questions (default: %(default)s)"
    )
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    config = options.check_run_arguments(args).resolved()
    check_prompt_arguments(args)
    model, tokenizer = models.load_model(args.model, args.device, args.dtype)
    models.check_context(model, max(args.lengths))
    corpus = corpus_ids(tokenizer, args)
    try:
        groups = [
            make_prompts(tokenizer, corpus, length, args.prompts, args.facts, args.questions, args.seed, args.placement)
            for length in dict.fromkeys(args.lengths)
        ]
    except ValueError as error:
        raise commands.UsageError(f"--lengths: {error}") from None
    prompts = options.limited(groups, args.limit)

    def work(i: int) -> list[dict]:
        return [asdict(compare(model, prompts[i], config))]

    names = [prompt.name for prompt in prompts]
    result = recording.run_and_record("recall", args, model, config, names, work, summarise, corpus)
    if result:
        print(summary_table(result.summary))
        longest = result.summary[-1]
        print(f"\nat {longest['length']} tokens, by distance in tokens from the nearest earlier copy of the code")
        print(detail_table(longest["by_distance"], "distance"))
        print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
