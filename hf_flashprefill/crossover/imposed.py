"""Lists of blocks for random tensors, of the density that a real prompt of their length has.

How sparse a real prompt is cannot be known from random tensors, so the density is assumed: what the FlashPrefill papers
report for Llama-3.1-8B and Qwen3-30B-A3B at each length, 0.70 at 4K tokens, 0.46 at 8K, 0.29 at 16K, 0.176 at 32K, 0.10 at
64K. A model or an alpha that keeps more blocks than that gains later than measured.
"""

from __future__ import annotations

import math

import torch

from ..block_index import BlockIndex
from ..geometry import PrefillGeometry

# What the FlashPrefill papers report for Llama-3.1-8B and Qwen3-30B-A3B, by length in tokens.
PUBLISHED_DENSITY = {4096: 0.70, 8192: 0.46, 16384: 0.29, 32768: 0.176, 65536: 0.10, 131072: 0.06, 262144: 0.041}


def assumed_density(length: int) -> float:
    """The published density at ``length`` tokens, straight lines in the length's logarithm between the published ones; 1 at
    1024 tokens, where sinks, window and tail are nearly all there is, and .041 from 256K on."""
    points = [(1024, 1.0), *PUBLISHED_DENSITY.items()]
    length = min(max(length, points[0][0]), points[-1][0])
    for (low, start), (high, end) in zip(points, points[1:], strict=False):
        if length <= high:
            part = math.log(length / low) / math.log(high / low)
            return start + part * (end - start)
    raise AssertionError


def imposed_index(
    geometry: PrefillGeometry, heads: int, density: float, device: torch.device, dense_tail_blocks: int = 2
) -> BlockIndex:
    """Lists of the given density: 2 sink blocks, 4 window blocks, the last query blocks in full, the rest at random. The last
    query is the last key's.

    What is kept in any case is the least density there can be: .12 at 16K tokens with two dense tail blocks.
    """
    count = geometry.key_blocks
    tile, block = torch.arange(geometry.query_blocks, device=device)[:, None], torch.arange(count, device=device)[None, :]
    tile = tile + geometry.query_offset // geometry.block_size
    causal = block <= tile
    forced = ((block < 2) | (tile - block < 4) | (tile >= count - dense_tail_blocks)) & causal
    free = (causal.sum() - forced.sum()).item()
    chance = max(0.0, density * causal.sum().item() - forced.sum().item()) / max(free, 1)
    generator = torch.Generator(device).manual_seed(0)
    # A head at a time: at 256K tokens all heads together would need gigabytes of random numbers.
    chosen = [torch.rand(causal.shape, device=device, generator=generator) < chance for _ in range(heads)]
    mask = torch.stack([(choice & causal) | forced for choice in chosen])
    return BlockIndex.from_mask(mask.expand(geometry.batch, -1, -1, -1), geometry)
