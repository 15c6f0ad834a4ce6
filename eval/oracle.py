"""The selection that no probe can beat: key blocks kept by their true share of the attention, which costs more than dense.

``"oracle-mean"`` keeps a block when the mean over a query block's rows of the block's exact softmax mass is at least the
threshold, so at its density no other choice keeps more of the attention. ``"oracle-max"`` asks for the largest mass that
any row of the query block gives, which spares what a single row needs. A probe's distance to both is what a better probe
could still gain. Both take whole prompts of one row without padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hf_flashprefill import BlockIndex, attention_mass, functional
from hf_flashprefill.backends.interface import Backend
from hf_flashprefill.geometry import PrefillGeometry

ORACLES = ("oracle-mean", "oracle-max")


class BlockMasses(NamedTuple):
    """Softmax mass of each key block, over the rows of each query block: float32 [1, Hq, T, N], 0 for later blocks."""

    mean: torch.Tensor
    largest: torch.Tensor

    def of(self, oracle: str) -> torch.Tensor:
        return self.mean if oracle == "oracle-mean" else self.largest


def block_masses(
    query: torch.Tensor, key: torch.Tensor, geometry: PrefillGeometry, scale: float, first: int = 0, count: int | None = None
) -> BlockMasses:
    """True block masses of ``count`` query blocks from ``first`` on, all if None. Logits are held a few rows at a time.

    Args:
        query: [1, Hq, S, D].
        key: [1, Hkv, S, D].
        geometry: Of the prompt.
        scale: Multiplies query-key products.
        first: Number of the first query block.
        count: Query blocks, T.

    Raises:
        ValueError: Not a whole prompt of one row without padding.
    """
    if geometry.batch != 1 or geometry.query_offset or geometry.valid_ranges is not None:
        raise ValueError("true block masses take a whole prompt of one row without padding")
    size, group = geometry.block_size, query.shape[1] // key.shape[1]
    last = geometry.query_blocks if count is None else first + count
    means, largest = [], []
    for block in range(first, last):
        end = min((block + 1) * size, geometry.query_len)
        seen = PrefillGeometry(1, end, end, 0, size)
        # exact_shares divides its work by heads only: all these rows of one key-value head are held at once.
        step = max(1, attention_mass.LOGITS_AT_ONCE // (group * seen.key_blocks * size))
        rows = torch.arange(block * size, end, device=query.device)[None].split(step, 1)
        prompt = query[:, :, :end], key[:, :, :end], seen
        masses = torch.cat([attention_mass.exact_shares(*prompt, part, scale=scale) for part in rows], 2)
        masses = F.pad(masses, (0, geometry.key_blocks - seen.key_blocks))
        means.append(masses.mean(2))
        largest.append(masses.amax(2))
    return BlockMasses(torch.stack(means, 2), torch.stack(largest, 2))


def index_from_masses(
    masses: torch.Tensor,
    geometry: PrefillGeometry,
    first_query_block: int = 0,
    *,
    alpha: float,
    sink_blocks: int,
    window_blocks: int,
    dense_tail_blocks: int,
) -> BlockIndex:
    """Lists of the blocks with a mass [1, Hq, T, N] of at least ``alpha``, and of those that every selector keeps."""
    tile = torch.arange(masses.shape[2], device=masses.device)[:, None] + first_query_block
    block = torch.arange(masses.shape[3], device=masses.device)
    kept = (masses >= alpha) | (block < sink_blocks) | (tile - block < window_blocks)
    kept |= tile >= geometry.query_blocks - dense_tail_blocks
    return BlockIndex.from_mask(kept & (block <= tile), geometry, first_query_block)


class _OracleBackend:
    """A backend whose selection knows the true block masses. It is handed nothing but pools: the keys are among them."""

    def __init__(self, backend: Backend, oracle: str):
        self._backend, self._oracle = backend, oracle

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def pool_keys(self, key: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> tuple[torch.Tensor, ...]:
        return *self._backend.pool_keys(key, geometry, pool_size), key

    def pool_keys_and_values(
        self, key: torch.Tensor, value: torch.Tensor, geometry: PrefillGeometry, pool_size: int
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        pooled, *blocks = self._backend.pool_keys_and_values(key, value, geometry, pool_size)
        return (*pooled, key), *blocks

    def select_blocks(
        self, query, pooled, geometry, *, scale, first_query_block, query_blocks, alpha, sink_blocks, window_blocks,
        dense_tail_blocks, **probe,
    ) -> BlockIndex:  # fmt: skip
        masses = block_masses(query, pooled[-1], geometry, scale, first_query_block, query_blocks).of(self._oracle)
        forced = {"sink_blocks": sink_blocks, "window_blocks": window_blocks, "dense_tail_blocks": dense_tail_blocks}
        return index_from_masses(masses, geometry, first_query_block, alpha=alpha, **forced)


@contextlib.contextmanager
def oracle_selection(oracle: str) -> Iterator[None]:
    """Inside, sparse calls keep the blocks that the oracle keeps at the config's ``alpha``, whatever its selector, unless
    that sorts.

    Everything else stays as it is: what runs sparse, the attention over the kept blocks, the statistics. For the backends
    ``"torch"`` and ``"triton"``, not for ``"reference"``.
    """
    resolve = functional.resolve_backend
    functional.resolve_backend = lambda name, query: _OracleBackend(resolve(name, query), oracle)
    try:
        yield
    finally:
        functional.resolve_backend = resolve
