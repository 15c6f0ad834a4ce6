"""The mask function transformers calls for a patched model.

For a causal call, with or without a sliding window, it answers with a CausalMask, which holds no more than which tokens are
real; for anything else with what the model's previous implementation would have got. Without a mask function of our own,
transformers would pass None everywhere, and padding, chunks, windows and static caches would be silently wrong.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch._guards import detect_fake_mode
from transformers import masking_utils
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    chunked_overlay,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from .causal_mask import CausalMask, mask_class, runs_of, without_padding
from .config import FlashPrefillConfig
from .crossover import is_long_enough, min_seq_len_of_model
from .fitting import UnsupportedModelError, cuts_masks, uses_interface


def prefill_mask(base: str, settings: FlashPrefillConfig, **arguments: Any) -> Any:
    """The mask of one forward pass; ``arguments`` are transformers' own and differ between its versions."""
    if isinstance(arguments.get("attention_mask"), CausalMask):
        # generate() makes a static cache's mask before the model asks for it. As transformers does with a 4-D mask, take
        # what is there: it may be cut to a window's keys already.
        return arguments["attention_mask"]
    mask = None
    # A non-strict export, torch.jit.trace and FakeTensorMode run this as it is, on tensors of which they can make no subclass.
    if torch.compiler.is_compiling():
        is_export = not torch.compiler.is_dynamo_compiling()
    else:
        is_export = torch.jit.is_tracing() or detect_fake_mode() is not None
    if not is_export and _device(arguments).type != "meta" and _is_long_enough(settings, arguments):
        mask = _compiled_mask(arguments) if torch.compiler.is_compiling() else _causal_mask(arguments)
    if mask is not None:
        return mask
    if cuts_masks(arguments.get("config")) and _query_span(arguments)[0] > 1:
        # No mask at all stands for queries that begin where the keys begin. The model knows that of "sdpa" by its name only.
        arguments["allow_is_causal_skip"] = False
    if is_flash(base) and arguments.get("attention_mask") is None:
        arguments["attention_mask"] = _mask_of_filled_keys(arguments)
    return base_mask(base, **arguments)


def is_flash(base: str) -> bool:
    """Whether an implementation is flash attention, or a kernel of the hub, which transformers calls as such."""
    return "flash" in base or "/" in base


def _mask_of_filled_keys(arguments: dict[str, Any]) -> torch.Tensor | None:
    """Ones for the keys that a static cache has, [B, filled]; None for other keys.

    Flash attention tells by the length of such a mask which keys to attend; ``generate`` drops a mask of ones, unless it knows
    the model's attention for flash.
    """
    query_length, query_offset = _query_span(arguments)
    if arguments["kv_length"] == query_length or _device(arguments).type == "meta":
        return None
    filled = int(query_offset) + query_length
    if filled >= arguments["kv_length"] + int(arguments.get("kv_offset", 0)):
        return None
    return torch.ones(arguments["batch_size"], filled, dtype=torch.bool, device=_device(arguments))


def prefill_mask_by_name(base: str, settings: FlashPrefillConfig, **arguments: Any) -> Any:
    """``prefill_mask`` for a model that was loaded by the name of ``register_attention`` and that nobody has looked at.

    Raises:
        UnsupportedModelError: Its attention does not go through the AttentionInterface; it would add to its scores, or leave
            out, a mask that is made for another attention.
    """
    config = arguments.get("config")
    # A model of several parts (PaliGemma) may have all of its attention in files of theirs.
    parts = [] if config is None else [type(config), *config.sub_configs.values()]
    if parts and not any(uses_interface(part.__module__) for part in parts):
        name = type(config).__name__
        raise UnsupportedModelError(f"the model of {name}: its attention does not go through transformers' AttentionInterface")
    return prefill_mask(base, settings, **arguments)


def _is_long_enough(settings: FlashPrefillConfig, arguments: dict[str, Any]) -> bool:
    """Whether any layer may run sparse. What is decided here too early, the layers decide once more."""
    query_length, query_offset = _query_span(arguments)
    if query_length == 1:
        return False
    reaches = functools.partial(is_long_enough, settings, _min_seq_len(settings, arguments), query_length)
    if reaches(query_length):
        return True
    # Where the queries stand may be a number on the device. Only a call whose keys may suffice need wait for it.
    if not reaches(arguments["kv_length"]) or is_captured(query_offset):
        return False
    return reaches(query_length + int(query_offset) - int(arguments.get("kv_offset", 0)))


def is_captured(number: Any) -> bool:
    """Whether a number is on a device whose work a CUDA graph captures, so that it cannot be read."""
    return isinstance(number, torch.Tensor) and number.is_cuda and torch.cuda.is_current_stream_capturing()


def _min_seq_len(settings: FlashPrefillConfig, arguments: dict[str, Any]) -> int:
    """Tokens; no more than any layer needs to run sparse."""
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
    return None if function is None else function(**arguments)


def base_mask_for(base: str, mask: CausalMask, query: torch.Tensor, config: Any) -> Any:
    """The mask that implementation ``base`` needs for the causal call that ``mask`` describes.

    A static cache's keys must have been cut to the mask's length first.
    """
    (batch, valid_length), query_length = mask.shape, query.shape[2]
    offset, window = valid_length - query_length, type(mask).sliding_window
    arguments = {
        "batch_size": batch,
        "kv_length": valid_length,
        "kv_offset": 0,
        "mask_function": causal_mask_function if window is None else sliding_window_causal_mask_function(window),
        "local_size": window,
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


def _compiled_mask(arguments: dict[str, Any]) -> CausalMask | None:
    """The marker for a causal call, as far as it is known without reading a tensor, which a graph cannot do."""
    query_length, query_offset = _query_span(arguments)
    if arguments.get("attention_mask") is not None or isinstance(query_offset, torch.Tensor):
        return None
    plain_up_to, window = _compiled_locality(arguments)
    valid_length = query_offset + query_length
    if _is_nonzero(arguments.get("kv_offset", 0)) or (valid_length > plain_up_to and window is None):
        return None
    if arguments["kv_length"] != valid_length:
        return None
    marker = CausalMask if valid_length <= plain_up_to else _constant_mask_class(window)
    return without_padding(marker, arguments["batch_size"], valid_length, arguments["device"])


def _compiled_locality(arguments: dict[str, Any]) -> tuple[float, int | None]:
    """``_locality`` without looking into a closure, which a graph cannot do.

    transformers allows the mask to be skipped only if it put nothing around the window, and the config tells a window from
    chunks.
    """
    function, local_size = arguments.get("mask_function", causal_mask_function), arguments.get("local_size")
    if function is causal_mask_function and local_size is None:
        return math.inf, None
    config = arguments["config"]
    is_window = (
        _is_made_by(function, _BOTH)
        and arguments.get("allow_is_causal_skip", False)
        and local_size == getattr(config, "sliding_window", None)
        and getattr(config, "attention_chunk_size", None) is None
    )
    return (local_size, local_size) if is_window else (0, None)


# A graph cannot make a class.
@torch._dynamo.assume_constant_result
def _constant_mask_class(sliding_window: int) -> type[CausalMask]:
    return mask_class(sliding_window)


def _is_nonzero(value: Any) -> bool:
    return bool(value != 0)


def _locality(arguments: dict[str, Any]) -> tuple[float, int | None]:
    """The length up to which the asked for mask is plain causal: a window or chunk size, infinity, or 0 for any other mask;
    and the sliding window that cuts it from there on, None if something else does."""
    local_size = arguments.get("local_size")
    function = _without_empty_overlays(arguments.get("mask_function", causal_mask_function))
    if function is causal_mask_function:
        return (math.inf if local_size is None else local_size), None
    # A window or chunks over causal, and nothing more; packed sequences and image blocks wrap this in functions of their own.
    parts = [_without_empty_overlays(part) for part in _parts_of(function, _BOTH)]
    overlays = [part for part in parts if part is not causal_mask_function]
    if len(parts) != 2 or len(overlays) != 1:
        return 0, None
    if _is_made_by(overlays[0], _CHUNKED):
        return local_size or 0, None
    if not _is_made_by(overlays[0], _SLIDING):
        return 0, None
    (window,) = (cell.cell_contents for cell in overlays[0].__closure__)
    return (window, window) if local_size in (None, window) else (0, None)


def _is_made_by(function: Any, example: Any) -> bool:
    """Whether a mask function comes from the function of transformers that made the example."""
    return getattr(function, "__code__", None) is example.__code__


def _parts_of(function: Any, combination: Any) -> tuple:
    """The mask functions of which another is made as the example is; none if it is not."""
    return function.__closure__[0].cell_contents if _is_made_by(function, combination) else ()


def _without_empty_overlays(function: Any) -> Any:
    """A mask function without what would join the tokens of each image, where there is no image: Gemma 3's processor has types
    of tokens for every prompt. Waits for the device once for each such overlay."""
    if _BLOCKWISE is None:
        return function
    parts = [part for part in _parts_of(function, _EITHER) if not _is_empty_overlay(part)]
    return parts[0] if len(parts) == 1 else function


def _is_empty_overlay(function: Any) -> bool:
    if not _is_made_by(function, _BLOCKWISE):
        return False
    (blocks,) = (cell.cell_contents for cell in function.__closure__)
    return not is_captured(blocks) and not bool((blocks >= 0).any())


_BOTH, _EITHER = sliding_window_causal_mask_function(1), masking_utils.or_masks(causal_mask_function)
_SLIDING, _CHUNKED = sliding_window_overlay(1), chunked_overlay(1, torch.zeros(1, dtype=torch.int64))
# Since transformers 5.
_BLOCKWISE = masking_utils.blockwise_overlay(torch.zeros(1, 1)) if hasattr(masking_utils, "blockwise_overlay") else None


# After a graph break dynamo would compile this alone, though it was called because nothing is being compiled.
@torch.compiler.disable
def _causal_mask(arguments: dict[str, Any]) -> CausalMask | None:
    """The marker for a causal call; None if the mask asked for is another or the padding is not one run of tokens per row."""
    query_length, query_offset = _query_span(arguments)
    plain_up_to, window = _locality(arguments)
    if query_length > plain_up_to and window is None:
        return None
    # The keys of a sliding-window layer's cache start where its oldest token stands; what came before is gone. From here
    # on, positions are counted from there, which neither causality nor a window notices.
    key_offset = int(arguments.get("kv_offset", 0))
    valid_length = int(query_offset) + query_length - key_offset
    if valid_length <= plain_up_to:
        window = None
    elif window is None:
        return None
    key_length = int(arguments["kv_length"])
    if key_length < valid_length or (key_offset and (window is None or key_length != valid_length)):
        return None
    marker = mask_class(window, key_length > valid_length)
    padding = arguments.get("attention_mask")
    if padding is None:
        return without_padding(marker, arguments["batch_size"], valid_length, _device(arguments))
    if padding.dim() != 2 or padding.shape[1] < key_offset + valid_length:
        return None
    padding = padding[:, key_offset : key_offset + valid_length].contiguous()
    whole, one_run = torch.stack([padding.all(), runs_of(padding)[1]]).tolist()
    if whole:
        return without_padding(marker, len(padding), valid_length, padding.device)
    return padding.as_subclass(marker) if one_run else None
