"""What several kernels share: Triton helpers, and the device a launch belongs to."""

import contextlib

import torch
import triton
import triton.language as tl

from ...probe_constants import QUERY_LEVELS, SMALLEST_STEP

# Attention whose sums of weights are below this has met no overflow in them, and may be divided by them: from 2^126 on the
# division says 0.
LARGEST_TOTAL = tl.constexpr(2.0**120)
# A sum of weights with the largest logit among them is 1 or more, unless that logit is so large that its rounding decides: see
# ``rounded_product``.
SMALLEST_TOTAL = tl.constexpr(2.0**-8)

# Added to a float32 below 2^22 in magnitude it leaves the nearest integer in the last bits, and taken away again that integer:
# instructions that round or convert are a quarter as fast as sums.
ROUNDING = tl.constexpr(1.5 * 2.0**23)
_QUERY_LEVELS, _SMALLEST_STEP = tl.constexpr(QUERY_LEVELS), tl.constexpr(SMALLEST_STEP)


@triton.jit
def row_span(ranges_ptr, batch, query_offset, query_len, kv_len, HAS_RANGES: tl.constexpr):
    """(start, query_begin, query_end, key_end) of one batch row, as geometry.RowSpan defines them."""
    if HAS_RANGES:
        start = tl.load(ranges_ptr + 2 * batch)
        end = tl.load(ranges_ptr + 2 * batch + 1)
        query_begin = tl.maximum(query_offset - start, 0)
        query_end = tl.maximum(tl.minimum(end, query_offset + query_len) - start, 0)
        key_end = tl.maximum(end - start, 0)
    else:
        start = 0
        query_begin = query_offset
        query_end = query_offset + query_len
        key_end = kv_len
    return start, query_begin, query_end, key_end


@triton.jit
def magnitudes(numbers):
    """Absolute values, and infinity for NaN, which a maximum would pass over."""
    size = tl.abs(numbers)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def integer_queries(queries):
    """reference.integer_queries of [rows, channels]: int8 [rows, channels] and steps, float32 [rows]."""
    queries = queries.to(tl.float32)
    steps = tl.maximum(tl.max(magnitudes(queries), 1) / _QUERY_LEVELS, _SMALLEST_STEP)
    integers = (queries * (1.0 / steps)[:, None] + ROUNDING).to(tl.int32, bitcast=True)
    return integers.to(tl.int8), tl.where(steps < float("inf"), steps, float("nan"))


if triton.knobs.runtime.interpret:

    @triton.jit
    def not_before(numbers):
        """The interpreter, which has no inline assembly, computes nothing before its turn anyway."""
        return numbers

    @triton.jit
    def rounded_product(numbers, factor):
        """The interpreter fuses nothing."""
        return numbers * factor

else:

    @triton.jit
    def not_before(numbers):
        """The same int32 numbers, of any shape, with which nothing is computed before this: what the compiler can compute early
        it keeps in registers that loops need. For the rows of results at head_dim 128 up to 32 bytes were spilled."""
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def rounded_product(numbers, factor):
        """float32 ``numbers``, of any shape, times a factor, rounded before anything is subtracted. Fused with the subtraction
        of its own rounded size, a logit of 2^31 (base 2) leaves up to 2^7, and its weight is infinite or lost."""
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [numbers, factor], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def bounded_sums(sums):
    """float32 sums of fewer than 2^31 weights, of which the largest is 1, where rounding leaves none of the largest logit but
    its size: from 2^28 on (base 2) that weight may come out as anything. NaN stays."""
    sums = tl.where(sums < 0.5, 1.0, sums)
    return tl.where(sums > 2147483648.0, 2147483648.0, sums)


@triton.jit
def append_kept(scores, blocks, threshold, own, sink_blocks, window_blocks, keep_all, list_ptrs, count):
    """Append to several lists those blocks that are kept by score (NaN is) or in any case; returns the new counts.

    ``scores`` are [lists, blocks] and ``blocks`` the blocks' numbers; all else is per list, [lists]. ``own`` is the list's
    own block, after which it keeps none: with -1 it keeps nothing. ``count`` entries are in the list already.
    """
    distance = own[:, None] - blocks[None, :]
    kept = ~(scores < threshold[:, None]) | (blocks < sink_blocks)[None, :] | (distance < window_blocks) | keep_all[:, None]
    kept = (kept & (distance >= 0)).to(tl.int32)
    place = count[:, None] + tl.cumsum(kept, 1) - 1
    tl.store(list_ptrs[:, None] + place, tl.broadcast_to(blocks[None, :], kept.shape), mask=kept != 0)
    return count + tl.sum(kept, 1)


def padded_head_dim(head_dim: int) -> int:
    """Channels of the tiles of ``head_dim``: a power of two, and as many as a product of 8-bit integers has at least."""
    return max(triton.next_power_of_2(head_dim), 32)


def launch_context(tensor: torch.Tensor):
    """Makes the tensor's GPU current: Triton launches on the current one, wherever the pointers are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def compute_capability(tensor: torch.Tensor) -> tuple[int, int]:
    """Of the tensor's GPU; the interpreter plays a Hopper."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def multiprocessors(tensor: torch.Tensor) -> int:
    """Of the tensor's GPU; the interpreter has one."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def copy_engine_takes(tensor: torch.Tensor) -> bool:
    """Whether the bulk tensor copy engine can address the tensor: 16-byte base and strides, dense last dimension."""
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
    )
