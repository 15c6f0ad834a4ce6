"""Which kernels ``warmup`` would compile and which prompts would, without a GPU: a JSON line per selector and head_dim.

``python -m tests.specialisations`` asks Triton for the key under which it would look up each launch's compiled kernel, and
launches nothing. Only Hopper is played; on other GPUs fewer kernels tell tensors apart.
"""

from __future__ import annotations

import json

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_flashprefill import BlockIndex, FlashPrefillConfig, flash_prefill_attention, warming
from hf_flashprefill.backends import triton as triton_backend
from hf_flashprefill.backends.triton import (
    attend,
    attend_hopper,
    energies,
    energies_hopper,
    energy_lists,
    probe,
    probe_hopper,
    shares,
)
from hf_flashprefill.crossover import LayerShape
from tests.compile_kernels import OfflineDriver

HEADS, KEY_HEADS = 32, 8
# Query and key lengths in tokens: whole prompts, and chunks after a cache, of every divisibility.
PROMPTS = [(1000, 1000), (1001, 1001), (4096, 4096), (513, 8193), (2048, 131072), (65536, 65536)]


class KeysOnly:
    """Collects the name of each kernel that would be compiled, with its key."""

    def __init__(self):
        self.keys: set[tuple[str, str]] = set()

    def method(self):
        """To stand in for JITFunction._do_compile."""

        def collect(kernel, key, *args, **kwargs) -> None:
            # A run that gets no compiled kernel launches nothing.
            self.keys.add((kernel.__name__, key))

        return collect


def attend_with_both(query, key, value, index, *, scale, output, **terms) -> None:
    """In place of the choice between the portable and the Hopper kernel, which goes by where the tensors are."""
    attend.attend_blocks(query, key, value, index, scale=scale, output=output, **terms)
    further = {name: term for name, term in terms.items() if term is not None}
    if further.keys() <= {"means", "sinks"} and attend_hopper.fits(query, key, value, index.geometry.block_size):
        attend_hopper.attend_blocks(query, key, value, index, scale=scale, output=output, **further)


def select_energies_with_both(query, means, geometry, **rule) -> BlockIndex:
    """In place of the choice between the portable and the Hopper kernel of the published rule."""
    for scoring in (energies, energies_hopper):
        if scoring is energies or energies_hopper.fits(query, geometry.block_size):
            energy_lists._scoring = lambda *_, chosen=scoring: chosen
            index = energy_lists.select_energies(query, means, geometry, **rule)
    return index


def select_shares_with_both(query, pooled, geometry, *, query_stride, **rule) -> BlockIndex:
    """In place of the choice between the portable and the Hopper probe."""
    for probing in (probe, probe_hopper):
        if probing is probe or probe_hopper.fits(query, geometry.block_size, query_stride):
            shares._probing = lambda *_, chosen=probing: chosen
            index = shares.select_shares(query, pooled, geometry, query_stride=query_stride, **rule)
    return index


def prompt(shape: LayerShape, query_len: int, kv_len: int, batch: int, is_padded: bool, is_cached: bool, config) -> None:
    """One operator call with tensors as transformers hands them over; without a cache keys lie as queries do."""
    query = torch.empty(batch, query_len, shape.heads, shape.head_dim, dtype=shape.dtype).transpose(1, 2)
    if is_cached:
        key, value = torch.empty(2, batch, shape.kv_heads, kv_len, shape.head_dim, dtype=shape.dtype).unbind()
    else:
        key, value = torch.empty(2, batch, kv_len, shape.kv_heads, shape.head_dim, dtype=shape.dtype).transpose(2, 3).unbind()
    ranges = torch.tensor([[3, kv_len]] * batch, dtype=torch.int32) if is_padded else None
    flash_prefill_attention(query, key, value, config=config, valid_ranges=ranges)


def missed(selector: str, head_dim: int, dtype: torch.dtype) -> dict:
    """How many kernels a warm-up compiles, and the names of those that prompts would compile in addition."""
    config = FlashPrefillConfig(selector=selector, backend="triton")
    shape = LayerShape(HEADS, KEY_HEADS, head_dim, dtype)
    warmed = KeysOnly()
    JITFunction._do_compile = warmed.method()
    for call in warming._situations(config.block_size).values():
        warming._first_call_s(warming.LayerKind(shape, torch.device("cpu")), config, *call)
    met = KeysOnly()
    JITFunction._do_compile = met.method()
    for query_len, kv_len in PROMPTS:
        for is_padded in (False, True):
            for is_cached in (False, True) if query_len == kv_len else (True,):
                for batch in (1, 2) if kv_len < 10_000 else (1,):
                    prompt(shape, query_len, kv_len, batch, is_padded, is_cached, config)
    return {"warmed": len(warmed.keys), "met": len(met.keys), "missed": sorted({name for name, _ in met.keys - warmed.keys})}


if __name__ == "__main__":
    driver.set_active(OfflineDriver(90))
    triton_backend.obstacle = lambda query: None
    triton_backend.attend_blocks = attend_with_both
    triton_backend.select_energies = select_energies_with_both
    triton_backend.select_shares = select_shares_with_both
    for name, dim, kind in (
        ("blend", 80, torch.bfloat16),
        ("blend", 128, torch.bfloat16),
        ("share", 64, torch.float32),
        ("flashprefill", 128, torch.bfloat16),
    ):
        print(json.dumps({"selector": name, "head_dim": dim} | missed(name, dim, kind)), flush=True)
