"""Where the queries and keys of one prefill call stand.

Every batch row is described in its own coordinates: position 0 is the row's first valid token, wherever padding puts it
in the buffer. Blocks are counted from there, and query blocks lie on the same grid as key blocks. So a padded row is
selected and attended exactly as it would be alone, and a prefill in chunks of whole blocks sees the same tiles as an
unchunked one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class RowSpan(NamedTuple):
    """One batch row: buffer position of its first valid token, then its valid query and key positions from there.

    Each is an int, or an int64 tensor [B] for all rows at once.
    """

    start: int | torch.Tensor
    query_begin: int | torch.Tensor
    query_end: int | torch.Tensor
    key_end: int | torch.Tensor


@dataclass(frozen=True)
class PrefillGeometry:
    """Shapes and offsets of one prefill call.

    Attributes:
        batch: Rows B.
        query_len: Queries Sq in the buffer.
        kv_len: Keys Skv in the buffer.
        query_offset: Buffer position, among the keys, of the first query; ``kv_len - query_len`` aligns the ends.
        block_size: Tokens per block.
        valid_ranges: int32 [B, 2], each row's first valid buffer position and the one after its last; None if all are
            valid. Never read on the host.
    """

    batch: int
    query_len: int
    kv_len: int
    query_offset: int
    block_size: int
    valid_ranges: torch.Tensor | None = None

    @property
    def key_blocks(self) -> int:
        """Key blocks N that the longest possible row has."""
        return -(-self.kv_len // self.block_size)

    @property
    def query_blocks(self) -> int:
        """Query blocks M that suffice for every row; with padding some rows leave the last ones empty."""
        if self.valid_ranges is None:
            return -(-(self.query_offset % self.block_size + self.query_len) // self.block_size)
        # Padding can shift a later chunk's queries off the grid by an amount only the device knows.
        return -(-self.query_len // self.block_size) + (self.query_offset > 0)

    def visible_blocks_bound(self, query_block: int) -> int:
        """Most key blocks that query block number ``query_block`` (from 0) of any row can see."""
        return min(self.key_blocks, self.query_offset // self.block_size + query_block + 1)

    def window_width(self, sliding_window: int) -> int:
        """Most key blocks that a query block sees through a window of so many tokens, as far as there are any."""
        return -(-(sliding_window - 1) // self.block_size) + 1

    def certain_blocks(self, query_block: int) -> int:
        """Key blocks that every row of query block number ``query_block`` sees whole, as far as the host knows.

        0 where a row may be no query.
        """
        own = self.query_offset // self.block_size + query_block
        first, end = own * self.block_size, (own + 1) * self.block_size
        is_full = self.valid_ranges is None and first >= self.query_offset and end <= self.query_offset + self.query_len
        return own if is_full else 0

    def spans(self, device: torch.device) -> RowSpan:
        """All rows' spans as int64 tensors [B] on ``device``; a row without valid queries has query_end <= query_begin."""
        if self.valid_ranges is None:
            # Numbers worked out here: on a GPU each operation is a launch, and an audit needs the spans of every layer often.
            query_end = min(self.kv_len, self.query_offset + self.query_len)
            numbers = {"start": 0, "query_begin": self.query_offset, "query_end": query_end, "key_end": self.kv_len}
            return RowSpan(**{n: torch.full((self.batch,), x, dtype=torch.int64, device=device) for n, x in numbers.items()})
        start, end = self.valid_ranges.to(device=device, dtype=torch.int64).unbind(1)
        return RowSpan(
            start=start,
            query_begin=(self.query_offset - start).clamp(min=0),
            query_end=(end.clamp(max=self.query_offset + self.query_len) - start).clamp(min=0),
            key_end=(end - start).clamp(min=0),
        )

    def row_spans(self) -> list[RowSpan]:
        """One span of ints per row. Waits for the device when there is padding."""
        spans = self.spans(torch.device("cpu"))
        return [RowSpan(*row) for row in zip(*(column.tolist() for column in spans), strict=True)]

    def visible_counts(self, device: torch.device) -> torch.Tensor:
        """Key blocks each query block may see under causality, int64 [B, M]; 0 for empty query blocks."""
        span = self.spans(device)
        tile = torch.arange(self.query_blocks, device=device)
        own = span.query_begin[:, None] // self.block_size + tile
        empty = (own * self.block_size >= span.query_end[:, None]) | (span.query_end <= span.query_begin)[:, None]
        return (own + 1).masked_fill(empty, 0)
