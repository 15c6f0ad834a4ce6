"""Time the sparse operator against torch's dense attention, length by length, until it wins.

Blocks of the density that ``imposed`` assumes are attended; the index is computed in full and set aside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..config import FlashPrefillConfig
from ..functional import pool_inputs, resolve_backend, selecting_backend, selection_rule
from ..geometry import PrefillGeometry
from .imposed import assumed_density, imposed_index
from .known import WINS, Crossover, LayerShape, remember, rule_of
from .timing import medians_ms

# Tokens. On a CPU attention beyond these takes longer than anybody waits for a probe.
GPU_LENGTHS = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536)
CPU_LENGTHS = GPU_LENGTHS[:9]
# Sparse must take at most this share of the dense time: what a layer does around the operator is not timed.
MARGIN = 0.95
# Seconds to spend on each figure, beyond the fewest runs that make a median.
SECONDS = 0.05

# Milliseconds of dense and of sparse attention at a length.
TimeLength = Callable[[int], tuple[float, float]]


def measure_crossover(
    shape: LayerShape,
    device: torch.device | str,
    config: FlashPrefillConfig | None = None,
    *,
    max_seq_len: int | None = None,
    time_length: TimeLength | None = None,
) -> Crossover:
    """Find the shortest prompt that sparse prefill makes faster, and keep it for ``min_seq_len="auto"``.

    Times 1024, 1536, 2048, ... tokens upwards and stops when sparse has won three lengths in a row: each length costs more
    than all before it, so nothing that starts in the middle would be quicker. Seconds on a GPU. What an interrupted
    measurement found is lost.

    Args:
        shape: The layer. Batch is 1.
        device: Where to measure.
        config: The rule to measure; ``FlashPrefillConfig()`` if None. Its ``alpha`` plays no part.
        max_seq_len: Do not time longer prompts than this, tokens, at least 1024; None for 65536 on a GPU and 16384 on a CPU.
        time_length: Used in place of the clock: from a length to milliseconds of dense and of sparse attention.

    Raises:
        ValueError: ``max_seq_len`` is too small or the backend is not one to be measured.
    """
    config = FlashPrefillConfig() if config is None else config
    device = torch.device(device)
    lengths = lengths_to_time(device, max_seq_len)
    if not lengths:
        raise ValueError(f"max_seq_len must be at least {GPU_LENGTHS[0]} tokens, got {max_seq_len!r}")
    if config.backend == "reference":
        raise ValueError('backend must be "auto", "triton" or "torch" to be measured, got "reference"')
    timings: list[list[float]] = []
    time_length = time_length or functools.partial(time_attention, shape, device, config)

    def wins(length: int) -> bool:
        dense, sparse = time_length(length)
        timings.append([length, round(dense, 4), round(sparse, 4)])
        return sparse <= MARGIN * dense

    tokens = first_lasting_win(lengths, wins)
    exhausted = lengths == lengths_to_time(device)
    measured = Crossover(tokens, longest=int(timings[-1][0]), exhausted=exhausted, timings=timings)
    remember(rule_of(config), shape, device, measured)
    return measured


def lengths_to_time(device: torch.device, max_seq_len: int | None = None) -> tuple[int, ...]:
    """Tokens, rising, none above ``max_seq_len``."""
    lengths = CPU_LENGTHS if device.type == "cpu" else GPU_LENGTHS
    return tuple(length for length in lengths if max_seq_len is None or length <= max_seq_len)


def chunk_lengths(device: torch.device, max_seq_len: int | None = None) -> tuple[int, ...]:
    """Tokens that a chunk may see, rising, none above ``max_seq_len``: to four times a whole prompt's; a chunk costs less."""
    lengths = lengths_to_time(device)
    lengths += (2 * lengths[-1], 4 * lengths[-1])
    return tuple(length for length in lengths if max_seq_len is None or length <= max_seq_len)


def first_lasting_win(lengths: Sequence[int], wins: Callable[[int], bool]) -> int | None:
    """The first of the rising ``lengths`` that wins together with the next two, or with those that are left; None if none
    does. Each length is asked once, and none after the answer is clear."""
    first, run = None, 0
    for length in lengths:
        if not wins(length):
            first, run = None, 0
            continue
        first, run = first or length, run + 1
        if run == WINS:
            break
    return first


def time_attention(
    shape: LayerShape, device: torch.device, config: FlashPrefillConfig, length: int, query_len: int | None = None
) -> tuple[float, float]:
    """Median milliseconds of dense and of sparse attention of one prompt of ``length`` random tokens, or of a chunk of it, its
    last ``query_len`` ones, which dense attention gets a mask for, as in transformers."""
    config, query_len = config.resolved(), length if query_len is None else query_len
    # Query as a projection leaves it, tokens before heads; key and value as a cache does.
    random = functools.partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    query = random(1, query_len, shape.heads, shape.head_dim).to(shape.dtype).transpose(1, 2)
    key, value = random(2, 1, shape.kv_heads, length, shape.head_dim).to(shape.dtype).unbind()
    geometry = PrefillGeometry(1, query_len, length, length - query_len, config.block_size)
    index = imposed_index(geometry, shape.heads, assumed_density(length), device, config.dense_tail_blocks)
    backend, rule, scale = resolve_backend(config.backend, query), selection_rule(config), shape.head_dim**-0.5
    selecting = selecting_backend(config.selector, backend)
    blocks = {"first_query_block": 0, "query_blocks": geometry.query_blocks}

    mask = None
    if query_len < length:
        mask = torch.ones(query_len, length, dtype=torch.bool, device=device).tril(length - query_len)[None, None]

    def sparse() -> None:
        pooled, means = pool_inputs(key, value, geometry, config, backend)
        selecting.select_blocks(query, pooled, geometry, scale=scale, **blocks, **(rule | {"alpha": 1.0}))
        backend.attend_blocks(query, key, value, index, scale=scale, output=torch.empty_like(query), means=means)

    with torch.no_grad():
        times = medians_ms({"dense": unpatched_attention(query, key, value, mask), "sparse": sparse}, device, SECONDS)
    return times["dense"]["median_ms"], times["sparse"]["median_ms"]


def unpatched_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> Callable[[], torch.Tensor]:
    """What an unpatched layer on SDPA runs, query [B, Hq, Sq, D] and key, value [B, Hkv, Skv, D] -> [B, Hq, Sq, D]; causal
    without a mask. transformers repeats keys and values where torch's kernels for groups of heads cannot take them: with a
    mask, or head_dim above 256."""
    layer = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True, training=False)
    return lambda: sdpa_attention_forward(layer, query, key, value, mask)[0].transpose(1, 2)
