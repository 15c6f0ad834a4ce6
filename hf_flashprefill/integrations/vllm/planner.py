"""Which rows of a vLLM batch prefill sparsely. Plain torch on the host; vLLM is not imported.

A row is one request's part of one engine step: queries that end its sequence, cached tokens before them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Run(NamedTuple):
    """Adjacent rows that stay on vLLM's own backend; the ends are exclusive."""

    first_row: int
    end_row: int
    first_token: int
    end_token: int


class LongRow(NamedTuple):
    """A row that prefills sparsely: its place in the batch, queries, and sequence length with the cached tokens."""

    row: int
    first_token: int
    query_len: int
    seq_len: int

    @property
    def end_token(self) -> int:
        return self.first_token + self.query_len


@dataclass(frozen=True)
class RowPlan:
    """The division of one batch.

    Attributes:
        long_rows: Rows for the sparse operator, in batch order.
        runs: All other rows that have queries, in batch order; empty if no row is long, for then the batch is left whole.
        dense_rows: Rows that stay dense, by reason. Padding rows, which have no queries, are not counted.
    """

    long_rows: list[LongRow]
    runs: list[Run]
    dense_rows: Counter[str]


def plan_rows(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor | None,
    *,
    min_query_len: int,
    min_seq_len: int,
    dense_reason: str | None = None,
) -> RowPlan:
    """Divide a batch into long prefill rows and runs of all others.

    Args:
        query_start_loc: Integers [rows + 1] on the host, the first token of each row and the end of the last.
        seq_lens: Integers [rows] on the host, tokens of each row's sequence after this step; exact for prefill rows. None
            if the host does not know them.
        min_query_len: Tokens; rows with fewer queries stay dense.
        min_seq_len: Tokens; rows of shorter sequences stay dense.
        dense_reason: Why the whole batch stays dense, if it does. Only rows that were long otherwise count under it.
    """
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    wide = query_lens >= min_query_len
    dense_rows = Counter(
        {
            "decode": int((query_lens == 1).sum()),
            "shorter than min_query_len": int(((query_lens > 1) & ~wide).sum()),
        }
    )
    long = torch.zeros_like(wide)
    if seq_lens is None:
        dense_rows["sequence lengths unknown to the host"] = int(wide.sum())
    else:
        # A draft model's rows may hold more queries than the host knows tokens of.
        whole = query_lens <= seq_lens
        long = wide & whole & (seq_lens >= min_seq_len)
        dense_rows["more queries than tokens"] = int((wide & ~whole).sum())
        dense_rows["shorter than min_seq_len"] = int((wide & whole & ~long).sum())
    if dense_reason is not None:
        dense_rows[dense_reason] = int(long.sum())
        long = torch.zeros_like(long)
    # A Counter without its zeros.
    dense_rows = +dense_rows
    numbers = long.nonzero().flatten().tolist()
    if not numbers:
        return RowPlan([], [], dense_rows)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    long_rows = [LongRow(row, starts[row], starts[row + 1] - starts[row], lengths[row]) for row in numbers]
    edges = [-1, *numbers, len(lengths)]
    runs = [
        Run(before + 1, after, starts[before + 1], starts[after])
        for before, after in zip(edges, edges[1:], strict=False)
        if starts[after] > starts[before + 1]
    ]
    return RowPlan(long_rows, runs, dense_rows)
