"""What compiled graphs count: a graph can add to tensors, but not to Python's numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensor

from .fitting import heads_of

# Every reason that ``attention.dense_reason`` gives but "decode": counting that would cost every decode step a write.
DENSE_REASONS = (
    "meta device",
    "shorter than min_seq_len",
    "dense layer",
    "no GPU kernel",
    "attention replaced",
    "attention sinks",
    "softcap",
    "position bias",
    "packed sequences",
    "the model's own sparse index",
    "continuous batching",
    "not causal",
    "training mode",
    "gradients needed",
    "torch.vmap",
    "tensor subclass",
    "dropout",
    "output_attentions",
    "mask unknown while compiling",
    "mask is not plain causal",
    "keys are not those of the mask",
    "the layer's window is not the mask's",
    "value head_dim differs",
    "unsupported dtype",
)


@dataclass
class CompiledCounts:
    """Of one attention layer.

    Attributes:
        sparse_calls: int64 [].
        dense_calls: int64 [len(DENSE_REASONS)].
        kept: Kept blocks of each query head, int64 [Hq].
        visible: Visible blocks of one head, int64 [].
        audit: ``RowAudit.dropped`` of all calls together, float32 [3].
        is_lasting: The tensors were made outside of graphs and are added to in place. Those of a graph lie in memory that its
            next replay overwrites if it is a CUDA graph (``mode="reduce-overhead"``, which raises then), and can only be
            added to elsewhere if it ran under ``torch.inference_mode``.
    """

    sparse_calls: torch.Tensor
    dense_calls: torch.Tensor
    kept: torch.Tensor
    visible: torch.Tensor
    audit: torch.Tensor
    is_lasting: bool

    @classmethod
    def zeros(cls, heads: int, device: torch.device, is_lasting: bool = False) -> CompiledCounts:
        """For a layer of so many query heads."""
        shapes = ((), (len(DENSE_REASONS),), (heads,), ())
        counts = [torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes]
        return cls(*counts, torch.zeros(3, device=device), is_lasting)

    @classmethod
    def lasting(cls, heads: int, device: torch.device) -> CompiledCounts:
        """The same, made outside of graphs, for CUDA graphs too."""
        # Tensors that are made in inference mode cannot be added to outside of it.
        with torch.inference_mode(False):
            counts = cls.zeros(heads, device, is_lasting=True)
        for tensor in counts.tensors():
            # Otherwise a CUDA graph would add to a copy. Without a guard, so that layers can share one compiled graph.
            torch._dynamo.mark_static_address(tensor, guard=False)
        return counts

    @classmethod
    def for_layer(cls, module: nn.Module) -> CompiledCounts | None:
        """Lasting counts where an attention layer's weights are; None if that, or how many heads it has, is not known."""
        heads = heads_of(module)
        weight = next(module.parameters(), None)
        if not isinstance(heads, int) or weight is None or weight.device.type == "meta" or isinstance(weight, FakeTensor):
            return None
        return cls.lasting(heads, weight.device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.sparse_calls, self.dense_calls, self.kept, self.visible, self.audit

    def fits(self, query: torch.Tensor) -> bool:
        """Whether a call with this query, [B, Hq, Sq, D], can be added."""
        return self.kept.device == query.device and self.kept.shape[0] == query.shape[1]

    def moved(self, query: torch.Tensor) -> CompiledCounts:
        """The same counts for calls with this query; not lasting."""
        others = [tensor.to(query.device) for tensor in (self.sparse_calls, self.dense_calls, self.visible, self.audit)]
        kept = self.kept.to(query.device) if self.kept.shape[0] == query.shape[1] else self.kept.new_zeros(query.shape[1])
        return CompiledCounts(*others[:2], kept, *others[2:], is_lasting=False)

    def add_dense(self, reason: str) -> None:
        places = torch.arange(len(DENSE_REASONS), device=self.dense_calls.device)
        self._set("dense_calls", self.dense_calls + (places == DENSE_REASONS.index(reason)))

    def add_sparse(self, kept: torch.Tensor, visible: torch.Tensor) -> None:
        """Kept blocks of each head, int64 [Hq], and visible blocks of one head, int64 []."""
        self._set("sparse_calls", self.sparse_calls + 1)
        self._set("kept", self.kept + kept)
        self._set("visible", self.visible + visible)

    def add_audit(self, dropped: torch.Tensor) -> None:
        """``RowAudit.dropped`` of one call."""
        self._set("audit", audits_together(self.audit, dropped))

    def was_called(self) -> bool:
        """Whether anything was counted; waits for the device."""
        return bool(self.sparse_calls > 0) or bool(self.dense_calls.any())

    def dense_calls_by_reason(self) -> Counter:
        """Waits for the device."""
        return Counter({reason: count for reason, count in zip(DENSE_REASONS, self.dense_calls.tolist(), strict=True) if count})

    def _set(self, name: str, counts: torch.Tensor) -> None:
        if self.is_lasting:
            getattr(self, name).copy_(counts)
        else:
            setattr(self, name, counts)


def audits_together(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``RowAudit.dropped`` of two parts, float32 [3]: sum of the mean dropped shares, number of calls, largest share."""
    return torch.cat([first[:2] + second[:2], torch.maximum(first[2:], second[2:])])
