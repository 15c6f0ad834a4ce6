"""Needle in a haystack: does a patched model still find one sentence in a long prompt?

    python -m eval.needle                                   # the bundled model, about two minutes on two CPU cores
    python -m eval.needle --model meta-llama/Llama-3.1-8B-Instruct --lengths 32768 131072 --device cuda

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
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from eval import common
from eval.haystack import encode, encode_fact, plant, random_facts, standard_library_text
from hf_flashprefill import FlashPrefillConfig, UnsupportedModelError, is_patched, patched, prefill_stats

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
    ids, _ = plant(corpus, length, pieces, random, _prefix(tokenizer))
    return Prompt("end", length, ids, [depth], [fact.answer], [length])


def middle_prompt(
    tokenizer: PreTrainedTokenizerBase, corpus: Sequence[int], length: int, depths: Sequence[float], random: Random
) -> Prompt:
    """A fact at each depth of the first half, all asked for and answered in the middle, more text after them."""
    facts = [encode_fact(tokenizer, fact) for fact in random_facts(random, len(depths))]
    pieces = [(depth * MIDDLE, fact.sentence) for depth, fact in zip(depths, facts, strict=True)]
    order = random.sample(range(len(facts)), len(facts))
    pieces += [(MIDDLE, facts[i].sentence) for i in order]
    ids, positions = plant(corpus, length, pieces, random, _prefix(tokenizer))
    asked = [facts[i] for i in order]
    starts = [start + fact.answer_start for start, fact in zip(positions[len(facts) :], asked, strict=True)]
    return Prompt("middle", length, ids, [depths[i] for i in order], [fact.answer for fact in asked], starts)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of every text."""
    return [] if tokenizer.bos_token_id is None or not tokenizer("")["input_ids"] else [tokenizer.bos_token_id]


@torch.no_grad()
def answer(model: PreTrainedModel, prompt: Prompt) -> Outcome:
    """Ask the model as it is."""
    ids = torch.tensor([prompt.ids], device=model.device)
    if prompt.placement == "end":
        clock, expected = FirstTokenClock(), prompt.answers[0]
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(expected),
            do_sample=False,
            pad_token_id=model.generation_config.eos_token_id if model.config.pad_token_id is None else None,
            streamer=clock,
        )
        correct = [made[0, len(prompt.ids) :].tolist() == expected]
        seconds = clock.seconds
    else:
        asked = torch.tensor(
            [start + i - 1 for start, a in zip(prompt.answer_starts, prompt.answers, strict=True) for i in range(len(a))],
            device=model.device,
        )
        started = time.perf_counter()
        choice = model(ids, logits_to_keep=asked).logits[0].argmax(-1).tolist()
        seconds = time.perf_counter() - started
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
                    "density": _mean([row["density"] for row in chosen]),
                    "unpatched_seconds": _mean([row["unpatched_seconds"] for row in chosen]),
                    "patched_seconds": _mean([row["patched_seconds"] for row in chosen]),
                }
            )
    return summary


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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
            "dense" if row["density"] is None else f"{row['density']:.3f}",
            f"{row['unpatched_seconds']:.2f}",
            f"{row['patched_seconds']:.2f}",
        ]
        for row in summary
    ]
    return common.format_table(header, rows)


def draw_heat_map(rows: list[dict], path: Path, title: str) -> None:
    """Accuracy by length and depth: one line of panels per placement, unpatched beside patched."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    figure, axes = plt.subplots(
        len(PLACEMENTS), 2, figsize=(2.5 + 1.3 * len(lengths), 6), sharex=True, sharey=True, layout="constrained"
    )
    for line, placement in zip(axes, PLACEMENTS, strict=True):
        for axis, state in zip(line, ("unpatched", "patched"), strict=True):
            grid = []
            for depth in depths:
                cells = [
                    [r[f"{state}_correct"] for r in rows if (r["placement"], r["length"], r["depth"]) == (placement, n, depth)]
                    for n in lengths
                ]
                grid.append([sum(cell) / len(cell) if cell else float("nan") for cell in cells])
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for y, line_values in enumerate(grid):
                for x, value in enumerate(line_values):
                    axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8)
            axis.set_title(f"question {'at the end' if placement == 'end' else 'in the middle'}, {state}", fontsize=9)
            axis.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    figure.supxlabel("prompt length in tokens", fontsize=9)
    figure.supylabel("depth of the fact before the question", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="answers right", shrink=0.6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    defaults = FlashPrefillConfig()
    parser = argparse.ArgumentParser(prog="python -m eval.needle", description=__doc__.split("\n\n")[0])
    common.add_model_arguments(parser)
    parser.add_argument("--alpha", type=float, default=defaults.alpha, help="threshold (default: %(default)s)")
    parser.add_argument("--selector", default=defaults.selector, help="rule that scores blocks (default: %(default)s)")
    parser.add_argument(
        "--min-seq-len", type=int, default=1, help="shortest prompt that runs sparse (default: %(default)s, all of them)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="0 to 1")
    parser.add_argument("--trials", type=int, default=2, help="prompts per length, depth and placement")
    parser.add_argument("--text-file", help="the haystack; default: held-out standard-library source")
    parser.add_argument("--output", type=Path, default=Path("results/needle"), help="folder for the JSON and the picture")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def check_arguments(args: argparse.Namespace) -> FlashPrefillConfig:
    if any(not 0 <= depth <= 1 for depth in args.depths):
        raise common.UsageError(f"--depths must lie from 0 to 1, got {args.depths}")
    if args.trials < 1:
        raise common.UsageError(f"--trials must be at least 1, got {args.trials}")
    try:
        return FlashPrefillConfig(alpha=args.alpha, selector=args.selector, min_seq_len=args.min_seq_len)
    except (ValueError, TypeError) as error:
        raise common.UsageError(str(error)) from None


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    config = check_arguments(args)
    text = common.read_text(args.text_file) if args.text_file else standard_library_text("held_out")
    model, tokenizer = common.load_model(args.model, args.device, args.dtype)
    corpus = encode(tokenizer, text)
    random = Random(args.seed)
    depths = sorted(args.depths)
    try:
        prompts = [
            prompt
            for length in args.lengths
            for _ in range(args.trials)
            for prompt in [
                *(end_prompt(tokenizer, corpus, length, depth, random) for depth in depths),
                middle_prompt(tokenizer, corpus, length, depths, random),
            ]
        ]
        rows = []
        for prompt in tqdm(prompts, desc="needle", unit="prompt"):
            before, after = compare(model, prompt, config)
            for depth, was, now in zip(prompt.depths, before.correct, after.correct, strict=True):
                rows.append(
                    {
                        "placement": prompt.placement,
                        "length": prompt.length,
                        "depth": depth,
                        "unpatched_correct": was,
                        "patched_correct": now,
                        "density": after.density,
                        "unpatched_seconds": before.seconds,
                        "patched_seconds": after.seconds,
                    }
                )
    except (UnsupportedModelError, ValueError) as error:
        raise common.UsageError(str(error)) from None

    summary = summarise(rows)
    record = {
        "harness": "needle",
        "environment": common.environment(model.device),
        "model": {"name": Path(args.model).name, "parameters": model.num_parameters(), "dtype": str(model.dtype)},
        "config": config.to_dict(),
        "arguments": {
            "lengths": args.lengths,
            "depths": depths,
            "trials": args.trials,
            "seed": args.seed,
            "text_file": args.text_file,
        },
        "summary": summary,
        "rows": rows,
    }
    common.write_json(args.output / "needle.json", record)
    picture = args.output / "needle.png"
    draw_heat_map(rows, picture, f"{record['model']['name']}, selector {config.selector}, alpha {config.alpha:g}")
    print(f"selector {config.selector}, alpha {config.alpha:g}, {asdict(config)['dense_tail_blocks']} dense tail blocks")
    print(summary_table(summary))
    print(
        "At the end, the question's rows are dense by rule; only the questions in the middle test the selection.\n"
        f"wrote {args.output / 'needle.json'} and {picture}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(common.run_command(main))
