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
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    chunked_overlay,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from .config import FlashPrefillConfig
from .crossover import is_long_enough, min_seq_len_of_model
from .fitting import UnsupportedModelError, cuts_masks


class CausalMask(torch.Tensor):
    """Bool [B, valid length]: which of the keys before ``valid length`` are real tokens, one run per row.

    Its presence says that the call is causal with the query's end at ``valid length``; keys after that are unused cache. The
    class survives ``.to(device)``, so a mask that accelerate moves between devices is still known. Without padding it is
    one expanded True of no size.

    Attributes:
        sliding_window: How many tokens back a query sees, its own included: fewer than ``valid length``; None if all. It is
            the class that has it, see ``_mask_class``: an attribute of the tensor would be lost with the first copy, and the
            mask would pass for one without a window.
    """

    sliding_window: int | None = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """As ``Tensor``'s for what leaves every row the mask that it was; whoever calculates with it takes it for another mask.

        The last queries of one that is taken for a 4-D one, ``mask[:, :, -n:, :]``, end where all end, so that it stays what
        it is. A graph does not follow a ``__getitem__`` of ours.

        Raises:
            UnsupportedModelError: Anything else is to be done with the mask.
        """
        if function is torch.Tensor.__getitem__ and isinstance(args[1], tuple) and len(args[1]) == 4:
            batch, head, query, key = args[1]
            if batch == head == key == slice(None) and isinstance(query, slice) and query == slice(query.start, None):
                return args[0]
        if function is torch.Tensor.__setitem__:
            raise _none_to_calculate_with("__setitem__")
        kwargs = kwargs or {}
        if not _takes_mask(args, kwargs):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        result = super().__torch_function__(function, types, args, kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        if not _keeps_rows(function.__name__, args, kwargs) or result.dtype not in (torch.bool, _COUNTED_AS):
            raise _none_to_calculate_with(function.__name__)
        return result

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ``Tensor.to``; a copy of an expanded tensor is filled in, so what says that nothing is padding is put back."""
        moved = super().to(*args, **kwargs)
        if self.stride(1) != 0 or moved.stride(1) == 0:
            return moved
        with torch._C.DisableTorchFunctionSubclass():
            expanded = moved[:, :1].expand(self.shape)
        return expanded.as_subclass(type(self))

    def valid_ranges(self) -> torch.Tensor | None:
        """int32 [B, 2] as flash_prefill_attention takes them, or None when nothing is padding. Never waits."""
        padding = self.padding()
        return None if padding is None else _runs(padding)[0]

    def padding(self) -> torch.Tensor | None:
        """The mask as a plain tensor, or None when nothing is padding."""
        return None if self.stride(1) == 0 else _as_tensor(self)


# In a graph of torch 2.11 what ``_runs`` is given is a mask, not a plain tensor, and may be calculated with as these.
_COUNTED_AS = torch.int16


def _takes_mask(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a mask that is still one is among a function's arguments."""
    given = [*args, *kwargs.values()]
    given += [value for values in given if isinstance(values, list | tuple) for value in values]
    masks = [value for value in given if isinstance(value, CausalMask)]
    with torch._C.DisableTorchFunctionSubclass():
        return any(mask.dtype is torch.bool and mask.dim() == 2 for mask in masks)


def _none_to_calculate_with(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the attention mask of a patched model stands for a causal one and is none to calculate with, "
        f"but {name} was called on it; inside `with unpatched(model)` transformers makes a mask of the usual kind"
    )


# Functions of tensors that move or copy a mask whole, and those that choose or repeat rows, as beams and candidates want it, if
# they are told the first dimension, at this place of their arguments.
_WHOLE = ("__get__", "to", "clone", "contiguous", "cpu", "cuda", "detach", "pin_memory", "__deepcopy__", "as_subclass")
_ALONG = {"index_select": 1, "repeat_interleave": 2}


def _keeps_rows(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether every row of the result of a function is, whole, the mask of a row before."""
    if name in _ALONG:
        return (args[_ALONG[name]] if len(args) > _ALONG[name] else kwargs.get("dim")) == 0
    if name == "__getitem__":
        return isinstance(args[1], slice) or (isinstance(args[1], torch.Tensor) and args[1].dim() == 1)
    return name in _WHOLE


@functools.cache
def _mask_class(sliding_window: int | None) -> type[CausalMask]:
    """CausalMask, or its subclass for one sliding window."""
    if sliding_window is None:
        return CausalMask
    return type("WindowedCausalMask", (CausalMask,), {"sliding_window": sliding_window})


# No class method: a graph of torch 2.15 does not follow one of a class that it got from _constant_mask_class.
def _without_padding(marker: type[CausalMask], batch: int, valid_length: int, device: torch.device | str) -> CausalMask:
    return torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch, valid_length).as_subclass(marker)


def prefill_mask(base: str, settings: FlashPrefillConfig, **arguments: Any) -> Any:
    """The mask of one forward pass; ``arguments`` are transformers' own and differ between its versions."""
    if isinstance(arguments.get("attention_mask"), CausalMask):
        # generate() makes a static cache's mask before the model asks for it. As transformers does with a 4-D mask, take
        # what is there: it may be cut to a window's keys already.
        return arguments["attention_mask"]
    mask = None
    # A non-strict export and torch.jit.trace run this as it is, on tensors of which they can make no subclass.
    is_export = torch.jit.is_tracing() or (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling())
    if not is_export and _device(arguments).type != "meta" and _is_long_enough(settings, arguments):
        mask = _compiled_mask(arguments) if torch.compiler.is_compiling() else _causal_mask(arguments)
    if mask is not None:
        return mask
    if cuts_masks(arguments.get("config")) and _query_span(arguments)[0] > 1:
        # No mask at all stands for queries that begin where the keys begin. The model knows that of "sdpa" by its name only.
        arguments["allow_is_causal_skip"] = False
    return base_mask(base, **arguments)


def _is_long_enough(settings: FlashPrefillConfig, arguments: dict[str, Any]) -> bool:
    """Whether any layer may run sparse. What is decided here too early, the layers decide once more."""
    query_length, query_offset = _query_span(arguments)
    if query_length == 1:
        return False
    reaches = functools.partial(is_long_enough, settings, _min_seq_len(settings, arguments), query_length)
    if reaches(query_length):
        return True
    # Where the queries stand may be a number on the device. Only a call whose keys may suffice need wait for it.
    if not reaches(arguments["kv_length"]) or _is_captured(query_offset):
        return False
    return reaches(query_length + int(query_offset) - int(arguments.get("kv_offset", 0)))


def _is_captured(number: Any) -> bool:
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

    Keys must have been cut to the mask's length first.
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
    marker = CausalMask if valid_length <= plain_up_to else _constant_mask_class(window)
    return _without_padding(marker, arguments["batch_size"], valid_length, arguments["device"])


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
        getattr(function, "__code__", None) is _WINDOWED.__code__
        and arguments.get("allow_is_causal_skip", False)
        and local_size == getattr(config, "sliding_window", None)
        and getattr(config, "attention_chunk_size", None) is None
    )
    return (local_size, local_size) if is_window else (0, None)


# A graph cannot make a class.
@torch._dynamo.assume_constant_result
def _constant_mask_class(sliding_window: int) -> type[CausalMask]:
    return _mask_class(sliding_window)


def _is_nonzero(value: Any) -> bool:
    return bool(value != 0)


def _locality(arguments: dict[str, Any]) -> tuple[float, int | None]:
    """The length up to which the asked for mask is plain causal: a window or chunk size, infinity, or 0 for any other mask;
    and the sliding window that cuts it from there on, None if something else does."""
    function, local_size = arguments.get("mask_function", causal_mask_function), arguments.get("local_size")
    if function is causal_mask_function:
        return (math.inf if local_size is None else local_size), None
    # A window or chunks over causal, and nothing more; packed sequences and image blocks wrap this in functions of their own.
    if local_size is None or getattr(function, "__code__", None) is not _WINDOWED.__code__:
        return 0, None
    parts = function.__closure__[0].cell_contents
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return 0, None
    code = getattr(parts[0], "__code__", None)
    if code is _CHUNKED.__code__:
        return local_size, None
    is_window = code is _SLIDING.__code__ and parts[0].__closure__[0].cell_contents == local_size
    return (local_size, local_size) if is_window else (0, None)


_WINDOWED = sliding_window_causal_mask_function(1)
_SLIDING, _CHUNKED = sliding_window_overlay(1), chunked_overlay(1, torch.zeros(1, dtype=torch.int64))


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
    if key_offset and (window is None or valid_length != arguments["kv_length"]):
        return None
    marker = _mask_class(window)
    padding = arguments.get("attention_mask")
    if padding is None:
        return _without_padding(marker, arguments["batch_size"], valid_length, _device(arguments))
    if padding.dim() != 2 or padding.shape[1] < key_offset + valid_length:
        return None
    padding = padding[:, key_offset : key_offset + valid_length].contiguous()
    whole, one_run = torch.stack([padding.all(), _runs(padding)[1]]).tolist()
    if whole:
        return _without_padding(marker, len(padding), valid_length, padding.device)
    return padding.as_subclass(marker) if one_run else None


def _as_tensor(mask: torch.Tensor) -> torch.Tensor:
    """A copy without the class and with memory of its own. A graph cannot trace ``as_subclass(torch.Tensor)``."""
    with torch._C.DisableTorchFunctionSubclass():
        return mask.clone(memory_format=torch.contiguous_format)


def _runs(padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-after-last real position per row, int32 [B, 2], and whether each row's tokens are one run."""
    real = padding.to(_COUNTED_AS)
    count = real.sum(1)
    first = real.argmax(1)
    last = padding.shape[1] - 1 - real.flip(1).argmax(1)
    ranges = torch.stack([first, first + count], 1).to(torch.int32)
    return ranges, ((last - first + 1 == count) | (count == 0)).all()
