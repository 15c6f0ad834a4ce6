"""The mask function transformers calls for a patched model.

For a plain causal call it answers with a PlainCausalMask, which holds no more than which tokens are real; for anything
else with what the model's previous implementation would have got. Without a mask function of our own, transformers would
pass None everywhere, and padding, chunks and static caches would be silently wrong.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    chunked_overlay,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from .config import FlashPrefillConfig
from .crossover import min_seq_len_of_model


class PlainCausalMask(torch.Tensor):
    """Bool [B, valid length]: which of the keys before ``valid length`` are real tokens, one run per row.

    Its presence says that the call is plain causal with the query's end at ``valid length``; keys after that are unused
    cache. The class survives ``.to(device)``, so a mask that accelerate moves between devices is still known. Without
    padding it is one expanded True of no size.
    """

    @classmethod
    def without_padding(cls, batch: int, valid_length: int, device: torch.device | str) -> PlainCausalMask:
        return torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch, valid_length).as_subclass(cls)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ``Tensor.to``; a copy of an expanded tensor is filled in, so what says that nothing is padding is put back."""
        moved = super().to(*args, **kwargs)
        return moved[:, :1].expand(self.shape) if self.stride(1) == 0 and moved.stride(1) != 0 else moved

    def valid_ranges(self) -> torch.Tensor | None:
        """int32 [B, 2] as flash_prefill_attention takes them, or None when nothing is padding. Never waits."""
        padding = self.padding()
        return None if padding is None else _runs(padding)[0]

    def padding(self) -> torch.Tensor | None:
        """The mask as a plain tensor, or None when nothing is padding."""
        return None if self.stride(1) == 0 else _as_tensor(self)


def prefill_mask(base: str, settings: FlashPrefillConfig, **arguments: Any) -> Any:
    """The mask of one forward pass; ``arguments`` are transformers' own and differ between its versions."""
    query_length, query_offset = _query_span(arguments)
    plain = (
        query_length > 1
        and query_length >= _min_seq_len(settings, arguments)
        and query_length <= _causal_up_to(arguments)
        and not _is_nonzero(arguments.get("kv_offset", 0))
    )
    mask = None
    if plain:
        mask = _compiled_mask(arguments) if torch.compiler.is_compiling() else _plain_mask(arguments)
    return base_mask(base, **arguments) if mask is None else mask


def _min_seq_len(settings: FlashPrefillConfig, arguments: dict[str, Any]) -> int:
    """Tokens; no more than any layer needs to run sparse. What is decided here too early, the layers decide once more."""
    model_config, device = arguments.get("config"), _device(arguments)
    dtype = arguments.get("dtype") or getattr(model_config, "dtype", None) or torch.get_default_dtype()
    return min_seq_len_of_model(settings, model_config, dtype, device)


def _device(arguments: dict[str, Any]) -> torch.device:
    device = arguments.get("device")
    if device is None:
        device = arguments["cache_position"].device if "cache_position" in arguments else "cpu"
    return torch.device(device)


def base_mask(base: str, **arguments: Any) -> Any:
    """What the implementation ``base`` would have got from transformers."""
    function = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.get(base)
    if isinstance(arguments.get("attention_mask"), PlainCausalMask):
        # Whatever is computed from a mask of ours must not pass for one.
        arguments["attention_mask"] = _as_tensor(arguments["attention_mask"])
    return None if function is None else function(**arguments)


def base_mask_for(base: str, mask: PlainCausalMask, query: torch.Tensor, config: Any) -> Any:
    """The mask that implementation ``base`` needs for the plain causal call that ``mask`` describes.

    Keys must have been cut to the mask's length first.
    """
    (batch, valid_length), query_length = mask.shape, query.shape[2]
    offset = valid_length - query_length
    arguments = {
        "batch_size": batch,
        "kv_length": valid_length,
        "kv_offset": 0,
        "mask_function": causal_mask_function,
        "attention_mask": mask.padding(),
        "allow_is_causal_skip": True,
        "dtype": query.dtype,
        "config": config,
    }
    if _TAKES_CACHE_POSITION:
        arguments["cache_position"] = torch.arange(offset, valid_length, device=query.device)
    else:
        arguments |= {"q_length": query_length, "q_offset": offset, "device": query.device}
    return base_mask(base, **arguments)


# Up to transformers 5.3 the mask functions take the queries' positions as a tensor, since 5.4 as a length and an offset.
_TAKES_CACHE_POSITION = "cache_position" in ALL_MASK_ATTENTION_FUNCTIONS["sdpa"].__code__.co_varnames[:2]


def _query_span(arguments: dict[str, Any]) -> tuple[int, Any]:
    if "cache_position" in arguments:
        positions = arguments["cache_position"]
        return positions.shape[0], positions[0]
    return arguments["q_length"], arguments.get("q_offset", 0)


def _compiled_mask(arguments: dict[str, Any]) -> PlainCausalMask | None:
    """The marker for a plain causal call, as far as it is known without reading a tensor, which a graph cannot do."""
    query_length, query_offset = _query_span(arguments)
    padding = arguments.get("attention_mask")
    if isinstance(padding, PlainCausalMask):
        # generate() makes a static cache's mask outside of the graph.
        return padding
    if padding is not None or isinstance(query_offset, torch.Tensor):
        return None
    return PlainCausalMask.without_padding(arguments["batch_size"], query_offset + query_length, arguments["device"])


def _is_nonzero(value: Any) -> bool:
    return bool(value != 0)


def _causal_up_to(arguments: dict[str, Any]) -> float:
    """The length up to which the asked for mask is plain causal: a window or chunk size, infinity, or 0 for any other mask."""
    function, local_size = arguments.get("mask_function", causal_mask_function), arguments.get("local_size")
    if function is causal_mask_function:
        return math.inf if local_size is None else local_size
    # A window or chunks over causal, and nothing more; packed sequences and image blocks wrap this in functions of their own.
    # While compiling, functions cannot be looked into.
    if local_size is None or torch.compiler.is_compiling() or getattr(function, "__code__", None) is not _WINDOWED.__code__:
        return 0
    parts = function.__closure__[0].cell_contents
    overlay_is_local = len(parts) == 2 and getattr(parts[0], "__code__", None) in _OVERLAYS
    return local_size if overlay_is_local and parts[1] is causal_mask_function else 0


_WINDOWED = sliding_window_causal_mask_function(1)
_OVERLAYS = (sliding_window_overlay(1).__code__, chunked_overlay(1, torch.zeros(1, dtype=torch.int64)).__code__)


# After a graph break dynamo would compile this alone, though it was called because nothing is being compiled.
@torch.compiler.disable
def _plain_mask(arguments: dict[str, Any]) -> PlainCausalMask | None:
    """The marker for a plain causal call; None if a window cuts it or the padding is not one run of tokens per row."""
    query_length, query_offset = _query_span(arguments)
    valid_length = int(query_offset) + query_length
    if valid_length > _causal_up_to(arguments):
        return None
    padding = arguments.get("attention_mask")
    if padding is None:
        return PlainCausalMask.without_padding(arguments["batch_size"], valid_length, _device(arguments))
    if padding.dim() != 2 or padding.shape[1] < valid_length:
        return None
    padding = _as_tensor(padding[:, :valid_length])
    whole, one_run = torch.stack([padding.all(), _runs(padding)[1]]).tolist()
    if whole:
        return PlainCausalMask.without_padding(len(padding), valid_length, padding.device)
    return padding.as_subclass(PlainCausalMask) if one_run else None


def _as_tensor(mask: torch.Tensor) -> torch.Tensor:
    """A copy without the class and with memory of its own. A graph cannot trace ``as_subclass(torch.Tensor)``."""
    with torch._C.DisableTorchFunctionSubclass():
        return mask.clone(memory_format=torch.contiguous_format)


def _runs(padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-after-last real position per row, int32 [B, 2], and whether each row's tokens are one run."""
    real = padding.to(torch.int32)
    count = real.sum(1)
    first = real.argmax(1)
    last = padding.shape[1] - 1 - real.flip(1).argmax(1)
    ranges = torch.stack([first, first + count], 1).to(torch.int32)
    return ranges, ((last - first + 1 == count) | (count == 0)).all()
