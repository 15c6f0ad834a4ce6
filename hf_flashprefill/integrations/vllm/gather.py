"""Keys and values of one row out of vLLM's paged cache.

The kernels read contiguous keys, so a row's pages are copied once per layer and step: 2 * Hkv * S * D elements for a
sequence of S tokens. Letters: P pages, N tokens per page.
"""

from __future__ import annotations

import torch


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


def gather_row(pages: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> torch.Tensor:
    """The first ``seq_len`` tokens of one row: [1, Hkv, S, D], a view of [pages, N, Hkv, D] memory of its own.

    Nothing waits for the device: how many pages there are follows from ``seq_len``.

    Args:
        pages: [P, N, Hkv, D], any strides.
        block_table: Integers [at least ceil(S / N)] on the pages' device, page numbers in the order of the tokens.
        seq_len: S, tokens.
    """
    count = -(-seq_len // pages.shape[1])
    return pages.index_select(0, block_table[:count]).flatten(0, 1)[:seq_len].transpose(0, 1)[None]
