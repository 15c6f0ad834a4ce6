"""Time to the first token of ``generate``, unpatched against patched, on a real model or on random weights of its shape.

    python -m eval.ttft                                                  # the bundled model
    python -m eval.ttft --shape llama-3.1-8b --lengths 32768 131072 --density published --device cuda

A third state, ``free attention``, replaces attention by nothing at all. What is left is the rest of the prefill, so the time
of attention is the difference, and unpatched over free is the most that any sparse attention can give: the ceiling.

Random weights attend to everything alike, so a threshold says nothing about them. ``--density`` therefore imposes a density:
alpha is 1, which keeps next to nothing by score, and the local window is widened until the density is the one asked for.
The probe runs in full all the same. The first call at a length is reported apart from the others: it compiles what no earlier
length of this process has compiled, so the first length after an interruption has a slow one. ``--kernels`` also says which
kernels the time goes to, patched and with free attention.

``--chunk`` prefills in chunks of so many tokens, ``generate``'s ``prefill_chunk_size``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.masking_utils import AttentionMaskInterface

from eval import commands, models, options, profiling, recording, tables
from eval.schema import Result
from hf_flashprefill import FlashPrefillConfig, patched, prefill_stats, reset_prefill_stats
from hf_flashprefill.crossover.imposed import PUBLISHED_DENSITY

SHAPES = {
    "llama-3.1-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 20,
        rope_theta=500000.0,
    ),
    "qwen3-30b-a3b": lambda: Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        max_position_embeddings=1 << 20,
        rope_theta=10000000.0,
    ),
}
NO_ATTENTION = "no_attention"


def random_model(shape: str, device: str, dtype: str | None) -> PreTrainedModel:
    """A model of a published shape with random weights, made on the device itself."""
    chosen = models.DTYPES[dtype] if dtype else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=chosen, attn_implementation="sdpa").eval()


@contextlib.contextmanager
def free_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model with attention that costs nothing: each query is its own answer."""

    def nothing(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NO_ATTENTION, nothing)
    AttentionMaskInterface.register(NO_ATTENTION, lambda *args, **kwargs: None)
    previous = model.config._attn_implementation
    model.set_attn_implementation(NO_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def config_for_density(config: FlashPrefillConfig, length: int, density: float) -> FlashPrefillConfig:
    """Settings that keep about ``density`` of the causally visible blocks whatever the weights are."""
    config = config.resolved()
    count = -(-length // config.block_size)
    visible = count * (count + 1) // 2

    def kept(window: int) -> int:
        tail = config.dense_tail_blocks
        rows = (min(tile + 1, window + config.sink_blocks) for tile in range(count - tail))
        return sum(rows) + sum(range(count - tail + 1, count + 1))

    window = next((w for w in range(1, count) if kept(w) >= density * visible), count)
    return replace(config, alpha=1.0, layer_alphas=None, window_blocks=window)


@torch.no_grad()
def first_token_seconds(model: PreTrainedModel, ids: torch.Tensor, chunk: int | None = None) -> float:
    """Wall time of ``generate`` up to its first token; of a prefill in chunks of so many tokens, if a number is given."""
    started = time.perf_counter()
    with models.greedy(model):
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, prefill_chunk_size=chunk)
    made[0, -1].item()
    return time.perf_counter() - started


def spread(seconds: list[float]) -> dict[str, float]:
    """The first call apart from the others, which need no compiling."""
    later = seconds[1:]
    return {"first_call_s": seconds[0], "median_s": statistics.median(later), "min_s": min(later), "max_s": max(later)}


def measure(
    model: PreTrainedModel,
    length: int,
    config: FlashPrefillConfig,
    repeats: int,
    with_kernels: bool = False,
    chunk: int | None = None,
) -> dict:
    """First call and median of the later ones: unpatched, patched and with free attention, in turn. Kernels are those of one
    more call."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, models.text_config(model).vocab_size, (1, length), generator=generator).to(model.device)
    first_token = partial(first_token_seconds, model, ids, chunk)
    times: dict[str, list[float]] = {"unpatched": [], "patched": [], "free_attention": []}
    for _ in range(repeats + 1):
        times["unpatched"].append(first_token())
        with patched(model, config=config):
            reset_prefill_stats(model)
            times["patched"].append(first_token())
            stats = prefill_stats(model)
        with free_attention(model):
            times["free_attention"].append(first_token())
    row: dict = {"length": length, "chunk": chunk, "density": stats.density, "dense_calls": stats.dense_calls}
    row["settings"] = config.to_dict()
    row |= {state: spread(seconds) for state, seconds in times.items()}
    rest = row["free_attention"]["median_s"]
    row["speedup"] = row["unpatched"]["median_s"] / row["patched"]["median_s"]
    row["ceiling"] = row["unpatched"]["median_s"] / rest
    row["attention_s"] = {state: row[state]["median_s"] - rest for state in ("unpatched", "patched")}
    if with_kernels:
        row["kernels"] = {}
        for state, attention in (("patched", patched(model, config=config)), ("free_attention", free_attention(model))):
            with attention:
                row["kernels"][state] = profiling.kernel_times(first_token, model.device, runs=1)
    return row


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("ttft", __doc__)
    options.add_model_arguments(parser)
    options.add_config_arguments(parser, min_seq_len=FlashPrefillConfig().min_seq_len)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of --model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192], help="tokens (default: %(default)s)")
    parser.add_argument("--density", help="impose a density: a number, or 'published' for the papers' at each length")
    parser.add_argument("--chunk", type=int, help="tokens: prefill in chunks of so many")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls after the first (default: %(default)s)")
    parser.add_argument("--kernels", action="store_true", help="profile one more call, patched and with free attention")
    parser.add_argument("--limit", type=int, help="quick look: at most this many of the lengths")
    parser.add_argument("--output", type=Path, default=Path("results/ttft.json"), help="JSON file (default: %(default)s)")
    return parser


def densities_of(args: argparse.Namespace) -> list[float | None]:
    """The density to impose at each length, or None."""
    if args.density is None:
        return [None] * len(args.lengths)
    if args.density == "published":
        missing = [length for length in args.lengths if length not in PUBLISHED_DENSITY]
        if missing:
            raise commands.UsageError(f"--density published: known for {sorted(PUBLISHED_DENSITY)} tokens, not for {missing}")
        return [PUBLISHED_DENSITY[length] for length in args.lengths]
    try:
        density = float(args.density)
    except ValueError:
        density = -1.0
    if not 0 < density <= 1:
        raise commands.UsageError(f"--density must be 'published' or a number above 0 up to 1, got {args.density!r}")
    return [density] * len(args.lengths)


def report(result: Result, output: Path) -> None:
    """Print a table, where the JSON is, and the speed-ups as the last line."""
    header = ["tokens", "density", "unpatched s", "patched s", "free attention s", "speed-up", "ceiling", "first calls s"]
    cells = [
        [
            str(row["length"]),
            tables.format_density(row["density"]),
            *(f"{row[state]['median_s']:.3f}" for state in ("unpatched", "patched", "free_attention")),
            f"{row['speedup']:.2f}",
            f"{row['ceiling']:.2f}",
            f"{row['unpatched']['first_call_s']:.2f} / {row['patched']['first_call_s']:.2f}",
        ]
        for row in result.rows
    ]
    print(tables.format_table(header, cells))
    for row in result.rows:
        if "kernels" in row:
            print(f"\n{row['length']} tokens:\n{profiling.kernel_table(row['kernels'])}")
    print(f"wrote {output}")
    print(json.dumps({str(row["length"]): round(row["speedup"], 3) for row in result.rows}))


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    options.check_range("--lengths", args.lengths, 1, options.LONGEST)
    options.check_range("--repeats", args.repeats, 1)
    if args.chunk is not None:
        options.check_range("--chunk", args.chunk, 1)
    base = options.check_config_arguments(args).resolved()
    tasks = list(zip(args.lengths, densities_of(args), strict=True))[: args.limit]
    if args.shape:
        model = random_model(args.shape, str(models.usable_device(args.device)), args.dtype)
    else:
        model, _ = models.load_model(args.model, args.device, args.dtype)
    models.check_context(model, max(length for length, _ in tasks))

    def work(i: int) -> list[dict]:
        length, density = tasks[i]
        config = base if density is None else config_for_density(base, length, density)
        return [measure(model, length, config, args.repeats, args.kernels, args.chunk)]

    run = recording.model_run("ttft", args, args.shape or args.model, model, base)
    names = [f"{i}/{length}" for i, (length, _) in enumerate(tasks)]
    result = recording.time_and_record(run, args.output, names, work, "length", {"weights": recording.fingerprint(model)})
    if result:
        report(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
