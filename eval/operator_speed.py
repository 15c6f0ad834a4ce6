"""Time the operator, stage by stage, against torch's dense attention on the same tensors.

    python -m eval.operator_speed                                        # CPU: 8 query heads, 2 key-value heads, head dim 64
    python -m eval.operator_speed --device cuda --heads 32 --kv-heads 8 --head-dims 128 --lengths 16384 65536 131072

Which blocks are attended is imposed: sink and window blocks, the last query blocks in full, and random blocks up to the
density asked for, so that every implementation does the same work whatever the tensors hold. The index (pool and select) is
computed in full on the same tensors at alpha 1 and its lists are then set aside. ``operator`` is all three stages called one
after the other, which is what a layer waits for; the stages are also timed alone, in turns with it. A correctness gate comes
first; if it fails, no time is printed. Every figure is the median of its repeats, in one process, with the launches already in
the GPU's queue and nothing of the tensors in its cache.

``--peer NAME=FILE.py`` times another implementation: the file defines ``prepare(query, key, value, index)``, which returns
a function without arguments that does the work; ``index`` is the imposed BlockIndex.

``--before FOLDER`` times every stage of another checkout of this repository, too, as ``git worktree add FOLDER COMMIT`` makes
one, in turns with this one's, and says what share of its time this one takes, how many blocks only one of the two lists at
the default alpha, and whether both attend to the same bits. It must be new enough to have the same stages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hf_flashprefill
from eval import before, commands, models, options, recording, tables
from eval.pictures import draw_operator
from eval.schema import ModelRecord, Result
from eval.stages import Tensors, package_stages
from hf_flashprefill import BlockIndex, FlashPrefillConfig
from hf_flashprefill.audit import RowAudit
from hf_flashprefill.config import MEAN_BLOCKS, POOL_SIZES, SELECTORS, SORTING_SELECTORS
from hf_flashprefill.crossover.imposed import PUBLISHED_DENSITY, imposed_index
from hf_flashprefill.crossover.measure import unpatched_attention
from hf_flashprefill.crossover.timing import FEWEST_RUNS, medians_ms
from hf_flashprefill.functional import resolve_backend
from hf_flashprefill.geometry import PrefillGeometry

SDPA_BACKENDS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
}
KERNEL_SELECTORS = [name for name in SELECTORS if name not in SORTING_SELECTORS]
# To spend on a figure; more is a slip.
MOST_SECONDS = 3600
SECONDS_HELP = f"to spend on each figure, 0: {FEWEST_RUNS} runs (default: %(default)s)"
BASELINES = ("sdpa", *SDPA_BACKENDS, "flex")


def dense_attention(name: str, tensors: Tensors) -> Callable[[], torch.Tensor]:
    """Torch's dense causal attention by one of its implementations; "sdpa" as transformers calls it."""
    if name == "sdpa":
        return unpatched_attention(*tensors)
    backend = SDPA_BACKENDS[name]

    def run() -> torch.Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)

    return run


def flex_attention_run(tensors: Tensors, index: BlockIndex) -> Callable[[], torch.Tensor]:
    """Torch's FlexAttention, compiled, over the same lists; only each list's last block gets the causal mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    last = (index.counts.long() - 1)[..., None]
    block_mask = BlockMask.from_kv_blocks(
        kv_num_blocks=torch.ones_like(index.counts),
        kv_indices=torch.zeros_like(index.indices).scatter_(-1, torch.zeros_like(last), index.indices.gather(-1, last)),
        full_kv_num_blocks=index.counts - 1,
        full_kv_indices=index.indices,
        BLOCK_SIZE=index.geometry.block_size,
        mask_mod=lambda batch, head, query, key: query >= key,
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*tensors, block_mask=block_mask, enable_gqa=True)


def peer_prepare(peer: str) -> Callable[..., Callable[[], object]]:
    """What ``NAME=FILE.py`` prepares another implementation with.

    Raises:
        UsageError: It is written in another way, or the file cannot be run or has no such function.
    """
    name, _, path = peer.partition("=")
    spec = importlib.util.spec_from_file_location("peer", path)
    if not name or spec is None or not Path(path).is_file():
        raise commands.UsageError(f"--peer must be NAME=FILE.py with a file that exists, got {peer!r}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    # Whatever a user's file raises.
    except Exception as error:
        raise commands.UsageError(f"--peer {peer}: {type(error).__name__}: {commands.first_line(error)}") from None
    if not callable(getattr(module, "prepare", None)):
        raise commands.UsageError(f"--peer {peer}: the file must define prepare(query, key, value, index)")
    return module.prepare


def random_tensors(batch: int, length: int, head_dim: int, args: argparse.Namespace) -> Tensors:
    """Query as a projection leaves it (tokens before heads), key and value as a cache does."""
    device, dtype = args.device, args.dtype
    query = torch.randn(batch, length, args.heads, head_dim, device=device).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, args.kv_heads, length, head_dim, device=device).to(dtype) for _ in range(2))
    return query, key, value


def passes_gate(backend: Any, head_dim: int, args: argparse.Namespace) -> bool:
    """With every block listed, a small case agrees with float64 attention as closely as torch's own does."""
    tensors = query, key, value = random_tensors(1, 1000, head_dim, args)
    geometry = PrefillGeometry(1, 1000, 1000, 0, 128)
    index = imposed_index(geometry, args.heads, 1.0, args.device)
    output = torch.empty_like(query)
    backend.attend_blocks(query, key, value, index, scale=head_dim**-0.5, output=output)
    exact = dense_attention("sdpa", tuple(tensor.double() for tensor in tensors))()
    error, allowed = ((t.double() - exact).abs().max().item() for t in (output, dense_attention("sdpa", tensors)()))
    return error <= 2 * allowed + 1e-6


def audit_run(tensors: Tensors, index: BlockIndex, rows: int, scale: float) -> Callable[[], torch.Tensor]:
    """The audit of ``rows`` query rows against the lists of ``index``, which costs the same whatever selected them."""

    def run() -> torch.Tensor:
        audit = RowAudit(*tensors[:2], rows=rows, scale=scale)
        audit.add_index(index)
        return audit.dropped()

    return run


def measure(length: int, density: float, head_dim: int, batch: int, args: argparse.Namespace) -> dict:
    """All stages and baselines of one shape."""
    tensors = random_tensors(batch, length, head_dim, args)
    geometry = PrefillGeometry(batch, length, length, 0, 128)
    index = imposed_index(geometry, args.heads, density, args.device, args.dense_tail_blocks)

    def timed(runs: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
        return medians_ms(runs, args.device, args.seconds, queued=True)

    now = package_stages(hf_flashprefill, tensors, index, args)
    runs, of_before = dict(now.timed), None
    if args.before:
        of_before = before.stages(tensors, index, args)
        runs |= {f"{name}_before": run for name, run in of_before.timed.items()}
    if args.config.audit_rows:
        runs["audit"] = audit_run(tensors, index, args.config.audit_rows, head_dim**-0.5)
    row: dict = {"length": length, "density": index.density(), "head_dim": head_dim, "batch": batch, **timed(runs)}
    if of_before:
        row["before"] = {"commit": recording.commit_of(args.before), **before.compared(now, of_before, row)}
    # Of the kept blocks alone, without means. Two products of 2 * block * block * head_dim operations per kept block.
    row["attend_tflops"] = 4 * 128 * 128 * head_dim * int(index.counts.sum()) / row["attend"]["median_ms"] / 1e9
    for selector in args.selectors:
        index_ms = row[f"pool_{selector}"]["median_ms"] + row[f"select_{selector}"]["median_ms"]
        row[f"index_share_{selector}"] = index_ms / (index_ms + row[f"attend_{selector}"]["median_ms"])
    corrected = [s for s in args.selectors if replace(args.config, selector=s).resolved().correction]
    if corrected:
        # Of the same lists, in turns and by themselves: what other stages leave of the GPU's power decides more. In one run two
        # launches of the same attention, after an index and after others, took 11.9 and 12.8 ms at 128K tokens (H200).
        pair = timed({"without": now.timed["attend"], "with": now.timed[f"attend_{corrected[0]}"]})
        row["overhead_of_means"] = pair["with"]["median_ms"] / pair["without"]["median_ms"] - 1
    others = {name: dense_attention(name, tensors) for name in args.baselines if name != "flex"}
    if "flex" in args.baselines:
        others["flex"] = flex_attention_run(tensors, index)
    for peer in args.peer:
        others[peer.partition("=")[0]] = peer_prepare(peer)(*tensors, index)
    # One after the other: beside an attention that keeps the GPU at its power limit for a second all else would be slower.
    for name, run in others.items():
        row |= timed({name: run})
        row[f"speedup_over_{name}"] = row[name]["median_ms"] / row[f"operator_{args.selectors[0]}"]["median_ms"]
    return row


@contextlib.contextmanager
def portable_kernels(packages: Sequence[ModuleType] = (hf_flashprefill,)) -> Iterator[None]:
    """Inside, Hopper GPUs select and attend with the portable Triton kernels of the packages, too."""
    gluon = {"": "attend_hopper", ".energy_lists": "energies_hopper", ".shares": "probe_hopper"}
    with contextlib.ExitStack() as restored:
        for package, (module_name, name) in itertools.product(packages, gluon.items()):
            module = importlib.import_module(f"{package.__name__}.backends.triton{module_name}")
            restored.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, None)
        yield


def add_tensor_arguments(parser: argparse.ArgumentParser) -> None:
    """Heads, device and dtype of random tensors, and the backend that works on them."""
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key-value heads (default: %(default)s)")
    options.add_device_argument(parser)
    parser.add_argument("--dtype", choices=sorted(models.DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--backend", default="auto", choices=["auto", "triton", "torch"], help="(default: %(default)s)")


def check_tensor_arguments(args: argparse.Namespace) -> None:
    """Look at what eval.operator_speed and layout_speed have in common, and make torch's device and dtype of the options of
    ``add_tensor_arguments``."""
    options.check_range("--heads", args.heads, 1)
    options.check_range("--kv-heads", args.kv_heads, 1)
    if args.heads % args.kv_heads:
        raise commands.UsageError(f"--kv-heads must divide --heads {args.heads}, got {args.kv_heads}")
    options.check_range("--seconds", args.seconds, 0, MOST_SECONDS)
    args.device = models.usable_device(args.device)
    args.dtype = models.DTYPES[args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")]


def check_head_dims(option: str, head_dims: Sequence[int], args: argparse.Namespace) -> None:
    """Look at channels per head and whether the backend takes them."""
    options.check_range(option, head_dims, 1)
    for head_dim in head_dims:
        try:
            resolve_backend(args.backend, torch.empty(1, args.heads, 1, head_dim, dtype=args.dtype, device=args.device))
        except ValueError as error:
            raise commands.UsageError(f"--backend {args.backend}: {commands.first_line(error)}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("operator_speed", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens (default: %(default)s)")
    parser.add_argument("--densities", type=float, nargs="+", help="one per length; default: as published for the length")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64], help="channels per head (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="rows (default: %(default)s)")
    parser.add_argument("--dense-tail-blocks", type=int, default=2, help="query blocks in full (default: %(default)s)")
    parser.add_argument(
        "--selectors",
        nargs="+",
        choices=KERNEL_SELECTORS,
        default=[FlashPrefillConfig().selector, "flashprefill"],
        help="rules whose stages are timed (default: %(default)s)",
    )
    parser.add_argument(
        "--pool-size",
        type=int,
        default=FlashPrefillConfig().pool_size,
        choices=POOL_SIZES,
        help="tokens, of the finer probes (default: %(default)s)",
    )
    parser.add_argument(
        "--correction",
        action=argparse.BooleanOptionalAction,
        help="attend with the means of dropped blocks, too (default: as the selector does)",
    )
    parser.add_argument(
        "--mean-blocks",
        type=int,
        default=FlashPrefillConfig().mean_blocks,
        choices=MEAN_BLOCKS,
        help="blocks per mean (default: %(default)s)",
    )
    parser.add_argument("--audit-rows", type=int, default=0, help="time the audit of this many rows, too (default: none)")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, help="default: cuDNN and flash on a GPU, sdpa on a CPU")
    parser.add_argument("--peer", nargs="*", default=[], metavar="NAME=FILE.py", help="other implementations (default: none)")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout of this repository")
    add_tensor_arguments(parser)
    parser.add_argument("--portable", action="store_true", help="use the portable Triton kernels on Hopper, too")
    parser.add_argument("--seconds", type=float, default=2.0, help=SECONDS_HELP)
    parser.add_argument("--limit", type=int, help="quick look: at most this many lengths of each head dim and batch")
    parser.add_argument("--output", type=Path, default=Path("results/operator.json"), help="JSON file (default: %(default)s)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    options.check_output_arguments(args)
    options.check_range("--lengths", args.lengths, 1, options.LONGEST)
    args.densities = args.densities or [PUBLISHED_DENSITY.get(length, 0.1) for length in args.lengths]
    options.check_share("--densities", args.densities)
    options.check_range("--batches", args.batches, 1)
    options.check_range("--dense-tail-blocks", args.dense_tail_blocks, 0)
    if len(args.densities) != len(args.lengths):
        raise commands.UsageError(f"--densities must be one per length, got {len(args.densities)} for {len(args.lengths)}")
    for peer in args.peer:
        peer_prepare(peer)
    if args.before and not (args.before / "hf_flashprefill" / "__init__.py").is_file():
        raise commands.UsageError(f"--before must be a checkout of this repository, got {args.before}")
    check_tensor_arguments(args)
    check_head_dims("--head-dims", args.head_dims, args)
    if "sdpa_cudnn" in (args.baselines or ()) and args.device.type != "cuda":
        raise commands.UsageError(f"--baselines sdpa_cudnn must come with a GPU, got --device {args.device}")
    if args.portable and args.device.type != "cuda":
        raise commands.UsageError(f"--portable must come with a GPU, got --device {args.device}")
    options.check_range("--audit-rows", args.audit_rows, 0)
    try:
        args.config = FlashPrefillConfig(
            alpha=1.0,
            correction=args.correction,
            mean_blocks=args.mean_blocks,
            pool_size=args.pool_size,
            audit_rows=args.audit_rows,
        )
    except ValueError as error:
        raise commands.UsageError(commands.first_line(error)) from None
    if args.baselines is None:
        on_gpu = args.device.type == "cuda"
        args.baselines = ["sdpa_cudnn", "sdpa_flash"] if on_gpu and args.dtype != torch.float32 else ["sdpa"]


def table(rows: list[dict], selectors: list[str]) -> str:
    ratios = [name for name in rows[0] if name.startswith("speedup_over_")]
    header = ["tokens", "density", "head dim", "batch", "attend ms", "TFLOP/s"]
    header += [f"{what} {selector}" for selector in selectors for what in ("index ms", "operator ms")]
    header += [f"x {name.removeprefix('speedup_over_')}" for name in ratios]
    cells = []
    for row in rows:
        cell = [str(row["length"]), f"{row['density']:.3f}", str(row["head_dim"]), str(row["batch"])]
        cell += [f"{row['attend']['median_ms']:.2f}", f"{row['attend_tflops']:.0f}"]
        for selector in selectors:
            index_ms = row[f"pool_{selector}"]["median_ms"] + row[f"select_{selector}"]["median_ms"]
            cell += [f"{index_ms:.2f}", f"{row[f'operator_{selector}']['median_ms']:.2f}"]
        cells.append(cell + [f"{row[name]:.2f}" for name in ratios])
    return tables.format_table(header, cells)


def operator_run(harness: str, args: argparse.Namespace, implementation: str, config: FlashPrefillConfig) -> Result:
    """What is known of a run on random tensors before its first row: all but the summary and the rows."""
    dtype = str(args.dtype).removeprefix("torch.")
    identity: ModelRecord = {"name": "operator", "parameters": 0, "dtype": dtype, "base_implementation": implementation}
    place, arguments = recording.environment(args.device), recording.recorded_arguments(args)
    return Result(harness, place, identity, config.to_dict(), arguments, [], [])


def peer_checksums(peers: list[str]) -> list[list]:
    """Name and checksum of every NAME=FILE.py: another file of the same name is another implementation."""
    named = (peer.partition("=") for peer in peers)
    return [[name, zlib.crc32(Path(path).read_bytes())] for name, _, path in named]


def report(result: Result, output: Path, selectors: list[str]) -> None:
    """Print a table and where the files are, draw a single shape's lengths, and print the speed-ups as the last line."""
    rows = result.rows
    print(table(rows, selectors))
    if "overhead_of_means" in rows[0]:
        shares = ", ".join(f"{row['overhead_of_means']:.1%}" for row in rows)
        print(f"the means of dropped blocks add {shares} to the attention")
    if "before" in rows[0]:
        print(f"\nTime by that of {rows[0]['before']['commit']}:\n{before.table(rows)}")
    if len({(row["head_dim"], row["batch"]) for row in rows}) == 1:
        picture = output.with_suffix(".png")
        draw_operator(rows).savefig(picture, dpi=130)
        print(f"wrote {picture}")
    print(f"wrote {output}")
    ratios = [name for name in rows[0] if name.startswith("speedup_over_")]
    print(json.dumps([{"length": row["length"]} | {name: round(row[name], 3) for name in ratios} for row in rows]))


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    backend = resolve_backend(args.backend, torch.empty(1, args.heads, 1, 64, dtype=args.dtype, device=args.device))
    groups = [
        [(length, density, head_dim, batch) for length, density in zip(args.lengths, args.densities, strict=True)]
        for head_dim, batch in itertools.product(args.head_dims, args.batches)
    ]
    shapes = options.limited(groups, args.limit)
    names = [f"{i}/{length}" for i, (length, *_) in enumerate(shapes)]
    run = operator_run("operator_speed", args, backend.__name__, args.config)
    packages = [hf_flashprefill, *([before.package(args.before)] if args.before else [])]
    with torch.no_grad(), portable_kernels(packages) if args.portable else contextlib.nullcontext():
        if not all(passes_gate(backend, head_dim, args) for head_dim in args.head_dims):
            print("the correctness gate failed: no times are reported", file=sys.stderr)
            return 1
        others = {"peers": peer_checksums(args.peer), "before": before.package_checksum(args.before)}
        result = recording.time_and_record(run, args.output, names, lambda i: [measure(*shapes[i], args)], "shape", others)
    if result:
        report(result, args.output, args.selectors)
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
