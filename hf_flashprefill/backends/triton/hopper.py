"""Which calls the Gluon kernels for Hopper GPUs take: those that fit, where Triton has Gluon."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

from .primitives import compute_capability

# Head dims of which some Gluon kernel takes 16-bit queries.
_HEAD_DIMS = (64, 128, 256)
# What importing raised, by the module's name.
_import_errors: dict[str, str] = {}


def gluon_module(name: str) -> ModuleType | None:
    """The module ``name`` of this package, or None if it cannot be imported: Gluon is experimental in Triton and may move. The
    portable kernels compute the same."""
    try:
        return importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        _import_errors[name] = f"{type(error).__name__}: {error}"
        return None


def is_hopper(tensor: torch.Tensor) -> bool:
    """Whether the tensor is on a GPU of the generation that the Gluon kernels are for; the interpreter runs none of them."""
    return tensor.is_cuda and compute_capability(tensor)[0] == 9


def takes(kernel: ModuleType | None, query: torch.Tensor, *others: torch.Tensor | int) -> bool:
    """Whether the call is for ``kernel``, from ``gluon_module``, whose ``fits`` is asked with the arguments that follow it.

    Warns, once in a process, if a Hopper GPU does without because an import failed; not where a module was set to None since.
    """
    if not is_hopper(query):
        return False
    if kernel is not None:
        return kernel.fits(query, *others)
    if _import_errors and query.dtype != torch.float32 and query.shape[-1] in _HEAD_DIMS:
        _warn_once("; ".join(sorted(set(_import_errors.values()))))
    return False


@functools.cache
def _warn_once(errors: str) -> None:
    text = f"the kernels for Hopper GPUs cannot be imported, slower ones for all GPUs compute the same ({errors})"
    warnings.warn(text, stacklevel=2)
