"""NVIDIA GPUs: portable Triton kernels, and on Hopper Gluon kernels for the attention, the finer probe and the published
rule's scores.

Under ``TRITON_INTERPRET=1`` the portable kernels also run on CPU tensors, slowly.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from ...block_index import BlockIndex
from ...geometry import PrefillGeometry
from . import attend, hopper
from .energy_lists import select_energies
from .means import RunMeans, run_means
from .output import new_output
from .pool import PooledKeys, _pool_kernel, pool_keys, pool_keys_and_values, pooled_together, tokens_per_row
from .shares import select_shares

attend_hopper = hopper.gluon_module("attend_hopper")

__all__ = [
    "attend_blocks",
    "new_output",
    "obstacle",
    "pool_keys",
    "pool_keys_and_values",
    "pooled_together",
    "run_means",
    "select_blocks",
    "tokens_per_row",
]

MAX_HEAD_DIM = 512
# Wider heads want more shared memory than most cards of compute capability 8 and 12 have, and float32 twice of it.
MAX_HEAD_DIM_EVERYWHERE = 256
# Keys and values of each row are a dimension of a grid that ends at 65535.
MAX_BATCH = 32767


def obstacle(query: torch.Tensor) -> str | None:
    """Why the kernels cannot take tensors like ``query``, or None."""
    interpreted = isinstance(_pool_kernel, InterpretedFunction)
    if query.device.type != "cuda" and not interpreted:
        return f"tensors must be on a CUDA device, got {query.device}"
    if torch.version.hip is not None:
        return "AMD GPUs are untested"
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the GPU's compute capability must be 8.0 or newer"
    if interpreted and query.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    if query.shape[-1] > MAX_HEAD_DIM or query.shape[-1] % 8:
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    # A kind of tensors has no batch.
    if len(query.shape) == 4 and query.shape[0] > MAX_BATCH:
        return f"batch must be at most {MAX_BATCH}, got {query.shape[0]}"
    if query.shape[-1] > MAX_HEAD_DIM_EVERYWHERE and query.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(query.device)
        if query.dtype == torch.float32 or (major, minor) != (8, 0) and major not in (9, 10):
            return (
                f"head_dim above {MAX_HEAD_DIM_EVERYWHERE} needs 16-bit numbers and compute capability 8.0, 9.x or 10.x, "
                f"got {query.shape[-1]} in {query.dtype} on {major}.{minor}"
            )
    return None


def select_blocks(
    query: torch.Tensor,
    pooled: tuple[torch.Tensor, ...],
    geometry: PrefillGeometry,
    *,
    selector: str,
    pool_size: int,
    query_stride: int,
    **rule: Any,
) -> BlockIndex:
    """Lists of kept blocks by the selector's name; ``pooled`` comes from ``pool_keys`` with the same ``pool_size``."""
    if selector == "flashprefill":
        return select_energies(query, *pooled, geometry, **rule)
    probe = {"pool_size": pool_size, "query_stride": query_stride}
    return select_shares(query, PooledKeys(*pooled), geometry, selector=selector, **probe, **rule)


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: BlockIndex,
    *,
    scale: float,
    output: torch.Tensor,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    means: RunMeans | None = None,
) -> None:
    """Write the attention of the index's query blocks into ``output`` [B, Hq, Sq, D]; other rows are left alone.

    The further terms of the softmax are those of ``attend.attend_blocks``, of which the Hopper kernel lacks the window.
    """
    if sliding_window is None and hopper.takes(attend_hopper, query, key, value, index.geometry.block_size):
        attend_hopper.attend_blocks(query, key, value, index, scale=scale, output=output, sinks=sinks, means=means)
    else:
        attend.attend_blocks(
            query, key, value, index, scale=scale, output=output, sliding_window=sliding_window, sinks=sinks, means=means
        )
