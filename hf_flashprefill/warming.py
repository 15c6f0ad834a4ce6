"""What would otherwise happen inside the first prompt, done beforehand: kernels compiled, the crossover measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .checks import is_number
from .config import AUTO, FlashPrefillConfig
from .crossover import LayerShape, measure_crossover, min_seq_len_for
from .crossover.known import known_crossover, rule_of
from .crossover.measure import lengths_to_time
from .fitting import heads_of
from .functional import flash_prefill_attention, lacks_kernel
from .operator_arguments import DTYPES
from .patch import patched_config
from .seam import SeamPart


class LayerKind(NamedTuple):
    """What layers have in common that run the same kernels."""

    shape: LayerShape
    device: torch.device
    sliding_window: int | None = None
    has_sinks: bool = False

    def __str__(self) -> str:
        window = "" if self.sliding_window is None else f", sliding window {self.sliding_window}"
        return f"{self.shape}, {self.device}{window}{', attention sinks' if self.has_sinks else ''}"


@dataclass(frozen=True)
class LayerWarmup:
    """What ``warmup`` did for the layers of one kind.

    Attributes:
        kind: Shape, dtype and device of these layers, in words.
        first_call_s: Seconds of the first call of the operator in each situation, compiling included.
        min_seq_len: Tokens from which on these layers run sparse.
        crossover: Where that comes from: ``"given"`` by the settings, ``"measured"`` now, ``"known"`` from an earlier
            measurement on this machine, or ``"table"``.
    """

    kind: str
    first_call_s: dict[str, float]
    min_seq_len: int
    crossover: str


@dataclass(frozen=True)
class WarmupReport:
    """What ``warmup`` did. ``print`` it for a table."""

    layers: list[LayerWarmup]

    def __str__(self) -> str:
        lines = []
        for layer in self.layers:
            calls = ", ".join(f"{situation} {seconds:.2f} s" for situation, seconds in layer.first_call_s.items())
            lines.append(f"{layer.kind}\n  first calls: {calls}\n  sparse from {layer.min_seq_len} tokens ({layer.crossover})")
        return "\n".join(lines)


def warmup(model: nn.Module, max_seq_len: int | None = None, *, probe: bool = True) -> WarmupReport:
    """Compile now whatever the kernels of a patched model need, so that its first prompt does not wait for it.

    Runs the operator on small tensors of each kind of layer, on that layer's device: a whole prompt, a padded one, and a
    chunk after a cached prefix. Compiled kernels serve every length. With ``min_seq_len="auto"`` it also measures, if this
    machine has not yet, from which length on sparse prefill is faster, in seconds on a GPU, and keeps the answer in
    ``~/.cache/hf_flashprefill/crossover.json`` (``$HF_FLASHPREFILL_CACHE`` is another folder). The model, its statistics and
    torch's random numbers stay as they are. Call it before ``torch.compile``: a graph keeps the length it was traced with.

    Args:
        model: A patched model.
        max_seq_len: The longest prompt to come, tokens; longer ones are not timed. None for as far as a measurement goes,
            65536 tokens on a GPU and 16384 on a CPU.
        probe: Whether to measure.

    Returns:
        Seconds of each first call, and from which length on each kind of layer runs sparse.

    Raises:
        ValueError: The model is not patched, or ``max_seq_len`` is not a whole number >= 1.
    """
    config = patched_config(model)
    if config is None:
        raise ValueError(f"model must be patched, call patch_model first; got an unpatched {type(model).__name__}")
    if max_seq_len is not None and (not is_number(max_seq_len) or max_seq_len < 1):
        raise ValueError(f"max_seq_len must be a whole number >= 1 tokens or None, got {max_seq_len!r}")
    layers = []
    for kind in dict.fromkeys(_layer_kinds(SeamPart.of(model), config)):
        seconds = {name: _first_call_s(kind, config, *call) for name, call in _situations(config.block_size).items()}
        source = _crossover_source(kind, config, max_seq_len, probe)
        layers.append(LayerWarmup(str(kind), seconds, min_seq_len_for(config, kind.shape, kind.device), source))
    return WarmupReport(layers)


def _layer_kinds(part: SeamPart, config: FlashPrefillConfig) -> Iterator[LayerKind]:
    """The kind of every layer that can run sparse, as far as modules tell."""
    processes = getattr(part.model, "tp_size", None) or 1
    for module in part.attention_modules():
        dims = [getattr(module, name, None) for name in ("qk_head_dim", "head_dim", "head_size")]
        head_dim = next((dim for dim in dims if dim), None)
        heads = heads_of(module)
        if heads is None or module.layer_idx in config.dense_layers or getattr(module, "v_head_dim", head_dim) != head_dim:
            continue
        kv_heads = heads // getattr(module, "num_key_value_groups", 1)
        shards = processes if kv_heads % processes == 0 else 1
        device, dtype = _device_and_dtype(module, part.model)
        if head_dim is None or dtype not in DTYPES or device.type == "meta":
            continue
        if lacks_kernel(config.backend, device, dtype, head_dim):
            continue
        shape = LayerShape(heads // shards, kv_heads // shards, head_dim, dtype)
        windows = [getattr(module, "sliding_window", None)]
        if not hasattr(module, "sliding_window") and getattr(module.config, "sliding_window", None) is not None:
            # Mistral's and Phi-3's layers ask the config at each call. Shorter prompts have no window.
            windows.append(module.config.sliding_window)
        for window in windows:
            yield LayerKind(shape, device, window, getattr(module, "sinks", None) is not None)


def _device_and_dtype(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes, which offloaded weights do not tell but accelerate's hook does, and in which dtype, which
    quantised weights do not tell."""
    weights = list(module.parameters())
    floating = [weight.dtype for weight in weights if weight.is_floating_point() and weight.dtype in DTYPES]
    hooks = [getattr(child, "_hf_hook", None) for child in module.modules()]
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    device = torch.device(devices[0]) if devices else weights[0].device if weights else model.device
    return device, floating[0] if floating else model.dtype


def _situations(block_size: int) -> dict[str, tuple[int, int, bool]]:
    """Queries, keys, and whether the first tokens are padding. No multiples of a block, so that edges are met, too."""
    length = 4 * block_size + 1
    return {
        "whole prompt": (length, length, False),
        "padded prompt": (length, length, True),
        "chunk after a cache": (length, 2 * length, False),
        "padded chunk after a cache": (length, 2 * length, True),
    }


def _first_call_s(kind: LayerKind, config: FlashPrefillConfig, query_len: int, kv_len: int, is_padded: bool) -> float:
    shape, device = kind.shape, kind.device
    # Query as a projection leaves it, tokens before heads; key and value as a cache does.
    query = torch.zeros(1, query_len, shape.heads, shape.head_dim, dtype=shape.dtype, device=device).transpose(1, 2)
    key, value = torch.zeros(2, 1, shape.kv_heads, kv_len, shape.head_dim, dtype=shape.dtype, device=device).unbind()
    ranges = torch.tensor([[1, kv_len]], dtype=torch.int32, device=device) if is_padded else None
    sinks = torch.zeros(shape.heads, device=device) if kind.has_sinks else None
    # A window must be shorter than the keys to be one.
    window = None if kind.sliding_window is None else min(kind.sliding_window, kv_len - 1)
    started = time.perf_counter()
    flash_prefill_attention(query, key, value, config=config, valid_ranges=ranges, sliding_window=window, sinks=sinks)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _crossover_source(kind: LayerKind, config: FlashPrefillConfig, max_seq_len: int | None, probe: bool) -> str:
    """Measure the crossover if it is asked for and not known, and say where it comes from."""
    if config.min_seq_len != AUTO:
        return "given"
    lengths = lengths_to_time(kind.device, max_seq_len)
    known = known_crossover(rule_of(config), kind.shape, kind.device)
    if known is not None and (known.is_lasting or not lengths or known.longest >= lengths[-1]):
        return "known"
    if probe and lengths and config.backend != "reference":
        measure_crossover(kind.shape, kind.device, config, max_seq_len=max_seq_len)
        return "measured"
    return "table" if known is None else "known"
