"""Memory for the results of a call, with zeros where a padded row has no query."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...geometry import PrefillGeometry
from .primitives import launch_context, row_span

# Tokens, and numbers of each, that one program writes at a time.
TOKENS, WIDTH = 16, 1024


@triton.jit(do_not_specialize=["kv_len", "query_len", "query_offset", "width"])
def _clear_padding_kernel(
    output_ptr,
    ranges_ptr,
    kv_len,
    query_len,
    query_offset,
    width,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: zeros in those of TOKENS tokens, ``width`` numbers each, that are outside of their row's valid range."""
    first, batch = tl.program_id(0) * TOKENS, tl.program_id(1)
    start, query_begin, query_end, _ = row_span(ranges_ptr, batch, query_offset, query_len, kv_len, True)
    first_query = start + query_begin - query_offset
    end = start + query_end - query_offset
    if (first < first_query) | (first + TOKENS > end):
        token = first + tl.arange(0, TOKENS)
        is_padding = (token < query_len) & ((token < first_query) | (token >= end))
        rows = output_ptr + (batch.to(tl.int64) * query_len + token) * width
        for column in range(0, width, WIDTH):
            columns = column + tl.arange(0, WIDTH)
            zeros = tl.zeros((TOKENS, WIDTH), output_ptr.dtype.element_ty)
            tl.store(rows[:, None] + columns[None, :], zeros, mask=is_padding[:, None] & (columns < width)[None, :])


def new_output(query: torch.Tensor, geometry: PrefillGeometry) -> torch.Tensor:
    """For the results of queries [B, Hq, Sq, D]: as many numbers, a view of [B, Sq, Hq, D] memory. Zeros for queries outside
    their row's valid range, the others are to be written."""
    batch, heads, query_len, head_dim = query.shape
    output = torch.empty(batch, query_len, heads, head_dim, dtype=query.dtype, device=query.device)
    if geometry.valid_ranges is not None:
        # Zeros everywhere took 0.63 ms of 26 for two rows of 128K tokens, half of one of them padding (H200, 32 heads, head_dim
        # 128, bfloat16).
        with launch_context(query):
            _clear_padding_kernel[triton.cdiv(query_len, TOKENS), batch](
                output,
                geometry.valid_ranges,
                geometry.kv_len,
                query_len,
                geometry.query_offset,
                heads * head_dim,
                TOKENS=TOKENS,
                WIDTH=WIDTH,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return output.transpose(1, 2)
