"""Keys and values of one row out of pages, in one launch that is bound by memory bandwidth.

Each program reads keys and values of the same tokens: where a cache keeps them side by side, whole lines are used.
Letters: P pages, N tokens per page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .primitives import launch_context, padded_head_dim

# Numbers per program and tensor: with four warps, eight pieces of 16 bytes per thread are on their way at once.
TILE = 8192


@triton.jit(do_not_specialize=["seq_len"])
def _gather_pages_kernel(
    key_ptr,
    value_ptr,
    table_ptr,
    output_ptr,
    seq_len,
    stride_kp: tl.int64,
    stride_kn: tl.int64,
    stride_kh: tl.int64,
    stride_vp: tl.int64,
    stride_vn: tl.int64,
    stride_vh: tl.int64,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: TOKENS keys and values of one head."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.arange(0, BLOCK_D)
    is_token = tokens < seq_len
    page = tl.load(table_ptr + tokens // PAGE, mask=is_token, other=0).to(tl.int64)
    within = tokens % PAGE
    is_used = is_token[:, None] & (channels < HEAD_DIM)[None, :]
    key_rows = key_ptr + page * stride_kp + within * stride_kn + head * stride_kh
    value_rows = value_ptr + page * stride_vp + within * stride_vn + head * stride_vh
    keys = tl.load(key_rows[:, None] + channels[None, :], mask=is_used)
    values = tl.load(value_rows[:, None] + channels[None, :], mask=is_used)
    row = head.to(tl.int64) * seq_len + tokens
    target = output_ptr + row[:, None] * HEAD_DIM + channels[None, :]
    tl.store(target, keys, mask=is_used)
    tl.store(target + heads.to(tl.int64) * seq_len * HEAD_DIM, values, mask=is_used)


def gather_pages(
    key_pages: torch.Tensor, value_pages: torch.Tensor, block_table: torch.Tensor, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``seq_len`` tokens of one row: keys and values, each [1, Hkv, S, D], contiguous.

    Args:
        key_pages: [P, N, Hkv, D], any strides but a last one of 1.
        value_pages: The same shape and dtype.
        block_table: Integers [at least ceil(S / N)] on the pages' device, page numbers in the order of the tokens.
        seq_len: S, tokens, at least 1.
    """
    page, heads, head_dim = key_pages.shape[1:]
    output = torch.empty(2, 1, heads, seq_len, head_dim, dtype=key_pages.dtype, device=key_pages.device)
    block_d = padded_head_dim(head_dim)
    tokens = TILE // block_d
    with launch_context(key_pages):
        _gather_pages_kernel[triton.cdiv(seq_len, tokens), heads](
            key_pages,
            value_pages,
            block_table.contiguous(),
            output,
            seq_len,
            *key_pages.stride()[:3],
            *value_pages.stride()[:3],
            PAGE=page,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            TOKENS=tokens,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output[0], output[1]
