"""Compile what whole calls launch on a GPU that need not be there, at head_dim: a JSON line per selector.

python -m tests.compile_calls 80 8
"""

from __future__ import annotations

import json
import sys

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention
from hf_flashprefill.backends import triton as triton_backend
from tests.compile_kernels import OfflineDriver


def compiled_by_call(head_dim: int, dtype: torch.dtype, selector: str) -> list[str]:
    """Names of the kernels that one call compiles, which it is kept from launching."""
    names, run = [], JITFunction.run

    def compile_only(kernel, *args, **options):
        names.append(kernel.__name__)
        return run(kernel, *args, **options | {"warmup": True})

    JITFunction.run = compile_only
    try:
        query, key, value = (torch.zeros(1, heads, 300, head_dim, dtype=dtype) for heads in (4, 2, 2))
        config = FlashPrefillConfig(selector=selector, backend="triton")
        flash_prefill_attention(query, key, value, config=config)
    finally:
        JITFunction.run = run
    return names


if __name__ == "__main__":
    driver.set_active(OfflineDriver(int(sys.argv[1])))
    triton_backend.obstacle = lambda query: None
    for name, kind in (("blend", torch.bfloat16), ("flashprefill", torch.float16)):
        print(json.dumps({"selector": name, "compiled": compiled_by_call(int(sys.argv[2]), kind, name)}), flush=True)
