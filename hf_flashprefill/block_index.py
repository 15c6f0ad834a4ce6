"""Which key blocks each query block attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .geometry import PrefillGeometry


@dataclass(frozen=True)
class BlockIndex:
    """Lists of kept key blocks, one per batch row, query head and query block.

    Attributes:
        indices: int32 [B, Hq, T, K], key-block numbers in ascending order; entries at and after ``counts`` are
            meaningless. A list that is not empty ends with the query block's own number.
        counts: int32 [B, Hq, T], entries in use; 0 for a query block without valid queries.
        geometry: The call the lists belong to. Block numbers count from each row's first valid token.
        first_query_block: Which of the geometry's query blocks comes first here; the lists of a long prompt are made
            and used a few query blocks at a time.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    geometry: PrefillGeometry
    first_query_block: int = 0

    @property
    def query_blocks(self) -> int:
        """Query blocks T covered."""
        return self.counts.shape[2]

    def visible_counts(self) -> torch.Tensor:
        """Causally visible key blocks per query block, int64 [B, T]."""
        visible = self.geometry.visible_counts(self.counts.device)
        return visible[:, self.first_query_block : self.first_query_block + self.query_blocks]

    def visible_total(self) -> int | torch.Tensor:
        """Causally visible key blocks of one head, all rows and covered query blocks: an int, or a tensor if padded."""
        if self.geometry.valid_ranges is not None:
            return self.visible_counts().sum()
        first = self.geometry.query_offset // self.geometry.block_size + self.first_query_block
        return self.geometry.batch * sum(range(first + 1, first + self.query_blocks + 1))

    def density(self) -> float:
        """Kept blocks over causally visible blocks, all rows and heads together. Waits for the device."""
        visible = int(self.visible_total()) * self.counts.shape[1]
        return int(self.counts.sum()) / visible if visible else 1.0

    def to_mask(self) -> torch.Tensor:
        """Kept blocks as bool [B, Hq, T, N]."""
        used = torch.arange(self.indices.shape[-1], device=self.counts.device) < self.counts[..., None]
        mask = torch.zeros(*self.counts.shape, self.geometry.key_blocks + 1, dtype=torch.bool, device=self.counts.device)
        # Unused entries are sent to a column of their own, which is cut off.
        target = self.indices.long().where(used, self.geometry.key_blocks)
        return mask.scatter_(-1, target, True)[..., :-1]

    def validate(self) -> None:
        """Check the lists. Waits for the device.

        Raises:
            ValueError: A list is too long, unsorted, repeats or leaves out its own block, or looks into the future.
        """
        visible = self.visible_counts()[:, None]
        if ((self.counts < 0) | (self.counts > visible) | (self.counts > self.indices.shape[-1])).any():
            raise ValueError("counts must lie between 0 and the number of causally visible blocks, all of them in indices")
        if ((self.counts == 0) != (visible == 0)).any():
            raise ValueError("counts must be 0 exactly where a query block holds no valid query")
        position = torch.arange(self.indices.shape[-1], device=self.counts.device)
        used = position < self.counts[..., None]
        rising = self.indices[..., 1:] > self.indices[..., :-1]
        if (~rising & used[..., 1:]).any() or ((self.indices < 0) & used).any():
            raise ValueError("indices must be ascending block numbers >= 0 without repeats")
        last = self.indices.long().masked_fill(~used, -1).amax(-1)
        if (last != visible - 1).any():
            raise ValueError("each list must end with the query block's own block and hold none after it")

    @staticmethod
    def from_mask(mask: torch.Tensor, geometry: PrefillGeometry, first_query_block: int = 0) -> BlockIndex:
        """Lists from bool [B, Hq, T, N] kept blocks."""
        counts = mask.sum(-1, dtype=torch.int32)
        # Each kept block's place in its list is the number of kept blocks before it: no sort needed.
        place = (mask.cumsum(-1) - 1).masked_fill(~mask, mask.shape[-1])
        indices = torch.zeros(*mask.shape[:-1], mask.shape[-1] + 1, dtype=torch.int32, device=mask.device)
        numbers = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand(mask.shape)
        indices.scatter_(-1, place, numbers)
        return BlockIndex(indices[..., :-1].contiguous(), counts, geometry, first_query_block)

    @staticmethod
    def of_window(
        geometry: PrefillGeometry,
        heads: int,
        sliding_window: int,
        first_query_block: int,
        query_blocks: int,
        device: torch.device,
    ) -> BlockIndex:
        """Lists of every block that a sliding window of ``sliding_window`` tokens touches, the same for each head."""
        block_size = geometry.block_size
        visible = geometry.visible_counts(device)[:, first_query_block : first_query_block + query_blocks]
        # The first query of a block looks back farthest.
        first = torch.div((visible - 1) * block_size - sliding_window + 1, block_size, rounding_mode="floor").clamp(min=0)
        counts = (visible - first).clamp(min=0)
        width = geometry.window_width(sliding_window)
        indices = first[..., None] + torch.arange(width, device=device)
        shape = (geometry.batch, heads, query_blocks)
        indices = indices[:, None].expand(*shape, width).to(torch.int32, memory_format=torch.contiguous_format)
        return BlockIndex(indices, counts[:, None].expand(shape).to(torch.int32).contiguous(), geometry, first_query_block)

    @staticmethod
    def concatenate(parts: list[BlockIndex]) -> BlockIndex:
        """One index of consecutive parts of the same call."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.indices.shape[-1] for part in parts)
        indices = [torch.nn.functional.pad(part.indices, (0, width - part.indices.shape[-1])) for part in parts]
        counts = torch.cat([part.counts for part in parts], 2)
        return BlockIndex(torch.cat(indices, 2), counts, parts[0].geometry, parts[0].first_query_block)
