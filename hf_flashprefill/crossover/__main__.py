"""Measure from how many tokens on sparse prefill is faster on this machine, and keep it for ``min_seq_len="auto"``.

    python -m hf_flashprefill.crossover --heads 32 --kv-heads 8 --head-dim 128

    python -m hf_flashprefill.crossover --heads 32 --kv-heads 8 --head-dim 128 --query-len 1024

Prints the times at each length, milliseconds of one layer, as they are measured. The densities are assumed, see
``hf_flashprefill/crossover/imposed.py``. With ``--query-len`` the lengths are those of the keys that a chunk of a prompt sees;
these times are only printed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence

import torch

from ..command_line import Parser
from ..config import SELECTORS, FlashPrefillConfig
from ..operator_arguments import DTYPES
from .imposed import assumed_density
from .known import LayerShape, cache_file
from .measure import GPU_LENGTHS, chunk_lengths, measure_crossover, time_attention

HEADER = " tokens  density  dense ms sparse ms  speed-up"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m hf_flashprefill.crossover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, required=True, help="query heads")
    parser.add_argument("--kv-heads", type=int, required=True, help="key-value heads")
    parser.add_argument("--head-dim", type=int, required=True, help="channels per head")
    parser.add_argument("--selector", choices=SELECTORS, default=FlashPrefillConfig().selector, help="(default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(default: cuda where there is a GPU, else cpu)")
    parser.add_argument("--dtype", choices=sorted(DTYPE_NAMES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--max-seq-len", type=int, help="tokens (default: 65536 on a GPU, 16384 on a CPU; chunks: 4 times)")
    parser.add_argument("--query-len", type=int, help="tokens: time chunks of so many queries and keep nothing")
    return parser


def tell(length: int, dense: float, sparse: float) -> None:
    print(f"{length:7d} {assumed_density(length):8.3f} {dense:9.3f} {sparse:9.3f} {dense / sparse:9.2f}", flush=True)


def time_chunks(query_len: int, lengths: Sequence[int], time_length: Callable[[int, int], tuple[float, float]]) -> None:
    """Tell the times of chunks of so many queries at every length."""
    print(f"chunks of {query_len} queries\n{HEADER}")
    timings = []
    for length in lengths:
        times = time_length(length, query_len)
        tell(length, *times)
        timings.append([length, *(round(milliseconds, 4) for milliseconds in times)])
    print(json.dumps({"query_len": query_len, "timings": timings}))


def main(argv: list[str]) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if device.type == "meta":
        parser.error(f"--device {args.device}: it computes nothing")
    for name in ("heads", "kv_heads", "head_dim"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.heads % args.kv_heads:
        parser.error(f"--kv-heads must divide --heads {args.heads}, got {args.kv_heads}")
    dtype = DTYPE_NAMES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    shape, config = LayerShape(args.heads, args.kv_heads, args.head_dim, dtype), FlashPrefillConfig(selector=args.selector)
    timed = functools.partial(time_attention, shape, device, config)
    if args.query_len is not None:
        lengths = chunk_lengths(device, args.max_seq_len)
        if not 1 <= args.query_len <= max(lengths, default=0):
            parser.error(f"--query-len must be from 1 to the longest length timed, of {lengths}, got {args.query_len}")
        time_chunks(args.query_len, [length for length in lengths if length >= args.query_len], timed)
        return 0

    def timed_and_told(length: int) -> tuple[float, float]:
        times = timed(length)
        tell(length, *times)
        return times

    if args.max_seq_len is not None and args.max_seq_len < GPU_LENGTHS[0]:
        parser.error(f"--max-seq-len must be at least {GPU_LENGTHS[0]}, got {args.max_seq_len}")
    print(HEADER)
    measured = measure_crossover(shape, device, config, max_seq_len=args.max_seq_len, time_length=timed_and_told)
    found = "no length timed" if measured.tokens is None else f"{measured.tokens} tokens"
    print(f"sparse prefill pays from: {found}\nkept in {cache_file()}")
    print(json.dumps({"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim} | vars(measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
