"""Time the operator, stage by stage, against torch's dense attention on the same tensors.

    python -m eval.operator_speed                                        # CPU: 8 query heads, 2 key-value heads, head dim 64
    python -m eval.operator_speed --device cuda --heads 32 --kv-heads 8 --head-dim 128 --lengths 16384 65536 131072

Which blocks are kept is imposed: sink and window blocks, the last query blocks in full, and random blocks up to the
density asked for, so that every backend does the same work whatever the tensors hold. The selection is timed apart, on the
same tensors. A correctness gate comes first; if it fails, no time is printed. Every figure is the median of its repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval import common
from hf_flashprefill import BlockIndex, FlashPrefillConfig
from hf_flashprefill.functional import resolve_backend
from hf_flashprefill.geometry import PrefillGeometry

# What the FlashPrefill papers report for Llama-3.1-8B and Qwen3-30B-A3B, by length in tokens.
PUBLISHED_DENSITY = {4096: 0.70, 8192: 0.46, 16384: 0.29, 32768: 0.176, 65536: 0.10, 131072: 0.06, 262144: 0.041}


def imposed_index(
    geometry: PrefillGeometry, heads: int, density: float, device: torch.device, dense_tail_blocks: int = 2
) -> BlockIndex:
    """Lists of the given density: 2 sink blocks, 4 window blocks, the last query blocks in full, the rest at random.

    What is kept in any case is the least density there can be: .12 at 16K tokens with two dense tail blocks.
    """
    count = geometry.key_blocks
    tile, block = torch.arange(count, device=device)[:, None], torch.arange(count, device=device)[None, :]
    causal = block <= tile
    forced = ((block < 2) | (tile - block < 4) | (tile >= count - dense_tail_blocks)) & causal
    free = (causal.sum() - forced.sum()).item()
    chance = max(0.0, density * causal.sum().item() - forced.sum().item()) / max(free, 1)
    generator = torch.Generator(device).manual_seed(0)
    chosen = torch.rand(1, heads, count, count, device=device, generator=generator) < chance
    return BlockIndex.from_mask((chosen & causal) | forced, geometry)


def median_ms(run: Callable[[], object], device: torch.device, seconds: float) -> dict[str, float]:
    """Median and quartiles of ``run`` in milliseconds, after one unmeasured run."""
    run()
    times: list[float] = []
    _synchronize(device)
    until = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 200):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - started))
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": median, "quartile_low_ms": low, "quartile_high_ms": high, "runs": len(times)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dense_baselines(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Torch's dense causal attention by the names of its implementations on this device."""

    def under(*backends: SDPBackend) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with sdpa_kernel(list(backends)):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        return run

    if query.is_cuda and query.dtype != torch.float32:
        return {
            "sdpa_cudnn": under(SDPBackend.CUDNN_ATTENTION),
            "sdpa_flash": under(SDPBackend.FLASH_ATTENTION),
        }
    return {"sdpa": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)}


def passes_gate(backend, dtype: torch.dtype, device: torch.device, args: argparse.Namespace) -> bool:
    """With every block listed, a small case agrees with float64 attention as closely as torch's own does."""
    query, key, value = random_tensors(1000, dtype, device, args)
    geometry = PrefillGeometry(1, 1000, 1000, 0, 128)
    index = imposed_index(geometry, args.heads, 1.0, device)
    output = torch.empty_like(query)
    backend.attend_blocks(query, key, value, index, scale=args.head_dim**-0.5, output=output)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True)
    eager = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    error, allowed = ((tensor.double() - exact).abs().max().item() for tensor in (output, eager))
    return error <= 2 * allowed + 1e-6


def random_tensors(
    length: int, dtype: torch.dtype, device: torch.device, args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query as a projection leaves it (tokens before heads), key and value as a cache does."""
    query = torch.randn(1, length, args.heads, args.head_dim, device=device).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, args.kv_heads, length, args.head_dim, device=device).to(dtype) for _ in range(2))
    return query, key, value


def measure(length: int, density: float, dtype: torch.dtype, device: torch.device, args: argparse.Namespace) -> dict:
    """All stages and baselines at one length."""
    query, key, value = random_tensors(length, dtype, device, args)
    backend, scale = resolve_backend(args.backend, query), args.head_dim**-0.5
    geometry = PrefillGeometry(1, length, length, 0, 128)
    index = imposed_index(geometry, args.heads, density, device, args.dense_tail_blocks)
    output, means = torch.empty_like(query), backend.block_means(key, geometry)
    config = FlashPrefillConfig()
    rule = {name: getattr(config, name) for name in ("alpha", "sink_blocks", "window_blocks", "dense_tail_blocks")}

    def select() -> BlockIndex:
        blocks = {"first_query_block": 0, "query_blocks": geometry.query_blocks}
        return backend.select_blocks(query, pooled, geometry, scale=scale, **blocks, **rule)

    stages = {
        "pool": lambda: backend.block_means(key, geometry),
        "select": select,
        "attend": lambda: backend.attend_blocks(query, key, value, index, scale=scale, output=output),
    }
    row: dict = {"length": length, "density": index.density()}
    for name, run in (stages | dense_baselines(query, key, value)).items():
        row[name] = median_ms(run, device, args.seconds)
    row["total_ms"] = sum(row[name]["median_ms"] for name in stages)
    for name in dense_baselines(query, key, value):
        row[f"speedup_over_{name}"] = row[name]["median_ms"] / row["total_ms"]
    # Two products of 2 * block * block * head_dim operations per kept block.
    row["attend_tflops"] = 4 * 128 * 128 * args.head_dim * int(index.counts.sum()) / row["attend"]["median_ms"] / 1e9
    return row


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.operator_speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens")
    parser.add_argument("--densities", type=float, nargs="+", help="one per length; default: as published for the length")
    parser.add_argument("--dense-tail-blocks", type=int, default=2, help="query blocks in full at the end (default: 2)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=sorted(common.DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--backend", default="auto", choices=["auto", "triton", "torch"])
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on each figure")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/operator-DATE-DEVICE.json)")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    densities = args.densities or [PUBLISHED_DENSITY.get(length, 0.1) for length in args.lengths]
    if len(densities) != len(args.lengths):
        raise common.UsageError(f"--densities must be one per length, got {len(densities)} for {len(args.lengths)}")
    if args.heads % args.kv_heads:
        raise common.UsageError(f"--kv-heads must divide --heads {args.heads}, got {args.kv_heads}")
    device = torch.device(args.device)
    dtype = common.DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    probe = torch.empty(1, args.heads, 1, args.head_dim, dtype=dtype, device=device)
    backend = resolve_backend(args.backend, probe)
    with torch.no_grad():
        if not passes_gate(backend, dtype, device, args):
            print("the correctness gate failed: no times are reported", file=sys.stderr)
            return 1
        rows = [measure(length, density, dtype, device, args) for length, density in zip(args.lengths, densities, strict=True)]
    record = {
        "harness": "operator_speed",
        "environment": common.environment(device),
        "backend": backend.__name__,
        "shape": {"heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim, "dtype": str(dtype), "batch": 1},
        "dense_tail_blocks": args.dense_tail_blocks,
        "rows": rows,
    }
    kind = common.environment(device)["device"].lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    path = args.output or Path("benchmarks/results") / f"operator-{date.today()}-{kind}.json"
    common.write_json(path, record)
    baselines = [name for name in rows[0] if name.startswith("speedup_over_")]
    header = ["tokens", "density", "pool ms", "select ms", "attend ms", "TFLOP/s"]
    header += [f"x {name.removeprefix('speedup_over_')}" for name in baselines]
    cells = [
        [
            str(row["length"]),
            f"{row['density']:.3f}",
            *(f"{row[stage]['median_ms']:.2f}" for stage in ("pool", "select", "attend")),
            f"{row['attend_tflops']:.2f}",
            *(f"{row[name]:.2f}" for name in baselines),
        ]
        for row in rows
    ]
    print(common.format_table(header, cells))
    print(f"wrote {path}")
    print(json.dumps({str(row["length"]): {name: round(row[name], 3) for name in baselines} for row in rows}))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_command(main))
