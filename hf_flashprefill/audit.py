"""Audit in production: how much of the attention of a few query rows the dropped blocks would have had.

Nothing here waits for the device. A layer's numbers reach the host when ``prefill_stats`` is read, or by a copy that a later
call finds finished.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from .arithmetic import exact_arithmetic
from .attention_mass import exact_shares, kept_shares, spread_positions
from .block_index import BlockIndex
from .config import FlashPrefillConfig


class RowAudit:
    """The dropped mass of one sparse call of a layer, collected while its lists are made.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        rows: Queries of each batch row to look at, spread over its valid ones, >= 1; always the same for the same shapes.
        scale: Multiplies query-key products.
        sinks: [Hq], logits of a softmax column without a value; None if there is none.
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor, *, rows: int, scale: float, sinks: torch.Tensor | None = None):
        self._inputs, self._rows, self._options = (query, key), rows, {"scale": scale, "sinks": sinks}
        self._positions = self._shares = self._kept = self._valid = None

    def add_index(self, index: BlockIndex) -> None:
        """Take the lists of some or all query blocks; together they must cover each once."""
        geometry, device = index.geometry, index.counts.device
        with exact_arithmetic(device):
            if self._shares is None:
                self._positions = spread_positions(geometry, self._rows, device)
                self._shares = exact_shares(*self._inputs, geometry, self._positions, **self._options)
                span = geometry.spans(device)
                self._valid = span.query_end > span.query_begin
                self._kept = torch.zeros_like(self._shares[..., 0])
            self._kept += kept_shares(self._shares, self._positions, index)

    @torch.no_grad()
    def dropped(self) -> torch.Tensor:
        """float32 [3]: the mean dropped share over rows and heads, 1, and the largest; zeros if no query was valid."""
        shares = (self._shares.sum(-1) - self._kept).clamp(min=0)
        valid = self._valid.sum()
        mean = shares.sum() / (valid.clamp(min=1) * shares[0].numel())
        return torch.stack([mean, (valid > 0).float(), shares.amax()])


def start_audit(
    config: FlashPrefillConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None,
    sliding_window: int | None,
    sinks: torch.Tensor | None,
) -> RowAudit | None:
    """The audit of a call, or None if its settings ask for none or a window keeps all that its queries see."""
    if not config.audit_rows or sliding_window is not None:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return RowAudit(query, key, rows=config.audit_rows, scale=scale, sinks=sinks)


class HostCopy:
    """A small tensor on its way to the host."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor.to("cpu", non_blocking=True)
        self._event = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def arrived(self) -> torch.Tensor | None:
        """The tensor on the CPU, or None if it is still on its way; never waits."""
        return self._tensor if self._event is None or self._event.query() else None


@dataclass
class Alarm:
    """One warning for all layers that share it."""

    has_rung: bool = False

    def check(self, dropped: float, limit: float) -> None:
        """Warn if a layer dropped a larger share than ``limit`` and no layer has before."""
        if dropped > limit and not self.has_rung:
            self.has_rung = True
            warnings.warn(
                f"sparse prefill dropped {dropped:.1%} of the attention of a layer's audited queries, above "
                f"audit_limit={limit:g}; prefill_stats(model) shows every layer. Lower alpha or calibrate it.",
                stacklevel=4,
            )
