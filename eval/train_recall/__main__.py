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
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import commands, models, options, recording
from eval.haystack import encode, package_sources, package_text, standard_library_text
from eval.train_recall.card import model_card
from eval.train_recall.data import LEAST_VOCABULARY, PlantedWindows, train_tokenizer, training_tokens
from eval.train_recall.quality import DEPTHS, LEAST_RECALL_LENGTH, dense_recall, held_out_loss
from eval.train_recall.training import Stage, train


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


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("train_recall", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, tokenizer and model card")
    parser.add_argument("--init", type=Path, help="folder of a model to go on with, instead of starting from nothing")
    parser.add_argument("--packages", nargs="*", default=[], help="installed packages to train on, too (default: none)")
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default="1024:500,4096:250,16384:350,32768:350,65536:60",
        help="WINDOW:STEPS,... (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes", type=float, default=15, help="stop then, whatever is left of the stages (default: %(default)s)"
    )
    parser.add_argument("--tokens-per-step", type=int, default=262144, help="in all windows of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its highest (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="channels (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key-value heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="channels per head (default: %(default)s)")
    parser.add_argument("--intermediate-size", type=int, default=640, help="channels of the MLP (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens (default: %(default)s)")
    lengths = [1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--recall-lengths", type=int, nargs="+", default=lengths, help="tokens (default: %(default)s)")
    parser.add_argument("--recall-prompts", type=int, default=200, help="questions per length and depth (default: %(default)s)")
    options.add_seed_argument(parser)
    options.add_device_argument(parser)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Look at all options, and that the folder can be written.

    Raises:
        UsageError: A value is out of its range.
    """
    if not 0 < args.minutes < math.inf:
        raise commands.UsageError(f"--minutes must be above 0, got {args.minutes}")
    if not 0 < args.learning_rate <= 1:
        raise commands.UsageError(f"--learning-rate must be above 0 and at most 1, got {args.learning_rate}")
    for name in ("tokens_per_step", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "recall_prompts"):
        options.check_range(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    if args.heads % args.kv_heads:
        raise commands.UsageError(f"--kv-heads must divide --heads {args.heads}, got {args.kv_heads}")
    if args.head_dim < 2 or args.head_dim % 2:
        raise commands.UsageError(f"--head-dim must be even and at least 2, got {args.head_dim}")
    options.check_range("--vocab-size", args.vocab_size, LEAST_VOCABULARY)
    options.check_range("--recall-lengths", args.recall_lengths, LEAST_RECALL_LENGTH, options.LONGEST)
    options.check_range("--seed", args.seed, 0)
    for name in args.packages:
        if not package_sources(name) or recording.package_version(name) is None:
            raise commands.UsageError(f"--packages must be installed packages with Python sources, got {name}")
    models.usable_device(args.device)
    options.check_writable(args.output / "training.json")


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
        model, tokenizer = models.load_model(str(args.init), args.device, "float32")
        model.train()
    else:
        tokenizer = train_tokenizer(text, args.vocab_size)
        model = new_model(args, tokenizer)
    texts = [text, *(package_text(name) for name in args.packages)]
    corpus = training_tokens(tokenizer, texts)
    options.check_range("--recall-lengths", args.recall_lengths, 1, len(encode(tokenizer, standard_library_text("held_out"))))
    longest = max(stage.window for stage in args.stages)
    if longest + 1 >= len(corpus):
        raise commands.UsageError(f"--stages must have windows of at most {len(corpus) - 2} tokens of this text, got {longest}")
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
    sys.exit(commands.run_command(main))
