"""Random calls of the operator: shapes, layouts in memory, paddings, offsets and settings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random

import torch
from hypothesis import strategies as st

from hf_flashprefill import FlashPrefillConfig
from hf_flashprefill.config import BLOCK_SIZES, MEAN_BLOCKS, POOL_SIZES, QUERY_STRIDES, SELECTORS, SORTING_SELECTORS

# Those that have a threshold, from which a disagreement's distance can be told.
THRESHOLDS = [selector for selector in SELECTORS if selector not in SORTING_SELECTORS]
HALVES = (torch.float16, torch.bfloat16)
# Minus infinity is no sink at all.
SINKS = (-float("inf"), -8.0, -1.0, 0.0, 2.0, 8.0)


@dataclass(frozen=True)
class Layout:
    """Where a tensor [B, H, S, D] lies in memory.

    Attributes:
        order: The four dimensions from the outermost to the innermost.
        margins: NaNs before and after the tensor, in entries of each dimension of ``order``.
    """

    order: tuple[int, ...] = (0, 1, 2, 3)
    margins: tuple[int, ...] = (0, 0, 0, 0)

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """A view of other memory with the values [B, H, S, D], surrounded by NaN."""
        sizes = [values.shape[dim] + 2 * margin for dim, margin in zip(self.order, self.margins, strict=True)]
        memory = values.new_full(sizes, float("nan"))
        inner = tuple(slice(margin, size - margin) for margin, size in zip(self.margins, sizes, strict=True))
        view = memory[inner].permute([self.order.index(dim) for dim in range(4)])
        return view.copy_(values)


# Of query, key and value.
Layouts = tuple[Layout, Layout, Layout]


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for."""

    head_dim: int
    group: int
    dtype: torch.dtype
    block_size: int
    selector: str
    pool_size: int
    query_stride: int
    is_padded: bool
    has_window: bool = False
    has_sinks: bool = False


@dataclass(frozen=True)
class Call:
    """One call; ``ranges`` are valid (first, end) buffer positions per row, and ``sinks`` one logit per query head."""

    variant: Variant
    batch: int
    key_heads: int
    query_len: int
    kv_len: int
    offset: int
    ranges: tuple[tuple[int, int], ...] | None
    layouts: Layouts
    scale: float | None
    spread: float
    seed: int
    rule: tuple[tuple[str, float | bool], ...]
    sliding_window: int | None
    sinks: tuple[float, ...] | None

    def config(self, backend: str) -> FlashPrefillConfig:
        names = ("block_size", "selector", "pool_size", "query_stride")
        return FlashPrefillConfig(backend=backend, **{name: getattr(self.variant, name) for name in names}, **dict(self.rule))

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Query, key, value and valid ranges; NaN or infinite wherever nobody may look.

        Keys of a neighbourhood share a direction, so that blocks differ and thresholds decide something.
        """
        random = torch.Generator().manual_seed(self.seed)
        channels = self.variant.head_dim

        def normal(heads: int, tokens: int) -> torch.Tensor:
            return torch.randn(self.batch, heads, tokens, channels, generator=random)

        query = normal(self.key_heads * self.variant.group, self.query_len)
        key, value = (normal(self.key_heads, self.kv_len) for _ in range(2))
        directions = self.spread * normal(self.key_heads, self.kv_len // 64 + 1)
        key += directions.repeat_interleave(64, 2)[:, :, : self.kv_len]
        position = self.offset + torch.arange(self.query_len)
        for row, (first, end) in enumerate(self.ranges or ()):
            for tensor in (key, value):
                tensor[row, :, :first] = float("nan")
                tensor[row, :, end:] = float("inf")
            query[row, :, position < first] = float("inf")
            query[row, :, position >= end] = float("nan")
        placed = (
            layout.place(tensor.to(device, self.variant.dtype))
            for layout, tensor in zip(self.layouts, (query, key, value), strict=True)
        )
        return *placed, None if self.ranges is None else torch.tensor(self.ranges, device=device)


@st.composite
def layouts(draw) -> Layout:
    order = draw(st.permutations(range(4)).map(tuple))
    return Layout(order, draw(st.tuples(*[st.sampled_from((0, 0, 0, 1, 3, 8))] * 4)))


def variants(head_dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> st.SearchStrategy[Variant]:
    return st.builds(
        Variant,
        head_dim=st.sampled_from(head_dims),
        group=st.sampled_from((1, 2, 3, 4, 7)),
        dtype=st.sampled_from(dtypes),
        block_size=st.sampled_from(BLOCK_SIZES),
        selector=st.sampled_from(THRESHOLDS),
        pool_size=st.sampled_from(POOL_SIZES),
        query_stride=st.sampled_from(QUERY_STRIDES),
        is_padded=st.booleans(),
        has_window=st.sampled_from((False, False, True)),
        has_sinks=st.sampled_from((False, False, True)),
    )


def lengths(least: int, most: int) -> st.SearchStrategy[int]:
    """Tokens, often at the edges of blocks."""
    edges = [edge for base in (0, 64, 128, 256, 512) for edge in (base - 1, base, base + 1) if least <= edge <= most]
    return st.one_of(st.sampled_from(edges or [least]), st.integers(least, most))


rules = st.fixed_dictionaries(
    {
        "alpha": st.one_of(st.sampled_from((0.0, 0.0, 0.005, 0.02, 0.1, 0.5, 1.0)), st.floats(0, 1)),
        "sink_blocks": st.integers(0, 3),
        "window_blocks": st.integers(1, 3),
        "dense_tail_blocks": st.integers(0, 2),
        "correction": st.booleans(),
        "mean_blocks": st.sampled_from(MEAN_BLOCKS),
    }
).map(lambda rule: tuple(rule.items()))


@st.composite
def calls(draw, variant: st.SearchStrategy[Variant], tokens: int, placed: st.SearchStrategy[Layouts]) -> Call:
    """Calls with at most ``tokens`` cached tokens before, queries, and empty buffer after the queries, each."""
    chosen = draw(variant)
    batch = draw(st.integers(1, 3))
    query_len, offset = draw(lengths(1, tokens)), draw(lengths(0, tokens))
    kv_len = offset + query_len + draw(st.one_of(st.just(0), lengths(0, tokens)))
    ranges = None
    if chosen.is_padded:
        edge = st.one_of(st.sampled_from((0, offset, offset + query_len, kv_len)), st.integers(0, kv_len))
        pairs = st.tuples(edge, edge).map(lambda pair: (min(pair), max(pair)))
        ranges = tuple(draw(st.lists(pairs, min_size=batch, max_size=batch)))
    key_heads, sinks = draw(st.integers(1, 2)), None
    if chosen.has_sinks:
        heads = key_heads * chosen.group
        sinks = tuple(draw(st.lists(st.sampled_from(SINKS), min_size=heads, max_size=heads)))
    return Call(
        variant=chosen,
        batch=batch,
        key_heads=key_heads,
        query_len=query_len,
        kv_len=kv_len,
        offset=offset,
        ranges=ranges,
        layouts=draw(placed),
        scale=draw(st.sampled_from((None, None, 0.01, 0.3, 1.0))),
        spread=draw(st.sampled_from((0.0, 0.5, 2.0))),
        seed=draw(st.integers(0, 2**32 - 1)),
        rule=draw(rules),
        # A window as long as the keys is none.
        sliding_window=draw(lengths(1, kv_len + 1)) if chosen.has_window else None,
        sinks=sinks,
    )


# A GPU compiles a kernel for each of these; random variants would spend the hours of a soak run in the compiler.
GPU_VARIANTS = (
    Variant(128, 4, torch.bfloat16, 128, "blend", 4, 8, False),
    Variant(128, 4, torch.bfloat16, 128, "blend", 4, 8, True),
    Variant(128, 6, torch.float16, 128, "blend", 8, 8, True),
    Variant(128, 4, torch.bfloat16, 128, "share", 4, 8, False),
    Variant(128, 4, torch.bfloat16, 128, "share", 4, 8, True),
    Variant(128, 7, torch.float16, 128, "peak", 4, 16, True),
    Variant(64, 1, torch.bfloat16, 128, "flashprefill", 8, 8, True),
    Variant(64, 2, torch.float16, 128, "share", 16, 4, True),
    Variant(256, 2, torch.bfloat16, 128, "share", 8, 8, True),
    Variant(128, 3, torch.bfloat16, 64, "share", 32, 1, True),
    Variant(80, 4, torch.float16, 64, "flashprefill", 8, 8, True),
    Variant(96, 2, torch.bfloat16, 128, "peak", 8, 64, False),
    Variant(64, 4, torch.float32, 128, "share", 8, 8, True),
    Variant(128, 1, torch.float32, 64, "flashprefill", 8, 8, False),
    Variant(40, 3, torch.float32, 64, "peak", 16, 2, True),
    Variant(64, 2, torch.bfloat16, 128, "blend", 4, 8, True, has_window=True, has_sinks=True),
    Variant(128, 4, torch.bfloat16, 128, "blend", 4, 8, True, has_sinks=True),
    Variant(128, 4, torch.float16, 128, "blend", 4, 8, False, has_window=True),
    Variant(64, 1, torch.float32, 64, "share", 8, 8, True, has_sinks=True),
)
GPU_LAYOUTS = tuple(
    Layout(order, margins) for order in ((0, 1, 2, 3), (0, 2, 1, 3)) for margins in ((0, 0, 0, 0), (1, 1, 0, 8), (0, 3, 1, 1))
) + (Layout((0, 1, 3, 2)),)


# As a projection leaves queries, tokens before heads, and a cache keys and values: what the kernels for Hopper take.
NATURAL_LAYOUTS = (Layout((0, 2, 1, 3)), Layout(), Layout())
# Other layouts of a soak run of one variant. All 343 are as many kernels to compile, and nine minutes on an H200 made two dozen
# calls.
SOAK_LAYOUTS = 2


def random_calls(
    backend: str, device: torch.device, tokens: int, variant: int | None = None, seed: int = 0
) -> st.SearchStrategy[Call]:
    """Calls that the backend can serve on the device; on a GPU only of one of ``GPU_VARIANTS``, if its number is given, and in
    few layouts then, others for another ``seed``."""
    if device.type == "cuda":
        placed = [st.sampled_from(GPU_LAYOUTS)] * 3
        if variant is None:
            return calls(st.sampled_from(GPU_VARIANTS), 4 * tokens, st.tuples(*placed))
        others = Random(seed).sample(list(product(GPU_LAYOUTS, repeat=3)), SOAK_LAYOUTS)
        return calls(st.just(GPU_VARIANTS[variant]), 4 * tokens, st.sampled_from([NATURAL_LAYOUTS, *others]))
    placed = st.tuples(*[layouts()] * 3)
    if backend == "triton":
        # The interpreter multiplies bfloat16 matrices wrongly.
        return calls(variants((8, 24, 64, 80), (torch.float32, torch.float16)), tokens, placed)
    return calls(variants((1, 3, 8, 24, 64, 80, 128, 264), (torch.float32, *HALVES)), tokens, placed)
