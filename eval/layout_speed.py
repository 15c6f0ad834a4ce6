"""What batches, padding and chunks cost: the operator against the same work as prompts of their own.

    python -m eval.layout_speed --device cuda --heads 32 --kv-heads 8 --head-dim 128 --lengths 32768 131072

Per length L and imposed density, the whole operator (pool, select, attend) is timed on

- ``batch``: two rows of L tokens, against twice one row;
- ``left_padded``: the same two rows, the second with L / 2 tokens of padding in front, against a prompt of L and one of L / 2;
- ``chunked``: L tokens in chunks of ``--chunk`` against the keys so far, against the whole prompt at once.

``overhead`` is the time over that of the same work less 1. Every figure is a median, all in one process, of a GPU that has
work waiting, as in a model's prefill. The density is imposed by a wide local window, with no query block in full, since each
chunk's end would have its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from eval import common, recording
from eval.operator_speed import (
    KERNEL_SELECTORS,
    Tensors,
    add_tensor_arguments,
    check_tensor_arguments,
    dated_output,
    operator_run,
    random_tensors,
)
from eval.schema import Result
from eval.ttft import config_for_density
from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention
from hf_flashprefill.crossover.measure import PUBLISHED_DENSITY, median_ms


def cut(tensors: Tensors, rows: slice, query: slice, keys: slice) -> Tensors:
    """Some rows, queries and keys of a call."""
    return tuple(tensor[rows, :, part] for tensor, part in zip(tensors, (query, keys, keys), strict=True))


def layout_runs(tensors: Tensors, config: FlashPrefillConfig, chunk: int) -> dict[str, tuple[Callable, list[str]]]:
    """By name: what runs, and which runs are the same work."""
    length = tensors[0].shape[2]
    half, first, whole = length // 2, slice(0, 1), slice(None)
    ranges = torch.tensor([[0, length], [half, length]], device=tensors[0].device)

    def attend(*cutting: slice, **options) -> Callable[[], object]:
        part = cut(tensors, *cutting)
        return lambda: flash_prefill_attention(*part, config=config, **options)

    chunks = [attend(first, slice(at, at + chunk), slice(0, at + chunk)) for at in range(0, length, chunk)]
    return {
        "one": (attend(first, whole, whole), []),
        "half": (attend(first, slice(half, length), slice(half, length)), []),
        "batch": (attend(whole, whole, whole), ["one", "one"]),
        "left_padded": (attend(whole, whole, whole, valid_ranges=ranges), ["one", "half"]),
        "chunked": (lambda: [run() for run in chunks], ["one"]),
    }


def measure(length: int, density: float, args: argparse.Namespace) -> list[dict]:
    """A row per layout."""
    config = FlashPrefillConfig(selector=args.selector, dense_tail_blocks=0, backend=args.backend)
    config = config_for_density(config, length, density)
    tensors = random_tensors(2, length, args.head_dim, args)
    runs = layout_runs(tensors, config, min(args.chunk, length))
    times = {name: median_ms(run, args.device, args.seconds, queued=True) for name, (run, _) in runs.items()}
    rows = []
    for name, (_, same_work) in runs.items():
        expected = sum(times[other]["median_ms"] for other in same_work)
        overhead = times[name]["median_ms"] / expected - 1 if same_work else None
        rows.append({"length": length, "density": density, "layout": name, **times[name], "overhead": overhead})
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = common.Parser("layout_speed", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192], help="tokens (default: %(default)s)")
    parser.add_argument("--density", type=float, help="of the visible blocks; default: as published for the length")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens (default: %(default)s)")
    parser.add_argument("--selector", choices=KERNEL_SELECTORS, default=FlashPrefillConfig().selector)
    parser.add_argument("--head-dim", type=int, default=64, help="(default: %(default)s)")
    add_tensor_arguments(parser)
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on each figure (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="quick look: at most this many of the lengths")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/layouts-DATE-DEVICE.json)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    common.check_output_arguments(args)
    if min(args.lengths) < 256:
        raise common.UsageError(f"--lengths must be at least 256 tokens, got {min(args.lengths)}")
    if args.chunk < 1 or args.chunk % 128:
        raise common.UsageError(f"--chunk must be a multiple of 128 tokens, got {args.chunk}")
    if args.density is not None and not 0 < args.density <= 1:
        raise common.UsageError(f"--density must be above 0 and at most 1, got {args.density}")
    check_tensor_arguments(args)


def report(result: Result, output: Path) -> None:
    """Print a table, where the JSON is, and the overheads as the last line."""
    cells = [
        [str(row["length"]), row["layout"], f"{row['density']:.3f}", f"{row['median_ms']:.2f}"]
        + ["" if row["overhead"] is None else f"{100 * row['overhead']:+.1f}%"]
        for row in result.rows
    ]
    print(common.format_table(["tokens", "layout", "density", "ms", "against the same work"], cells))
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
    output = args.output or dated_output("results", "layouts", run)
    names = [f"{i}/{length}" for i, length in enumerate(lengths)]
    result = recording.time_and_record(run, output, names, work, "length")
    if result:
        report(result, output)
    return 0


if __name__ == "__main__":
    sys.exit(common.run_command(main))
