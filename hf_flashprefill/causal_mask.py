"""What a patched model's attention layers get for a mask where the call is causal."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .fitting import UnsupportedModelError


class CausalMask(torch.Tensor):
    """Bool [B, valid length]: which of the keys before ``valid length`` are real tokens, one run per row.

    Its presence says that the call is causal with the query's end at ``valid length``. The class survives ``.to(device)``, so
    a mask that accelerate moves between devices is still known. Without padding it is one expanded True of no size.

    Attributes:
        sliding_window: How many tokens back a query sees, its own included: fewer than ``valid length``; None if all. It is
            the class that has it, see ``mask_class``: an attribute of the tensor would be lost with the first copy, and the
            mask would pass for one without a window.
        is_of_buffer: Whether layers hand over more keys than ``valid length``, the whole buffer of a static cache, of which the
            others are unused. It is the class that has it, too.
    """

    sliding_window: int | None = None
    is_of_buffer: bool = False

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
        if not _keeps_rows(function.__name__, result, args, kwargs) or result.dtype not in (torch.bool, _COUNTED_AS):
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

    def is_of(self, key: torch.Tensor) -> bool:
        """Whether it was made for as many keys as these, [B, Hkv, Skv, D]: caches of other layers may hold more or fewer."""
        # A graph finds the attribute at the class alone.
        return key.shape[2] > self.shape[1] if type(self).is_of_buffer else key.shape[2] == self.shape[1]

    def used(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys or values [B, Hkv, Skv, D] without those that a static cache has not filled."""
        return keys[:, :, : self.shape[1]] if type(self).is_of_buffer else keys

    def valid_ranges(self) -> torch.Tensor | None:
        """int32 [B, 2] as flash_prefill_attention takes them, or None when nothing is padding. Never waits."""
        padding = self.padding()
        return None if padding is None else runs_of(padding)[0]

    def padding(self) -> torch.Tensor | None:
        """The mask as a plain tensor, or None when nothing is padding."""
        return _as_tensor(self) if self.is_padded() else None

    def is_padded(self) -> bool:
        """Whether any key may be padding; without a copy of the mask."""
        return self.stride(1) != 0


# In a graph of torch 2.11 what ``runs_of`` is given is a mask, not a plain tensor, and may be calculated with as these.
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


def _keeps_rows(name: str, result: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether every row of the result of a function is, whole, the mask of a row before."""
    if name in _ALONG:
        return (args[_ALONG[name]] if len(args) > _ALONG[name] else kwargs.get("dim")) == 0
    if name in ("view", "reshape"):
        # GPT-2 does so with every mask of fewer than four dimensions.
        return result.shape == args[0].shape
    if name == "__getitem__":
        return isinstance(args[1], slice) or (isinstance(args[1], torch.Tensor) and args[1].dim() == 1)
    return name in _WHOLE


@functools.cache
def mask_class(sliding_window: int | None, is_of_buffer: bool = False) -> type[CausalMask]:
    """CausalMask, or its subclass for one sliding window, for a static cache, or both."""
    if sliding_window is None and not is_of_buffer:
        return CausalMask
    return type("OtherCausalMask", (CausalMask,), {"sliding_window": sliding_window, "is_of_buffer": is_of_buffer})


# No class method: a graph of torch 2.15 does not follow one of a class that it got from _constant_mask_class.
def without_padding(marker: type[CausalMask], batch: int, valid_length: int, device: torch.device | str) -> CausalMask:
    """A mask [batch, valid_length] of class ``marker`` with nothing but real tokens, one expanded True."""
    return torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch, valid_length).as_subclass(marker)


def _as_tensor(mask: torch.Tensor) -> torch.Tensor:
    """A copy without the class and with memory of its own. A graph cannot trace ``as_subclass(torch.Tensor)``."""
    with torch._C.DisableTorchFunctionSubclass():
        return mask.clone(memory_format=torch.contiguous_format)


def runs_of(padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-after-last real position per row, int32 [B, 2], and whether each row's tokens are one run."""
    real = padding.to(_COUNTED_AS)
    count = real.sum(1)
    first = real.argmax(1)
    last = padding.shape[1] - 1 - real.flip(1).argmax(1)
    ranges = torch.stack([first, first + count], 1).to(torch.int32)
    return ranges, ((last - first + 1 == count) | (count == 0)).all()
