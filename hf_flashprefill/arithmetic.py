"""How torch is to compute for us, whatever the caller has it do, and what helps where its numbers end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """For a ``with`` block, no gradients and no autocast, which would round what is meant to be multiplied in float32."""
    is_autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    with torch.no_grad(), torch.autocast(device.type, enabled=False) if is_autocast else contextlib.nullcontext():
        yield


def wider_dtypes(dtype: torch.dtype) -> str:
    """Names of those in which what is too large for ``dtype`` may be a number; "" if there are none."""
    return {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}.get(dtype, "")
