"""Compile the kernels for a GPU that need not be there, and say what ptxas thought of them: a JSON line per kernel.

python -m tests.compile_kernels 90 128
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_flashprefill.backends.triton import (
    attend,
    attend_hopper,
    energies,
    energies_hopper,
    energy_lists,
    gather,
    hopper_primitives,
    longest,
    means,
    output,
    pool,
    probe,
    probe_hopper,
    shares,
    tuning,
)
from hf_flashprefill.backends.triton.pool import TILE
from tests.machine_code import verdict

HEADS, KEY_HEADS, TOKENS, BLOCK = 8, 2, 512, 128


class OfflineDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(capability: int, head_dim: int) -> Iterator[tuple[str, Any]]:
    """(name, compiled kernel) of every kernel that a bfloat16 prompt runs on this GPU generation."""
    generation, dtype = (capability // 10, capability % 10), torch.bfloat16
    query = torch.zeros(1, HEADS, TOKENS, head_dim, dtype=dtype)
    key = torch.zeros(1, KEY_HEADS, TOKENS, head_dim, dtype=dtype)
    number = torch.zeros(1, HEADS, 4, 4, dtype=torch.int32)
    scores, counts, group = torch.zeros(4096), number[..., 0].contiguous(), HEADS // KEY_HEADS
    shape = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK": BLOCK, "HAS_RANGES": False}
    lengths, strides = (TOKENS, TOKENS, 0, 0), query.stride()[:3]

    tiles = tuning.attend_tiles(generation, head_dim, dtype, BLOCK)
    described = attend._descriptors(key, key, head_dim, tiles)
    terms = {"attend": (), "attend window sinks": ("WINDOW", "SINKS"), "attend means": ("MEANS",)}
    for name, given in terms.items():
        flags = {f"HAS_{term}": term in given for term in ("WINDOW", "SINKS", "MEANS")}
        of_means = (key, key, scores) if "MEANS" in given else (None, None, None)
        yield (
            name,
            attend._attend_kernel.warmup(
                query, key, key, *(described or (None, None)), query, None, number, counts,
                scores if "SINKS" in given else None, *of_means, 0.1, *lengths, 4, 4, 300, 4, 4, 128, *strides,
                *key.stride()[:3], *key.stride()[:3], *strides, **shape, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
                HAS_DESCRIPTORS=described is not None, **flags, HAS_TENSOR_MEMORY=generation[0] == 10,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
                enable_fp_fusion=True,
                grid=(1,),
            ),
        )  # fmt: skip

    tiles = tuning.energy_tiles(generation, head_dim, dtype)
    described = TensorDescriptor.from_tensor(key.view(-1, head_dim), [tiles.block_n, head_dim]) if tiles.copy_engine else None
    yield (
        "energies",
        energies._energies_kernel.warmup(
            query, key, described, None, scores, 0.1, *lengths, 4, 4, *strides, **shape, BLOCK_N=tiles.block_n,
            HAS_DESCRIPTORS=described is not None, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            enable_fp_fusion=True, grid=(1,),
        ),
    )  # fmt: skip
    yield (
        "list energies",
        energy_lists._list_energies_kernel.warmup(
            query, key, None, scores, number, counts, 0.1, -1.0, *lengths, 4, 4, 2, 4, 2, *strides, **shape,
            BLOCK_LIST=energy_lists.BLOCK_LIST, num_warps=1, enable_fp_fusion=True, grid=(1,),
        ),
    )  # fmt: skip

    tiles, pooled = tuning.probe_tiles(generation, head_dim), key.to(torch.int8)
    described = TensorDescriptor.from_tensor(pooled.view(-1, head_dim), [TILE, head_dim]) if tiles.copy_engine else None
    probed = (None, scores, scores, 0.1, *lengths, 4, 0, 2, 4, 256, 4)
    probing = {
        "GROUP": group,
        "HEADS": group,
        "HEAD_DIM": head_dim,
        "BLOCK": BLOCK,
        "POOL": 4,
        "STRIDE": 8,
        "CENTRE_TILES": pool.centre_tiles(4),
        "HAS_RANGES": False,
    }
    yield (
        "probe",
        probe._probe_kernel.warmup(
            query, counts, pooled, described, pooled, scores, *probed, *strides, **probing,
            QUERY_BLOCKS=tiles.rows // (16 * group), ROWS=tiles.rows, BLOCK_D=head_dim, TILE=TILE,
            HAS_DESCRIPTORS=described is not None, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            enable_fp_fusion=True, grid=(1,),
        ),
    )  # fmt: skip
    for name, tile_blocks in (("list shares", 4), ("list blends", 4), ("list peaks", 8)):
        yield (
            name,
            shares._list_shares_kernel.warmup(
                scores, scores, None, number, counts, -1.0, *lengths, 4, 0, 4, 4, 4, 4, 2, 4, 2, HEADS=group, QUERY_BLOCKS=1,
                ROWS=tiles.rows, BLOCK=BLOCK, SLOTS=16, TILE_BLOCKS=tile_blocks, BLOCK_LIST=shares.BLOCK_LIST,
                IS_RELATIVE=name == "list peaks", IS_BLEND=name == "list blends", LOG2_WEIGHT=4.0, HAS_RANGES=False,
                num_warps=1, enable_fp_fusion=True, grid=(1,),
            ),
        )  # fmt: skip

    yield (
        "longest_queries",
        longest._longest_queries_kernel.warmup(
            query, None, counts, *lengths, *strides, HEAD_DIM=head_dim, BLOCK_D=head_dim, BLOCK=BLOCK,
            TOKENS=longest.TOKENS, STRIDE=8, HAS_RANGES=False, num_warps=head_dim // 16, enable_fp_fusion=True, grid=(1,),
        ),
    )  # fmt: skip

    yield (
        "clear_padding",
        output._clear_padding_kernel.warmup(
            query,
            counts,
            *lengths[:3],
            HEADS * head_dim,
            TOKENS=output.TOKENS,
            WIDTH=output.WIDTH,
            num_warps=4,
            enable_fp_fusion=True,
            grid=(1,),
        ),
    )

    for name, run, has_all in (("pools and blocks", 4, True), ("blocks", pool.RUN, False)):
        yield (
            name,
            pool._pool_kernel.warmup(
                key, key if has_all else None, None, *((pooled, pooled, scores) if has_all else (None,) * 3), key,
                key if has_all else None, TOKENS, 4,
                *key.stride()[:3], *key.stride()[:3], HEAD_DIM=head_dim, BLOCK_D=head_dim, BLOCK=BLOCK, POOL=run, TILE=TILE,
                HAS_RANGES=False, HAS_POOLS=has_all, HAS_BLOCKS=True, HAS_VALUES=has_all,
                num_warps=tuning.pool_warps(generation, BLOCK // run, head_dim, has_all), enable_fp_fusion=True, grid=(1,),
            ),
        )  # fmt: skip

    yield (
        "run_means",
        means._run_means_kernel.warmup(
            key, key, key, 4, 1, MEAN_BLOCKS=16, HEAD_DIM=head_dim, BLOCK_D=head_dim, RUNS=means.TILE // head_dim, num_warps=4,
            enable_fp_fusion=True, grid=(1,),
        ),
    )  # fmt: skip
    yield (
        "weigh_means",
        means._weigh_means_kernel.warmup(
            number, counts, scores, counts, 4, 128, 4, 4, LOG2_BLOCK=7, HAS_COUNTER=True, num_warps=1, enable_fp_fusion=True,
            grid=(1,),
        ),
    )  # fmt: skip

    # As vLLM's cache has them: the keys of a token and head before its values.
    pages = torch.zeros(4, 16, KEY_HEADS, 2 * head_dim, dtype=dtype).split(head_dim, -1)
    yield (
        "gather",
        gather._gather_pages_kernel.warmup(
            *pages, counts, key, TOKENS, *pages[0].stride()[:3], *pages[1].stride()[:3], PAGE=16, HEAD_DIM=head_dim,
            BLOCK_D=head_dim, TOKENS=gather.TILE // head_dim, num_warps=4, enable_fp_fusion=True, grid=(1,),
        ),
    )  # fmt: skip

    if capability == 90 and head_dim <= 128:
        tiles = probe_hopper.tiles_for(query)
        described = [probe_hopper._describe(pooled, rows) for rows in (TILE, 8 * pool.centre_tiles(4))]
        yield (
            "probe_hopper",
            probe_hopper._probe_hopper_kernel.warmup(
                query, counts, *described, scores, *probed, *strides, **probing,
                QUERY_BLOCKS=tiles.rows // (16 * group), num_warps=tiles.num_warps, enable_fp_fusion=True, grid=(1,),
            ),
        )  # fmt: skip

        means_layout = gl.NVMMASharedLayout.get_default_for([64, head_dim], gl.bfloat16)
        described = energies_hopper.TensorDescriptor.from_tensor(key.view(-1, head_dim), [64, head_dim], means_layout)
        yield (
            "energies_hopper",
            energies_hopper._energies_hopper_kernel.warmup(
                hopper_primitives.describe_rows(query, BLOCK), described, None, scores, 0.1, *lengths, 4, 4, 4, 4,
                GROUP=group, HAS_RANGES=False, num_warps=4, enable_fp_fusion=True, grid=(1,),
            ),
        )  # fmt: skip
        yield from compiled_attend_hopper(head_dim)


def compiled_attend_hopper(head_dim: int) -> Iterator[tuple[str, Any]]:
    """(name, compiled kernel) of the attention itself on a Hopper GPU."""
    number = torch.zeros(1, HEADS, 4, 4, dtype=torch.int32)
    counts = number[..., 0].contiguous()
    tiles = tuning.hopper_tiles(head_dim)
    mean_weights = torch.zeros(1, HEADS, 4, 128)
    for name, dtype, has_means, sinks, ranges in (
        ("attend_hopper", torch.bfloat16, False, None, None),
        ("attend_hopper means", torch.bfloat16, True, None, None),
        ("attend_hopper sinks", torch.bfloat16, True, mean_weights, None),
        ("attend_hopper padded", torch.bfloat16, True, None, counts),
        ("attend_hopper float16", torch.float16, False, None, None),
        ("attend_hopper float16 padded", torch.float16, True, None, counts),
    ):
        query = torch.zeros(1, HEADS, TOKENS, head_dim, dtype=dtype)
        key = torch.zeros(1, KEY_HEADS, TOKENS, head_dim, dtype=dtype)
        rows = ((query, 64), (key, tiles.step), (key, tiles.step))
        descriptors = [hopper_primitives.describe_rows(tensor, count) for tensor, count in rows]
        run_means = means.RunMeans(key[:, :, None], key[:, :, None])
        of_means = attend_hopper._mean_descriptors(run_means, mean_weights, tiles.step) if has_means else [None] * 3
        yield (
            name,
            attend_hopper._attend_hopper_kernel.warmup(
                *descriptors, *of_means, query, ranges, counts, counts, counts, number, sinks, 0.1, TOKENS, TOKENS, 0, 0,
                4, 4, 4, HEADS, HEADS, *query.stride()[:3], GROUP=HEADS // KEY_HEADS, STEP=tiles.step, STAGES=tiles.stages,
                QUERY_STAGES=tiles.query_stages, QUERY_IN_REGISTERS=tiles.query_in_registers, HAS_RANGES=ranges is not None,
                HAS_SINKS=sinks is not None, HAS_MEANS=has_means, num_warps=4, enable_fp_fusion=True, grid=(1,),
            ),
        )  # fmt: skip


def every_kernel(capability: int, head_dim: int) -> Iterator[tuple[int, str, Any]]:
    """(head_dim, name, compiled kernel); at 256 the attention for Hopper GPUs alone."""
    for named in compiled_attend_hopper(head_dim) if head_dim == 256 else compiled(capability, head_dim):
        yield head_dim, *named


def with_answers(kernels: Iterator[tuple[int, str, Any]]) -> Iterator[tuple[int, str, Any, str]]:
    """(head_dim, name, compiled kernel, what ptxas said of it): it takes half of the time, too much to be asked again."""
    knobs.nvidia.dump_ptxas_log = True
    # A kernel that was compiled before would come without its log.
    knobs.compilation.always_compile = True
    # Some kernels are the same at every head_dim, and not compiled twice in a process all the same.
    answers: dict[str, str] = {}
    while True:
        answer = io.StringIO()
        with contextlib.redirect_stdout(answer):
            found = next(kernels, None)
        if found is None:
            return
        head_dim, name, kernel = found
        said = answers[kernel.hash] = answer.getvalue() or answers[kernel.hash]
        yield head_dim, name, kernel, said


if __name__ == "__main__":
    target, dim = map(int, sys.argv[1:])
    driver.set_active(OfflineDriver(target))
    for head_dim, name, kernel, said in with_answers(every_kernel(target, dim)):
        print(json.dumps({"kernel": name, "head_dim": head_dim, **verdict(kernel, target, said)}), flush=True)
