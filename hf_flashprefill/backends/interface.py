"""What the implementations of the operator's stages have in common."""

from __future__ import annotations

from typing import Protocol

import torch

from ..block_index import BlockIndex
from ..geometry import PrefillGeometry


class Backend(Protocol):
    """What ``backends.torch`` and ``backends.triton`` offer, in the order in which a call needs it; triton also ``obstacle``.

    Query is [B, Hq, Sq, D], key and value [B, Hkv, Skv, D], of T of the geometry's M query blocks against its N key blocks.
    """

    def new_output(self, query: torch.Tensor, geometry: PrefillGeometry) -> torch.Tensor:
        """[B, Hq, Sq, D], a view of [B, Sq, Hq, D] memory: zeros for queries outside their row's valid range, the others are
        to be written."""

    def pool_keys(self, key: torch.Tensor, geometry: PrefillGeometry, pool_size: int) -> tuple[torch.Tensor, ...]:
        """What ``select_blocks`` needs of the keys, [B, Hkv, rows, ...] each: means of ``pool_size`` tokens, in the backend's
        own form; of whole blocks [B, Hkv, N, D] in the keys' dtype."""

    def pool_keys_and_values(
        self, key: torch.Tensor, value: torch.Tensor, geometry: PrefillGeometry, pool_size: int
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        """``pool_keys``, and the means of whole blocks of keys and of values, [B, Hkv, N, D] each."""

    def pooled_together(self, block_size: int, pool_size: int) -> int:
        """Tokens of which multiples may be pooled apart, see ``KeptPools``."""

    def tokens_per_row(self, block_size: int, pool_size: int) -> tuple[int, ...]:
        """Tokens that a row of each tensor of ``pool_keys`` is made of."""

    def run_means(
        self, key_means: torch.Tensor, value_means: torch.Tensor, mean_blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of runs of ``mean_blocks`` blocks, of the means of blocks [B, Hkv, N, D] of keys and of values, for
        ``attend_blocks``."""

    def select_blocks(
        self,
        query: torch.Tensor,
        pooled: tuple[torch.Tensor, ...],
        geometry: PrefillGeometry,
        *,
        selector: str,
        pool_size: int,
        query_stride: int,
        scale: float,
        alpha: float,
        sink_blocks: int,
        window_blocks: int,
        dense_tail_blocks: int,
        first_query_block: int,
        query_blocks: int,
    ) -> BlockIndex:
        """Lists of the blocks that the selector keeps for T = ``query_blocks`` query blocks from ``first_query_block`` on. The
        settings are FlashPrefillConfig's; ``pooled`` comes from ``pool_keys`` with the same ``pool_size``."""

    def attend_blocks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: BlockIndex,
        *,
        scale: float,
        output: torch.Tensor,
        sliding_window: int | None = None,
        sinks: torch.Tensor | None = None,
        means: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Write the exact attention of the index's query blocks over their lists into ``output``, which ``new_output`` made;
        other rows are left alone. Further terms of the softmax: ``sinks``, float32 [Hq], and ``means`` of ``run_means`` for
        dropped blocks. A ``sliding_window`` (tokens) wants the lists of ``BlockIndex.of_window``."""
