"""Needle in a haystack: does a patched model still find one sentence in a long prompt?

    python -m eval.needle                                   # the bundled model, some minutes on a CPU
    python -m eval.needle --model meta-llama/Llama-3.1-8B-Instruct --lengths 32768 131072
    accelerate launch --num_processes 8 -m eval.needle --model Qwen/Qwen3-8B --lengths 65536

Every prompt is answered twice by the same model, unpatched and patched. The question stands at one of two places. At the
end, where needle tests usually put it, the question's own block is among the last query blocks, which see every key block
whatever the selection says. In the middle, with as much text after it, only the selection decides. There the answer is part
of the prompt and counts as found if every token of it would have been the model's first choice.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from eval import commands, models, options, recording, tables
from eval.haystack import encode_fact, plant, random_facts
from eval.pictures import draw_needle
from eval.texts import add_text_arguments, corpus_ids
from hf_flashprefill import FlashPrefillConfig, is_patched, patched, prefill_stats

MIDDLE = 0.5
PLACEMENTS = ("end", "middle")


@dataclass(frozen=True)
class Prompt:
    """Token ids and, per depth asked for, where its answer belongs.

    For a question at the end the ids stop before the answer; in the middle they contain it.
    """

    placement: str
    length: int
    ids: list[int]
    depths: list[float]
    answers: list[list[int]]
    answer_starts: list[int]


@dataclass(frozen=True)
class Outcome:
    """One prompt, one model state: which answers were right and how long the prefill took."""

    correct: list[bool]
    seconds: float
    density: float | None


class FirstTokenClock(BaseStreamer):
    """Notes when ``generate`` hands over the first token it made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.calls = 0
        self.seconds = 0.0

    def put(self, value: torch.Tensor) -> None:
        # The first call brings the prompt, the second the first new token, which is on the host by then.
        self.calls += 1
        if self.calls == 2:
            self.seconds = time.perf_counter() - self.started

    def end(self) -> None:
        pass


def end_prompt(tokenizer: PreTrainedTokenizerBase, corpus: Sequence[int], length: int, depth: float, random: Random) -> Prompt:
    """One fact at ``depth`` of the text, asked for at the very end."""
    fact = encode_fact(tokenizer, random_facts(random, 1)[0])
    pieces = [(depth, fact.sentence), (1.0, fact.question)]
    ids, _ = plant(corpus, length, pieces, random, models.text_prefix(tokenizer))
    return Prompt("end", length, ids, [depth], [fact.answer], [length])


def middle_prompt(
    tokenizer: PreTrainedTokenizerBase, corpus: Sequence[int], length: int, depths: Sequence[float], random: Random
) -> Prompt:
    """A fact at each depth of the first half, all asked for and answered in the middle, more text after them."""
    facts = [encode_fact(tokenizer, fact) for fact in random_facts(random, len(depths))]
    pieces = [(depth * MIDDLE, fact.sentence) for depth, fact in zip(depths, facts, strict=True)]
    order = random.sample(range(len(facts)), len(facts))
    pieces += [(MIDDLE, facts[i].sentence) for i in order]
    ids, positions = plant(corpus, length, pieces, random, models.text_prefix(tokenizer))
    asked = [facts[i] for i in order]
    starts = [start + fact.answer_start for start, fact in zip(positions[len(facts) :], asked, strict=True)]
    return Prompt("middle", length, ids, [depths[i] for i in order], [fact.answer for fact in asked], starts)


@torch.no_grad()
def answer(model: PreTrainedModel, prompt: Prompt) -> Outcome:
    """Ask the model as it is."""
    if prompt.placement == "end":
        clock, expected = FirstTokenClock(), prompt.answers[0]
        correct = [models.continuation(model, prompt.ids, len(expected), clock) == expected]
        seconds = clock.seconds
    else:
        asked = torch.tensor(
            [start + i - 1 for start, a in zip(prompt.answer_starts, prompt.answers, strict=True) for i in range(len(a))],
            device=model.device,
        )
        ids = torch.tensor([prompt.ids], device=model.device)
        started = time.perf_counter()
        logits = model(ids, logits_to_keep=asked).logits[0]
        choice = logits.argmax(-1).tolist()
        seconds = time.perf_counter() - started
        models.check_numbers(model, logits.float().logsumexp(-1))
        correct, used = [], 0
        for expected in prompt.answers:
            correct.append(choice[used : used + len(expected)] == expected)
            used += len(expected)
    return Outcome(correct, seconds, prefill_stats(model).density if is_patched(model) else None)


def compare(model: PreTrainedModel, prompt: Prompt, config: FlashPrefillConfig) -> tuple[Outcome, Outcome]:
    """The same prompt unpatched and patched."""
    before = answer(model, prompt)
    with patched(model, config=config):
        after = answer(model, prompt)
    return before, after


@dataclass(frozen=True)
class NeedleRow:
    """One question in the JSON: where it stands, how deep its fact, and who got it right."""

    placement: str
    length: int
    depth: float
    unpatched_correct: bool
    patched_correct: bool
    density: float | None
    unpatched_seconds: float
    patched_seconds: float


def rows_of(prompt: Prompt, before: Outcome, after: Outcome) -> list[dict]:
    return [
        asdict(NeedleRow(prompt.placement, prompt.length, depth, was, now, after.density, before.seconds, after.seconds))
        for depth, was, now in zip(prompt.depths, before.correct, after.correct, strict=True)
    ]


def make_prompts(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Sequence[int],
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int,
) -> list[list[tuple[str, Prompt]]]:
    """Groups of (name, prompt): one group per length and depth with the question at the end, and one per length with it in
    the middle. A prompt's name is its seed."""
    groups = []
    for length in lengths:
        for depth in depths:
            names = [f"{seed}/{length}/end/{depth}/{trial}" for trial in range(trials)]
            groups.append([(name, end_prompt(tokenizer, corpus, length, depth, Random(name))) for name in names])
        names = [f"{seed}/{length}/middle/{trial}" for trial in range(trials)]
        groups.append([(name, middle_prompt(tokenizer, corpus, length, depths, Random(name))) for name in names])
    return groups


def summarise(rows: list[dict]) -> list[dict]:
    """Accuracy, density and prefill seconds per placement and length, all depths together."""
    summary = []
    for placement in PLACEMENTS:
        for length in sorted({row["length"] for row in rows}):
            chosen = [row for row in rows if row["placement"] == placement and row["length"] == length]
            if not chosen:
                continue
            questions = len(chosen)
            summary.append(
                {
                    "placement": placement,
                    "length": length,
                    "questions": questions,
                    "unpatched": sum(row["unpatched_correct"] for row in chosen) / questions,
                    "patched": sum(row["patched_correct"] for row in chosen) / questions,
                    **tables.densities(chosen),
                    "unpatched_seconds": tables.mean([row["unpatched_seconds"] for row in chosen]),
                    "patched_seconds": tables.mean([row["patched_seconds"] for row in chosen]),
                }
            )
    return summary


def summary_table(summary: list[dict]) -> str:
    header = ["question", "tokens", "asked", "unpatched", "patched", "difference", "density", "prefill s", "patched s"]
    rows = [
        [
            row["placement"],
            str(row["length"]),
            str(row["questions"]),
            f"{row['unpatched']:.1%}",
            f"{row['patched']:.1%}",
            f"{100 * (row['patched'] - row['unpatched']):+.1f} pt",
            tables.format_densities(row, "questions"),
            f"{row['unpatched_seconds']:.2f}",
            f"{row['patched_seconds']:.2f}",
        ]
        for row in summary
    ]
    return tables.format_table(header, rows)


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("needle", __doc__)
    options.add_run_arguments(parser, "needle", lengths=[1024, 2048, 4096])
    add_text_arguments(parser)
    parser.add_argument(
        "--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="0 to 1 (default: %(default)s)"
    )
    parser.add_argument("--trials", type=int, default=2, help="prompts per length, depth and placement (default: %(default)s)")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    config = options.check_run_arguments(args).resolved()
    options.check_range("--depths", args.depths, 0, 1)
    options.check_range("--trials", args.trials, 1)
    args.depths = sorted(set(args.depths))
    model, tokenizer = models.load_model(args.model, args.device, args.dtype)
    corpus = corpus_ids(tokenizer, args)
    try:
        groups = make_prompts(tokenizer, corpus, list(dict.fromkeys(args.lengths)), args.depths, args.trials, args.seed)
    except ValueError as error:
        raise commands.UsageError(f"--lengths: {error}") from None
    prompts = options.limited(groups, args.limit)
    # The last token of an answer is not read.
    models.check_context(model, max(len(prompt.ids) + max(map(len, prompt.answers)) - 1 for _, prompt in prompts))

    def work(i: int) -> list[dict]:
        prompt = prompts[i][1]
        return rows_of(prompt, *compare(model, prompt, config))

    names = [name for name, _ in prompts]
    result = recording.run_and_record("needle", args, model, config, names, work, summarise, corpus, shows_times=True)
    if result:
        picture = args.output.with_suffix(".png")
        draw_needle(result.rows, f"{result.model['name']}, {tables.describe(config)}").savefig(picture, dpi=130)
        print(f"{tables.describe(config)}, {config.dense_tail_blocks} dense tail blocks")
        print(summary_table(result.summary))
        print(
            "At the end, the question's rows are dense by rule; only the questions in the middle test the selection.\n"
            f"wrote {args.output} and {picture}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
