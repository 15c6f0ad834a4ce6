"""Keys and values of one row out of vLLM's paged cache.

The kernels read contiguous keys, so a row's pages are copied once per layer and step: 2 * Hkv * S * D elements for a
sequence of S tokens. Letters: P pages, N tokens per page.
"""

from __future__ import annotations

import torch

from ...functional import TensorKind, triton_obstacle


def flash_pages(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [P, N, Hkv, D] of the key and value pages of a cache as vLLM's FlashAttention backend sees it.

    Args:
        kv_cache: [P, Hkv, N, 2 * D], keys before values in the last dimension; the order in memory is free.
        head_size: D.
    """
    key_pages, value_pages = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return key_pages, value_pages


def cpu_pages(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [P, N, Hkv, D] of the key and value pages of a cache as vLLM's CPU backend fills it on x86 in float32.

    In each page and head the keys stand before the values, and the keys are transposed.

    Args:
        kv_cache: [P, Hkv, N, 2 * D], contiguous.
        head_size: D.
    """
    pages, heads, tokens, _ = kv_cache.shape
    halves = kv_cache.view(pages, heads, 2, tokens * head_size)
    key_pages = halves[:, :, 0].unflatten(-1, (head_size, tokens)).permute(0, 3, 1, 2)
    value_pages = halves[:, :, 1].unflatten(-1, (tokens, head_size)).permute(0, 2, 1, 3)
    return key_pages, value_pages


def gather_row(
    key_pages: torch.Tensor, value_pages: torch.Tensor, block_table: torch.Tensor, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``seq_len`` tokens of one row: keys and values, each [1, Hkv, S, D] in memory of its own.

    Nothing waits for the device: how many pages there are follows from ``seq_len``.

    Args:
        key_pages: [P, N, Hkv, D], any strides.
        value_pages: The same shape, dtype and device.
        block_table: Integers [at least ceil(S / N)] on the pages' device, page numbers in the order of the tokens.
        seq_len: S, tokens, at least 1.
    """
    # The kernel copies pieces of the last dimension. Views that vLLM's NVIDIA backends give have it dense.
    is_dense = key_pages.stride(-1) == value_pages.stride(-1) == 1
    kind = TensorKind(key_pages.device, key_pages.dtype, key_pages.shape[-1:])
    if key_pages.is_cuda and is_dense and triton_obstacle(kind) is None:
        from ...backends.triton.gather import gather_pages

        return gather_pages(key_pages, value_pages, block_table, seq_len)
    pages = block_table[: -(-seq_len // key_pages.shape[1])]
    key, value = (
        source.index_select(0, pages).flatten(0, 1)[:seq_len].transpose(0, 1)[None] for source in (key_pages, value_pages)
    )
    return key, value
