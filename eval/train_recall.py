"""Train the small retrieval model that the harnesses and tests use by default.

The model learns to answer questions about facts planted in long source text. Windows grow in stages, because recall is
learnt quickly in short windows and then only has to be stretched. The model card holds the command that made the bundled
model and the time it took; without ``--packages`` the standard library alone is learnt by heart within the first stages:

    python -m eval.train_recall --packages torch transformers --output eval/checkpoints/recall-4m

The folder written holds the weights in bfloat16, the tokenizer, and a model card with this command and the dense recall
measured on text that training never saw.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import common, recording
from eval.haystack import (
    CODE_DIGITS,
    encode,
    encode_fact,
    package_sources,
    package_text,
    plant,
    random_fact,
    random_facts,
    standard_library_text,
)

NAME_POOL = 100_000
ANSWER_WEIGHT = 4.0
SPECIAL_TOKENS = ["<|pad|>", "<|end|>"]
# Every byte has a token.
LEAST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
# Each fact of a recall prompt and its question, with a token for every one of their 38 bytes.
LEAST_RECALL_LENGTH = 2 * len(DEPTHS) * 38


@dataclass(frozen=True)
class Stage:
    """``steps`` optimiser steps on windows of ``window`` tokens."""

    window: int
    steps: int


def parse_stages(text: str) -> list[Stage]:
    """``"1024:600,4096:200"`` -> stages of (window tokens, steps)."""
    stages = []
    for part in text.split(","):
        window, _, steps = part.partition(":")
        try:
            stages.append(Stage(int(window), int(steps)))
            if min(stages[-1].window, stages[-1].steps) < 1:
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"stages are WINDOW:STEPS pairs of at least 1, got {part!r}") from None
    return stages


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose digits stand alone, so that a code is always ``CODE_DIGITS`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[i : i + 100_000] for i in range(0, len(text), 100_000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")


def training_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Token ids of all texts, one after the other; pieces are encoded in parallel."""
    pieces = [text[i : i + 1_000_000] for text in texts for i in range(0, len(text), 1_000_000)]
    return np.concatenate([np.array(ids) for ids in tokenizer(pieces, add_special_tokens=False)["input_ids"]])


class PlantedWindows:
    """Endless windows of ordinary text, most with facts stated once and asked again later."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, corpus: np.ndarray, seed: int):
        self.corpus = corpus
        self.rng = np.random.default_rng(seed)
        random = Random(seed)
        names = [random_fact(random) for _ in range(NAME_POOL)]
        questions = tokenizer(["\n" + fact.question for fact in names], add_special_tokens=False)["input_ids"]
        self.questions = [np.array(ids, dtype=np.int64) for ids in questions]
        self.digits = np.array(tokenizer.convert_tokens_to_ids(list("0123456789")), dtype=np.int64)
        self.ending = np.array(tokenizer(".\n", add_special_tokens=False)["input_ids"], dtype=np.int64)

    def window(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and loss weights, both [length]; a code's first appearance cannot be predicted and weighs nothing."""
        start = self.rng.integers(0, len(self.corpus) - length)
        text = self.corpus[start : start + length]
        text_weights = np.ones(length, dtype=np.float32)
        if self.rng.random() < 0.3:
            return text, text_weights
        fact_count = int(self.rng.integers(2, max(4, min(48, length // 128))))
        positions, owners = [], []
        for owner in range(fact_count):
            stated = self.rng.random() * 0.9
            asked = stated + (1 - stated) * self.rng.random(self.rng.integers(1, 4))
            if owner < 2:
                # The far corners are rare among uniform draws: without these, a fact that opened a 16K window was found
                # in 67 % of the questions at its end (200 asked), and every other one in 99 %.
                # The very first token serves the model as attention sink as well, so facts that begin there need practice of
                # their own: before, 2 to 5 % of them were missed at 1K to 16K tokens (200 asked), about 0.5 % of the others.
                draw = self.rng.random()
                stated = 0.0 if draw < 0.25 and owner == 0 else self.rng.random() * 64 / length if draw < 0.5 else stated
                asked[0] = 1 - self.rng.random() * 128 / length
            positions.extend([stated, *asked])
            owners.extend([owner] * (1 + len(asked)))
        chosen = self.rng.choice(NAME_POOL, fact_count, replace=False)
        codes = [self.digits[self.rng.integers(0, 10, CODE_DIGITS)] for _ in range(fact_count)]
        pieces, weights, used, seen = [], [], 0, set()
        for index in np.argsort(positions):
            owner, cut = owners[index], int(positions[index] * length)
            question = self.questions[chosen[owner]]
            pieces += [text[used:cut], question, codes[owner], self.ending]
            answer_weight = ANSWER_WEIGHT if owner in seen else 0.0
            weights += [
                text_weights[used:cut],
                np.ones(len(question), dtype=np.float32),
                np.full(CODE_DIGITS, answer_weight, dtype=np.float32),
                np.ones(len(self.ending), dtype=np.float32),
            ]
            used = max(used, cut)
            seen.add(owner)
        pieces.append(text[used:])
        weights.append(text_weights[used:])
        return np.concatenate(pieces)[:length], np.concatenate(weights)[:length]

    def batches(self, length: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches [batch_size, length + 1] made ahead of time by a thread."""
        ready: queue.Queue = queue.Queue(maxsize=4)
        stopped = threading.Event()

        def produce() -> None:
            while not stopped.is_set():
                windows = [self.window(length + 1) for _ in range(batch_size)]
                batch = tuple(torch.from_numpy(np.stack(column)) for column in zip(*windows, strict=True))
                while not stopped.is_set():
                    try:
                        ready.put(batch, timeout=0.5)
                        break
                    except queue.Full:
                        continue

        threading.Thread(target=produce, daemon=True).start()
        try:
            while True:
                yield ready.get()
        finally:
            stopped.set()


def train(
    model: LlamaForCausalLM,
    data: PlantedWindows,
    stages: list[Stage],
    *,
    tokens_per_step: int,
    learning_rate: float,
    minutes: float,
) -> list[dict]:
    """Run all stages and return one log record per fifty steps.

    After ``minutes`` it stops where it is. The learning rate falls with the steps done or with the time gone, whichever is
    further, so that a slow machine leaves a settled model too, only of fewer steps.
    """
    device = model.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    total = sum(stage.steps for stage in stages)
    step, log, started = 0, [], time.monotonic()
    for stage in stages:
        # Activations grow with tokens per micro-batch, not with the window.
        batch_size = max(1, tokens_per_step // stage.window)
        batches = data.batches(stage.window, batch_size)
        for _ in tqdm(range(stage.steps), desc=f"window {stage.window}", mininterval=5):
            time_gone = (time.monotonic() - started) / (minutes * 60)
            # Warm up 100 steps, then cosine to a tenth.
            progress = min(1.0, max(time_gone, max(0, step - 100) / max(1, total - 100)))
            rate = learning_rate * min(1.0, (step + 1) / 100) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens, weights = (part.to(device, non_blocking=True) for part in next(batches))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(tokens[:, :-1], use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
            weight = weights[:, 1:].flatten()
            (losses * weight).sum().div(weight.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            is_over = step == total or time_gone >= 1
            if step % 50 == 0 or is_over:
                answers = weight == ANSWER_WEIGHT
                log.append(
                    {
                        "step": step,
                        "window": stage.window,
                        "seconds": round(time.monotonic() - started, 1),
                        "text_loss": losses[weight == 1].mean().item(),
                        "answer_loss": losses[answers].mean().item() if answers.any() else None,
                    }
                )
                print(json.dumps(log[-1]), flush=True)
            if is_over:
                break
        batches.close()
        if is_over:
            break
    return log


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, window: int = 4096) -> float:
    """Nats per token over all whole windows of the held-out text."""
    corpus = encode(tokenizer, standard_library_text("held_out"))
    losses = []
    for start in range(0, len(corpus) - window, window):
        ids = torch.tensor([corpus[start : start + window]], device=model.device)
        losses.append(model(ids, labels=ids, use_cache=False).loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def dense_recall(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lengths: list[int],
    depths: list[float],
    prompts: int,
    seed: int,
) -> list[dict]:
    """Exact-match recall per length and depth, questions at the end of held-out text.

    Answers are forced into the prompt and each digit must be the model's first choice, which is what greedy decoding
    would have produced. Every prompt holds one fact per depth and asks for all of them.
    """
    corpus = encode(tokenizer, standard_library_text("held_out"))
    random, rows = Random(seed), []
    for length in lengths:
        hits = dict.fromkeys(depths, 0)
        batch = max(1, min(prompts, 65536 // length))
        for first in range(0, prompts, batch):
            count = min(batch, prompts - first)
            made = [recall_prompt(tokenizer, corpus, depths, length, random) for _ in range(count)]
            ids = torch.tensor([ids for ids, _ in made], device=model.device)
            asked_from = min(answers[0].start for _, answers in made) - 1
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
                choice = model(ids, use_cache=False, logits_to_keep=length - asked_from).logits.argmax(-1)
            # choice[:, i] continues position asked_from + i, so it is compared with the token after that.
            right = F.pad(choice[:, :-1] == ids[:, asked_from + 1 :], (asked_from + 1, 0))
            for row, (_, answers) in enumerate(made):
                for depth, answer in zip(depths, answers, strict=True):
                    hits[depth] += int(right[row, answer].all())
        rows += [{"length": length, "depth": d, "recall": hits[d] / prompts, "prompts": prompts} for d in depths]
    return rows


def recall_prompt(
    tokenizer: PreTrainedTokenizerFast, corpus: list[int], depths: list[float], length: int, random: Random
) -> tuple[list[int], list[slice]]:
    """Token ids [length] with one fact per depth, all asked for at the end, and where the answers stand."""
    facts = [encode_fact(tokenizer, fact) for fact in random_facts(random, len(depths))]
    pieces = [(depth, fact.sentence) for depth, fact in zip(depths, facts, strict=True)]
    ids, positions = plant(corpus, length, pieces + [(1.0, fact.sentence) for fact in facts], random)
    asked = zip(facts, positions[len(facts) :], strict=True)
    return ids, [slice(start + fact.answer_start, start + fact.answer_end) for fact, start in asked]


def model_card(model: LlamaForCausalLM, arguments: list[str], record: dict) -> str:
    recall, log, config = record["recall"], record["log"], model.config
    lengths = sorted({row["length"] for row in recall})
    depths = sorted({row["depth"] for row in recall})
    value = {(row["length"], row["depth"]): row["recall"] for row in recall}
    table = ["| tokens | " + " | ".join(f"depth {d:g}" for d in depths) + " |", "|---" * (len(depths) + 1) + "|"]
    packages = "".join(f", and of the installed package {name} {version}" for name, version in record["packages"].items())
    table += [f"| {n} | " + " | ".join(f"{value[n, d]:.3f}" for d in depths) + " |" for n in lengths]
    return (
        f"""---
license: apache-2.0
---
# A small Llama that recalls planted facts

{model.num_parameters() / 1e6:.1f} M parameters: {config.num_hidden_layers} layers, {config.num_attention_heads} query heads,
{config.num_key_value_heads} key-value heads, head dim {config.head_dim}, vocabulary {config.vocab_size}. It recalls facts
planted in Python source and knows nothing else: it exists so that the tests and harnesses have a model whose attention
really retrieves. Do not use it for anything else.

## Made by
`python -m eval.train_recall {shlex.join(arguments)}` on {record["device"]}: {log[-1]["step"]} of
{sum(stage["steps"] for stage in record["settings"]["stages"])} steps in {log[-1]["seconds"] / 60:.1f} minutes,
torch {torch.__version__}, Python {sys.version.split()[0]}.

## Data
The Python standard library's source (PSF licence), read from the interpreter that ran the training, without its test
suites, one file in ten held out{packages}. Seven windows in ten carry made-up facts ("The secret code of Dalomi is 481923.")
that are asked again later. Text loss in nats per token: {log[-1]["text_loss"]:.2f} in training,
{record["held_out_loss"]:.2f} on held-out files.

## Dense recall on held-out text
Exact match of all {CODE_DIGITS} digits, facts at five depths asked one after the other at the end of the prompt,
{recall[0]["prompts"]} questions a cell, weights as stored (bfloat16). All records are in `training.json`.

"""
        + "\n".join(table)
        + "\n"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = common.Parser("train_recall", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, tokenizer and model card")
    parser.add_argument("--init", type=Path, help="folder of a model to go on with, instead of starting from nothing")
    parser.add_argument("--packages", nargs="*", default=[], help="installed packages whose sources are trained on as well")
    parser.add_argument(
        "--stages", type=parse_stages, default="1024:500,4096:250,16384:350,32768:350,65536:60", help="WINDOW:STEPS,..."
    )
    parser.add_argument("--minutes", type=float, default=15, help="stop after this long, whatever is left of the stages")
    parser.add_argument("--tokens-per-step", type=int, default=262144)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--intermediate-size", type=int, default=640)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--recall-lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--recall-prompts", type=int, default=200, help="questions per length and depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Look at all options, and that the folder can be written.

    Raises:
        UsageError: A value is out of its range.
    """
    if not 0 < args.minutes < math.inf:
        raise common.UsageError(f"--minutes must be above 0, got {args.minutes}")
    if not 0 < args.learning_rate <= 1:
        raise common.UsageError(f"--learning-rate must be above 0 and at most 1, got {args.learning_rate}")
    for name in ("tokens_per_step", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "recall_prompts"):
        common.check_range(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    if args.heads % args.kv_heads:
        raise common.UsageError(f"--kv-heads must divide --heads {args.heads}, got {args.kv_heads}")
    if args.head_dim < 2 or args.head_dim % 2:
        raise common.UsageError(f"--head-dim must be even and at least 2, got {args.head_dim}")
    common.check_range("--vocab-size", args.vocab_size, LEAST_VOCABULARY)
    common.check_range("--recall-lengths", args.recall_lengths, LEAST_RECALL_LENGTH, common.LONGEST)
    common.check_range("--seed", args.seed, 0)
    for name in args.packages:
        if not package_sources(name) or recording.package_version(name) is None:
            raise common.UsageError(f"--packages must be installed packages with Python sources, got {name}")
    common.usable_device(args.device)
    common.check_writable(args.output / "training.json")


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the sizes asked for, with random weights."""
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=max(stage.window for stage in args.stages),
        rope_theta=1e6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).to(args.device)


def _without_output(arguments: list[str]) -> list[str]:
    """The arguments with the folder named as this repository names it."""
    return [
        "--output",
        "FOLDER",
        *(a for i, a in enumerate(arguments) if "--output" not in arguments[max(0, i - 1) : i + 1]),
    ]


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    torch.manual_seed(args.seed)
    text = standard_library_text("train")
    if args.init:
        model, tokenizer = common.load_model(str(args.init), args.device, "float32")
        model.train()
    else:
        tokenizer = train_tokenizer(text, args.vocab_size)
        model = new_model(args, tokenizer)
    texts = [text, *(package_text(name) for name in args.packages)]
    corpus = training_tokens(tokenizer, texts)
    common.check_range("--recall-lengths", args.recall_lengths, 1, len(encode(tokenizer, standard_library_text("held_out"))))
    longest = max(stage.window for stage in args.stages)
    if longest + 1 >= len(corpus):
        raise common.UsageError(f"--stages must have windows of at most {len(corpus) - 2} tokens of this text, got {longest}")
    print(f"{sum(map(len, texts)) / 1e6:.1f} M characters, {len(corpus) / 1e6:.2f} M tokens", flush=True)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    data = PlantedWindows(tokenizer, corpus, args.seed)
    log = train(
        model,
        data,
        args.stages,
        tokens_per_step=args.tokens_per_step,
        learning_rate=args.learning_rate,
        minutes=args.minutes,
    )
    # What is stored is what is measured: round first, then ask.
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    model.float().eval()
    recall = dense_recall(model, tokenizer, args.recall_lengths, DEPTHS, args.recall_prompts, args.seed + 1)
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "init", "device", "stages")}
    record = {
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
        "settings": settings | {"stages": [asdict(stage) for stage in args.stages]},
        "packages": {name: recording.package_version(name) for name in args.packages},
        "log": log,
        "held_out_loss": held_out_loss(model, tokenizer),
        "recall": recall,
    }
    (args.output / "README.md").write_text(model_card(model, _without_output(argv), record), encoding="utf-8")
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"output": str(args.output), "worst_recall": min(row["recall"] for row in recall)}))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_command(main))
