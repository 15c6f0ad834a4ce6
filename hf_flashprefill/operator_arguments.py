"""What the operator accepts, checked before anything is computed, and the form in which kernels read it."""

from __future__ import annotations

import math
import numbers

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .checks import is_number
from .geometry import PrefillGeometry

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def checked_geometry(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_size: int,
    query_offset: int | None,
    valid_ranges: torch.Tensor | None,
) -> PrefillGeometry:
    """Where queries and keys of a call stand, if its tensors fit; arguments and errors are those of the operator."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if is_traceable_wrapper_subclass(tensor):
            # A DTensor has no memory of its own, and a kernel would read whatever lies at address 0.
            raise TypeError(f"{name} must be a plain tensor, got {type(tensor).__name__}; of a DTensor pass to_local()")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [batch, heads, tokens, head_dim], got shape {_shape(tensor)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, got {tensor.device}")
    batch, heads, query_len, head_dim = query.shape
    if min(query.shape) < 1:
        raise ValueError(f"query must have at least one row, head, token and channel, got shape {_shape(query)}")
    key_heads, kv_len = key.shape[1:3]
    if key.shape[0] != batch or key.shape[-1] != head_dim:
        raise ValueError(f"key must match the query's batch {batch} and head_dim {head_dim}, got shape {_shape(key)}")
    if value.shape != key.shape:
        raise ValueError(f"value must have the key's shape {_shape(key)}, got {_shape(value)}")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"key must have a number of heads that divides the query's {heads}, got {key_heads}")
    if kv_len < query_len:
        raise ValueError(f"key must hold at least the query's {query_len} tokens, got {kv_len}")
    if query_offset is None:
        query_offset = kv_len - query_len
    elif not is_number(query_offset, numbers.Integral):
        raise TypeError(f"query_offset must be an int from 0 to {kv_len - query_len}, got {query_offset!r}")
    elif not 0 <= query_offset <= kv_len - query_len:
        raise ValueError(f"query_offset must be from 0 to {kv_len - query_len}, got {query_offset}")
    if valid_ranges is not None:
        if not isinstance(valid_ranges, torch.Tensor) or valid_ranges.dtype not in (torch.int32, torch.int64):
            raise TypeError("valid_ranges must be an int32 or int64 tensor [batch, 2]")
        if valid_ranges.shape != (batch, 2):
            raise ValueError(f"valid_ranges must have shape ({batch}, 2), got {_shape(valid_ranges)}")
        # The kernels read it as numbers side by side.
        valid_ranges = valid_ranges.to(device=query.device, dtype=torch.int32).contiguous()
    return PrefillGeometry(batch, query_len, kv_len, int(query_offset), block_size, valid_ranges)


def checked_window(sliding_window: int | None, kv_len: int) -> int | None:
    """The window, in tokens, if it hides any of the call's ``kv_len`` keys."""
    if sliding_window is None:
        return None
    if not is_number(sliding_window, numbers.Integral):
        raise TypeError(f"sliding_window must be an int >= 1 or None, got {sliding_window!r}")
    if sliding_window < 1:
        raise ValueError(f"sliding_window must be >= 1, got {sliding_window}")
    return int(sliding_window) if sliding_window < kv_len else None


def checked_sinks(sinks: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """float32 [Hq], side by side."""
    if not isinstance(sinks, torch.Tensor) or not sinks.is_floating_point():
        raise TypeError("sinks must be a floating-point tensor [heads]")
    if sinks.shape != query.shape[1:2] or sinks.device != query.device:
        raise ValueError(f"sinks must have shape ({query.shape[1]},) on {query.device}, got {_shape(sinks)} on {sinks.device}")
    return sinks.to(torch.float32).contiguous()


def checked_scale(scale: float) -> float:
    """As Python's own number, which alone kernels know."""
    if not is_number(scale, numbers.Real):
        raise TypeError(f"scale must be a finite number > 0, got {scale!r}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a finite number > 0, got {scale!r}")
    return float(scale)


def as_kernels_read(tensor: torch.Tensor) -> torch.Tensor:
    """With its channels side by side, and without torch's note that its numbers stand for their negatives."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
