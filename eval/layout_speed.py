"""What batches, padding and chunks cost: the operator against the same work as prompts of their own.

    python -m eval.layout_speed --device cuda --heads 32 --kv-heads 8 --head-dim 128 --lengths 32768 131072

Per length L and imposed density, the whole operator (pool, select, attend) is timed on

- ``batch``: two rows of L tokens, against twice one row;
- ``left_padded``: the same two rows, the second with L / 2 tokens of padding in front, against a prompt of L and one of L / 2;
- ``chunked``: L tokens in chunks of ``--chunk`` against the keys so far, against the whole prompt at once;
- ``chunked_kept_pools``: the same chunks, each of which pools only its own keys: the calls hand ``KeptPools`` on;
- ``chunked_tails``: the same chunks with the default's query blocks in full at the end of each, against the whole prompt and as
  much more attention as these list more blocks.

``overhead`` is the time over that of the same work less 1. Every figure is a median, all measured in turns, of a GPU that has
work waiting, as in a model's prefill. The density is imposed by a wide local window, with no query block in full but in
``chunked_tails``. ``--kernels`` also says which kernels the time of each layout but the last goes to.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from eval import commands, options, profiling, recording, tables
from eval.operator_speed import (
    KERNEL_SELECTORS,
    SECONDS_HELP,
    add_tensor_arguments,
    check_head_dims,
    check_tensor_arguments,
    operator_run,
    random_tensors,
)
from eval.schema import Result
from eval.stages import Tensors, stage_runs
from eval.ttft import config_for_density
from hf_flashprefill import BlockIndex, FlashPrefillConfig, KeptPools, flash_prefill_attention
from hf_flashprefill.crossover.imposed import PUBLISHED_DENSITY
from hf_flashprefill.crossover.timing import medians_ms
from hf_flashprefill.functional import resolve_backend

KEPT_POOLS = "chunked_kept_pools"
# Layouts that ``--kernels`` does not look into.
NOT_PROFILED = ("chunked_tails",)


def cut(tensors: Tensors, rows: slice, query: slice, keys: slice) -> Tensors:
    """Some rows, queries and keys of a call."""
    return tuple(tensor[rows, :, part] for tensor, part in zip(tensors, (query, keys, keys), strict=True))


class Call(NamedTuple):
    """One call of the operator."""

    tensors: Tensors
    config: FlashPrefillConfig
    valid_ranges: torch.Tensor | None = None

    def run(self, **options) -> object:
        return flash_prefill_attention(*self.tensors, config=self.config, valid_ranges=self.valid_ranges, **options)

    def index(self) -> BlockIndex:
        return self.run(return_index=True).index


def run_all(calls: list[Call], keeps_pools: bool) -> None:
    kept_pools = KeptPools() if keeps_pools else None
    for call in calls:
        call.run(kept_pools=kept_pools)


def layout_calls(tensors: Tensors, config: FlashPrefillConfig, chunk: int) -> dict[str, tuple[list[Call], list[str]]]:
    """By name: the calls that a layout is made of, and which layouts are the same work."""
    length = tensors[0].shape[2]
    half, first, whole = length // 2, slice(0, 1), slice(None)
    ranges = torch.tensor([[0, length], [half, length]], device=tensors[0].device)
    chunks = [cut(tensors, first, slice(at, at + chunk), slice(0, at + chunk)) for at in range(0, length, chunk)]
    with_tails = replace(config, dense_tail_blocks=FlashPrefillConfig().dense_tail_blocks)
    return {
        "one": ([Call(cut(tensors, first, whole, whole), config)], []),
        "half": ([Call(cut(tensors, first, slice(half, length), slice(half, length)), config)], []),
        "batch": ([Call(tensors, config)], ["one", "one"]),
        "left_padded": ([Call(tensors, config, ranges)], ["one", "half"]),
        "chunked": ([Call(part, config) for part in chunks], ["one"]),
        KEPT_POOLS: ([Call(part, config) for part in chunks], ["one"]),
        "chunked_tails": ([Call(part, with_tails) for part in chunks], ["one"]),
    }


def measure(length: int, density: float, args: argparse.Namespace) -> list[dict]:
    """A row per layout."""
    config = FlashPrefillConfig(selector=args.selector, dense_tail_blocks=0, backend=args.backend)
    config = config_for_density(config, length, density)
    calls = layout_calls(random_tensors(2, length, args.head_dim, args), config, min(args.chunk, length))

    blocks = {name: sum(int(call.index().counts.sum()) for call in made_of) for name, (made_of, _) in calls.items()}
    [one], _ = calls["one"]
    backend, scale = resolve_backend(args.backend, one.tensors[0]), args.head_dim**-0.5
    runs = {name: partial(run_all, made_of, name == KEPT_POOLS) for name, (made_of, _) in calls.items()}
    runs["attend"] = stage_runs(backend, one.tensors, one.index(), config, scale)["attend"]
    times = medians_ms(runs, args.device, args.seconds, queued=True)
    attend_ms = times["attend"]["median_ms"]
    rows = []
    for name, (_, same_work) in calls.items():
        more_blocks = blocks[name] - sum(blocks[other] for other in same_work)
        expected = sum(times[other]["median_ms"] for other in same_work) + attend_ms * more_blocks / blocks["one"]
        overhead = times[name]["median_ms"] / expected - 1 if same_work else None
        row = {"length": length, "density": density, "layout": name, "blocks": blocks[name]}
        row |= {**times[name], "overhead": overhead}
        if args.kernels and name not in NOT_PROFILED:
            row["kernels"] = profiling.kernel_times(runs[name], args.device)
        rows.append(row)
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("layout_speed", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192], help="tokens (default: %(default)s)")
    parser.add_argument("--density", type=float, help="of the visible blocks; default: as published for the length")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens (default: %(default)s)")
    default = FlashPrefillConfig().selector
    parser.add_argument("--selector", choices=KERNEL_SELECTORS, default=default, help="(default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="channels per head (default: %(default)s)")
    add_tensor_arguments(parser)
    parser.add_argument("--seconds", type=float, default=1.0, help=SECONDS_HELP)
    parser.add_argument("--kernels", action="store_true", help="profile every layout but chunked_tails, too")
    parser.add_argument("--limit", type=int, help="quick look: at most this many of the lengths")
    parser.add_argument("--output", type=Path, default=Path("results/layout.json"), help="JSON file (default: %(default)s)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    options.check_output_arguments(args)
    options.check_range("--lengths", args.lengths, 256, options.LONGEST)
    if args.chunk < 1 or args.chunk % 128:
        raise commands.UsageError(f"--chunk must be a multiple of 128 tokens, got {args.chunk}")
    if args.density is not None:
        options.check_share("--density", args.density)
    check_tensor_arguments(args)
    check_head_dims("--head-dim", [args.head_dim], args)


def report(result: Result, output: Path) -> None:
    """Print a table, where the JSON is, and the overheads as the last line."""
    cells = [
        [str(row["length"]), row["layout"], f"{row['density']:.3f}", str(row["blocks"]), f"{row['median_ms']:.2f}"]
        + ["" if row["overhead"] is None else f"{100 * row['overhead']:+.1f}%"]
        for row in result.rows
    ]
    print(tables.format_table(["tokens", "layout", "density", "blocks", "ms", "against the same work"], cells))
    for length in dict.fromkeys(row["length"] for row in result.rows):
        profiles = {row["layout"]: row["kernels"] for row in result.rows if row["length"] == length and "kernels" in row}
        if profiles:
            print(f"\n{length} tokens:\n{profiling.kernel_table(profiles)}")
    print(f"wrote {output}")
    overheads = [row for row in result.rows if row["overhead"] is not None]
    print(json.dumps([{k: row[k] for k in ("length", "layout", "overhead")} for row in overheads]))


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    lengths = args.lengths[: args.limit]

    def work(i: int) -> list[dict]:
        return measure(lengths[i], args.density or PUBLISHED_DENSITY.get(lengths[i], 0.1), args)

    config = FlashPrefillConfig(selector=args.selector, alpha=1.0, dense_tail_blocks=0, backend=args.backend)
    run = operator_run("layout_speed", args, args.backend, config.resolved())
    names = [f"{i}/{length}" for i, length in enumerate(lengths)]
    result = recording.time_and_record(run, args.output, names, work, "length")
    if result:
        report(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
