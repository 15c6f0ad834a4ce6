"""Which blocks the lists leave out, as bits that a kernel can look up by the block's number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...block_index import BlockIndex
from .primitives import launch_context

# Words per list are a multiple of this, so that whatever looks up 128 blocks at once stays within the list's own.
WORDS = 4


@triton.jit(do_not_specialize=["width", "words"])
def _mark_kernel(indices_ptr, counts_ptr, marks_ptr, width, words, BLOCK_LIST: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """One program: the marks of one list. An empty list's are not written."""
    list_row = tl.program_id(0).to(tl.int64)
    indices_ptr += list_row * width
    marks_ptr += list_row * words
    count = tl.load(counts_ptr + list_row)
    if count > 0:
        own = tl.load(indices_ptr + count - 1)
        for first in range(0, words, BLOCK_WORDS):
            word = first + tl.arange(0, BLOCK_WORDS)
            # Bits from the own block's on; shifting by 32 or more is not defined.
            before = tl.minimum(tl.maximum(own - 32 * word, 0), 31)
            tl.store(marks_ptr + word, tl.where(own >= 32 * word + 32, 0, -1 << before), mask=word < words)
        tl.debug_barrier()
        for first in range(0, count, BLOCK_LIST):
            place = first + tl.arange(0, BLOCK_LIST)
            block = tl.load(indices_ptr + place, mask=place < count, other=0)
            tl.atomic_or(marks_ptr + block // 32, 1 << block % 32, mask=place < count)


def mark_kept(index: BlockIndex) -> torch.Tensor:
    """Bits, int32 [B, Hq, T, W]: 0 at blocks before the query block's own that its list drops, 1 at all others.

    Block j is bit j % 32 of word j // 32.
    """
    words = triton.cdiv(index.geometry.key_blocks, 32 * WORDS) * WORDS
    marks = torch.empty(*index.counts.shape, words, dtype=torch.int32, device=index.counts.device)
    with launch_context(marks):
        _mark_kernel[(index.counts.numel(),)](
            index.indices, index.counts, marks, index.indices.shape[-1], words, BLOCK_LIST=128, BLOCK_WORDS=32, num_warps=1
        )
    return marks
