"""Time to the first token inside vLLM: its own FlashAttention backend against the plugin, on random weights of a real shape.

    python -m eval.vllm_ttft --shape llama-3.1-8b --lengths 32768 65536 131072 --chunks 8192 0

Engines run in this process, one after the other, with prefix caching on and every prompt new to it. ``--chunks`` are the most
prompt tokens in one engine step; 0 is the whole prompt. Random weights attend to everything alike, so a density is imposed as
by ``eval.ttft``: a wide local window at alpha 1. The density is what the engine counts; in chunks each chunk has query
blocks attended in full of its own.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from eval import commands, options, recording, tables
from eval.schema import ModelRecord, Result
from eval.ttft import SHAPES, config_for_density, densities_of, spread
from hf_flashprefill import FlashPrefillConfig
from hf_flashprefill.integrations.vllm import STATS_PATH, register


def in_engine(folder: str, longest: int, chunk: int, memory: float, config: FlashPrefillConfig | None, work: Callable) -> Any:
    """What ``work`` makes of a vLLM engine in this process with weights made up by vLLM: the plugin's with ``config``, else
    FlashAttention's. The engine's memory is free again when this returns."""
    if not torch.cuda.is_available():
        raise commands.UsageError("an NVIDIA GPU is needed: the plugin stands on vLLM's FlashAttention")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options: dict[str, Any] = {"attention_backend": "FLASH_ATTN"}
    if config is not None:
        ours = {"additional_config": {"flashprefill": config.to_dict()}, "worker_extension_cls": STATS_PATH}
        options = {"attention_backend": "CUSTOM", **ours}
    llm = LLM(
        folder,
        dtype="bfloat16",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=longest + 16,
        max_num_batched_tokens=chunk or longest + 16,
        gpu_memory_utilization=memory,
        enforce_eager=True,
        disable_log_stats=True,
        **options,
    )
    try:
        return work(llm)
    finally:
        # The cache and the weights hang on layers that vLLM keeps in its global state, too.
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
        torch.cuda.empty_cache()


def first_token_seconds(llm, length: int, vocabulary: int, repeats: int) -> list[float]:
    """Wall times of requests for one token, each of a new random prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    seconds = []
    for repeat in range(repeats + 1):
        generator = torch.Generator().manual_seed(1000 * repeat + length)
        prompt = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        started = time.perf_counter()
        (answer,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        if answer.num_cached_tokens:
            raise RuntimeError(f"{answer.num_cached_tokens} tokens came from the prefix cache")
    return seconds


def measure(
    folder: str, vocabulary: int, chunk: int, configs: dict[int, FlashPrefillConfig], longest: int, args: argparse.Namespace
) -> Iterator[dict]:
    """A row per length of one chunk size: one stock engine for all, then an engine of ours for each length's settings.

    Engines take prompts of up to ``longest`` tokens.
    """

    def ask_stock(llm) -> dict[int, list[float]]:
        return {length: first_token_seconds(llm, length, vocabulary, args.repeats) for length in configs}

    def ask_ours(length: int, llm) -> tuple[list[float], dict]:
        # vLLM tries out the largest batch when it starts.
        llm.collective_rpc("flashprefill_reset")
        seconds = first_token_seconds(llm, length, vocabulary, args.repeats)
        (counted,) = llm.collective_rpc("flashprefill_stats")
        return seconds, counted

    stock = in_engine(folder, longest, chunk, args.memory, None, ask_stock)
    for length, config in configs.items():
        seconds, counted = in_engine(folder, longest, chunk, args.memory, config, functools.partial(ask_ours, length))
        row = {"length": length, "chunk": chunk or length, "density": counted["density"], "settings": config.to_dict()}
        row |= {"sparse_calls": counted["sparse_calls"], "dense_calls": counted["layers"][0]["dense_calls"]}
        row |= {"unpatched": spread(stock[length]), "patched": spread(seconds)}
        yield row | {"speedup": row["unpatched"]["median_s"] / row["patched"]["median_s"]}


def table(record: dict) -> str:
    """What the command prints of its JSON."""
    header = ["tokens", "tokens a step", "density", "FlashAttention s", "ours s", "speed-up"]
    cells = [
        [
            *(str(row["length"]), str(row["chunk"]), tables.format_density(row["density"])),
            *(f"{row[state]['median_s']:.3f}" for state in ("unpatched", "patched")),
            f"{row['speedup']:.2f}",
        ]
        for row in record["rows"]
    ]
    return tables.format_table(header, cells)


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("vllm_ttft", __doc__)
    options.add_config_arguments(parser, min_seq_len=FlashPrefillConfig().min_seq_len)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b", help="of the weights (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072], help="tokens (default: %(default)s)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[8192, 0], help="tokens a step, 0: all (default: %(default)s)")
    parser.add_argument("--density", default="published", help="a number, or the papers' at each length (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="measured requests after the first (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=0.8, help="share of the GPU's memory to use (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="quick look: at most this many lengths of each chunk size")
    parser.add_argument("--output", type=Path, default=Path("results/vllm-ttft.json"), help="JSON file (default: %(default)s)")
    return parser


def report(result: Result, output: Path) -> None:
    """Print a table, where the JSON is, and the speed-ups as the last line."""
    print(table({"rows": result.rows}))
    print(f"wrote {output}")
    print(json.dumps([{"length": r["length"], "chunk": r["chunk"], "speedup": round(r["speedup"], 3)} for r in result.rows]))


def check_arguments(args: argparse.Namespace) -> FlashPrefillConfig:
    """The settings of the patched state, after a look at the other arguments.

    Raises:
        UsageError: A value is out of its range, or there is more than one process.
    """
    options.check_range("--lengths", args.lengths, 1, options.LONGEST)
    options.check_range("--chunks", args.chunks, 0)
    options.check_range("--repeats", args.repeats, 1)
    options.check_share("--memory", args.memory)
    # vLLM would take accelerate's process group for that of its own workers.
    options.check_one_process("vllm_ttft")
    return options.check_config_arguments(args).resolved()


def run_of(args: argparse.Namespace, shape: PretrainedConfig, config: FlashPrefillConfig, version: str) -> Result:
    """What is known of a run with this version of vLLM before its first row: all but the summary and the rows."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(shape).num_parameters()
    identity: ModelRecord = {
        "name": args.shape,
        "parameters": parameters,
        "dtype": "bfloat16",
        "base_implementation": "vLLM FLASH_ATTN",
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place, arguments = recording.environment(device) | {"vllm": version}, recording.recorded_arguments(args)
    return Result("vllm_ttft", place, identity, config.to_dict(), arguments, [], [])


def measure_all(
    run: Result, shape: PretrainedConfig, configs: dict[int, FlashPrefillConfig], args: argparse.Namespace
) -> Result | None:
    """The rows of all chunk sizes and lengths."""
    tasks = [(chunk, length) for chunk in dict.fromkeys(args.chunks) for length in configs]
    measured: dict[int, Iterator[dict]] = {}

    with tempfile.TemporaryDirectory() as folder:
        shape.architectures = [type(shape).__name__.replace("Config", "ForCausalLM")]
        shape.save_pretrained(folder)

        def work(i: int) -> list[dict]:
            chunk, _ = tasks[i]
            if chunk not in measured:
                # Tasks are done in order, so those of this chunk that are left are all that follow.
                left = {length: configs[length] for other, length in tasks[i:] if other == chunk}
                measured[chunk] = measure(folder, shape.vocab_size, chunk, left, max(configs), args)
            return [next(measured[chunk])]

        return recording.time_and_record(run, args.output, [f"{chunk}/{length}" for chunk, length in tasks], work, "row")


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    base = check_arguments(args)
    densities = densities_of(args)
    # Engines of this process, whose counters we ask; vLLM reads it when it is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        import vllm
    except ImportError as error:
        raise commands.UsageError(f"vLLM is needed: {commands.first_line(error)}") from None
    # Where the package is not installed but on the path, nothing else would.
    if not register():
        raise commands.UsageError("vLLM's attention backend CUSTOM must be ours; its log says why it is not")
    shape = SHAPES[args.shape]()
    lengths = list(zip(args.lengths, densities, strict=True))[: args.limit]
    configs = {length: config_for_density(base, length, density) for length, density in lengths}
    result = measure_all(run_of(args, shape, base, vllm.__version__), shape, configs, args)
    if result:
        report(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
