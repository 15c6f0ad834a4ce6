"""The alpha of each layer that keeps a share of the attention on your text, as a file that patch_model and all harnesses take.

    python -m eval.calibrate                                             # the bundled model, minutes on two CPU cores
    python -m eval.calibrate --model meta-llama/Llama-3.1-8B-Instruct --lengths 32768 --output results/llama.json
    python -m eval.recall --model meta-llama/Llama-3.1-8B-Instruct --config results/configs/llama.json

Each layer gets the largest alpha whose blocks hold ``--target`` of the exact attention of sampled queries, measured on dense
layers. Prompts that took no part are then prefilled with all layers sparse, and the share that is kept there is reported
beside. The share is a means; what it is worth in answers and perplexity, eval.recall and eval.perplexity say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from random import Random

from transformers import PreTrainedTokenizerBase

from eval import commands, models, options, recording, tables
from eval.haystack import plant
from eval.recall_prompts import make_prompts
from eval.texts import add_text_arguments, corpus_ids
from hf_flashprefill import Calibration, UnsupportedModelError, calibrate

KINDS = ("facts", "text")


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, corpus: Sequence[int], length: int, count: int, kind: str, seed: int
) -> list:
    """``count`` prompts of ``length`` tokens: stretches of the text, ``"facts"`` with what eval.recall plants in them.

    Raises:
        ValueError: The length or the text is too short.
    """
    if kind == "facts":
        return [prompt.ids for prompt in make_prompts(tokenizer, corpus, length, count, seed=seed)]
    prefix = models.text_prefix(tokenizer)
    return [plant(corpus, length, [], Random(f"{seed}/{length}/{number}"), prefix)[0] for number in range(count)]


def summarise(found: Calibration) -> list[dict]:
    """One record: the target, the worst layer and the means over the layers."""
    layers, held_out = found.layers, [layer.held_out_mass for layer in found.layers if layer.held_out_mass is not None]
    return [
        {
            "target": found.target,
            "prompts": found.prompts,
            "held_out_prompts": found.held_out,
            "density": tables.mean([layer.density for layer in layers]),
            "mass": tables.mean([layer.mass for layer in layers]),
            "held_out_density": found.held_out_density,
            "held_out_mass": found.held_out_mass,
            "lowest_held_out_mass": min(held_out, default=None),
        }
    ]


def layer_table(rows: list[dict]) -> str:
    """One line per layer; rows are LayerCalibrations as dicts."""
    header = ["layer", "alpha", "density", "mass", "lowest head", "held out: density", "mass"]
    cells = []
    for row in rows:
        numbers = [f"{row['density']:.3f}", f"{row['mass']:.4f}", f"{row['lowest_head_mass']:.4f}"]
        held_out = ["", ""]
        if row["held_out_mass"] is not None:
            held_out = [f"{row['held_out_density']:.3f}", f"{row['held_out_mass']:.4f}"]
        cells.append([str(row["layer"]), f"{row['alpha']:.5f}", *numbers, *held_out])
    return tables.format_table(header, cells)


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("calibrate", __doc__)
    options.add_run_arguments(parser, "calibrate", lengths=[4096], has_rule=False)
    add_text_arguments(parser)
    parser.add_argument("--selector", help="rule that scores blocks (default: the config's)")
    parser.add_argument("--target", type=float, default=0.99, help="share of the attention to keep (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=3, help="per length (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=1, help="further prompts per length (default: %(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="facts", help="plant facts in the text or not (default: %(default)s)")
    parser.add_argument("--every-head", action="store_true", help="every head must reach the target, not only their mean")
    parser.add_argument("--rows", type=int, default=64, help="queries of a prompt that are looked at (default: %(default)s)")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    config = options.check_run_arguments(args).resolved()
    options.check_range("--prompts", args.prompts, 1)
    options.check_range("--held-out", args.held_out, 0)
    options.check_range("--rows", args.rows, 1)
    if not 0 < args.target < 1:
        raise commands.UsageError(f"--target must be above 0 and below 1, got {args.target}")
    options.check_one_process("calibrate")
    # In a folder of its own, so that a report of all results does not take it for one.
    settings = args.output.parent / "configs" / args.output.name
    options.check_writable(settings)
    count = args.prompts if args.limit is None else min(args.prompts, args.limit)
    model, tokenizer = models.load_model(args.model, args.device, args.dtype)
    models.check_context(model, max(args.lengths))
    run = recording.model_run("calibrate", args, args.model, model, config)
    recording.check_replaceable(run, args.output, outcome=["layer_alphas"])
    corpus = corpus_ids(tokenizer, args)
    try:
        fitting, held_out = [], []
        for length in dict.fromkeys(args.lengths):
            made = prompts_of(tokenizer, corpus, length, count + args.held_out, args.kind, args.seed)
            fitting += made[:count]
            held_out += made[count:]
        asked = {"target": args.target, "rows": args.rows, "every_head": args.every_head}
        found = calibrate(model, fitting, config=config, held_out=held_out, **asked)
    except (UnsupportedModelError, ValueError) as error:
        message = commands.first_line(error)
        about_lengths = message.startswith(("length ", "prompts ", "the text "))
        raise commands.UsageError(f"--lengths: {message}" if about_lengths else message) from None
    rows = [asdict(layer) for layer in found.layers]
    recording.write_result(replace(run, config=found.config.to_dict()), args.output, summarise(found), rows)
    settings.parent.mkdir(exist_ok=True)
    found.config.to_json(settings)
    print(layer_table(rows))
    if held_out:
        print(f"held out: mass {found.held_out_mass:.4f} at density {found.held_out_density:.3f}, target {found.target}")
    print(f"wrote {args.output} and, for --config and patch_model, {settings}")
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
