"""Time the sparse operator against torch's dense attention, length by length, until it wins.

How sparse a real prompt is cannot be known from random tensors, so the density is assumed: what the FlashPrefill papers
report for Llama-3.1-8B and Qwen3-30B-A3B at each length, 0.70 at 4K tokens, 0.46 at 8K, 0.29 at 16K, 0.176 at 32K, 0.10 at
64K. A model or an alpha that keeps more blocks than that gains later than measured. Blocks of that density are imposed; the
index is computed in full and set aside.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from ..block_index import BlockIndex
from ..config import FlashPrefillConfig
from ..functional import pool_inputs, resolve_backend, selecting_backend, selection_rule
from ..geometry import PrefillGeometry
from .known import WINS, Crossover, LayerShape, remember, rule_of

# What the FlashPrefill papers report for Llama-3.1-8B and Qwen3-30B-A3B, by length in tokens.
PUBLISHED_DENSITY = {4096: 0.70, 8192: 0.46, 16384: 0.29, 32768: 0.176, 65536: 0.10, 131072: 0.06, 262144: 0.041}

# Tokens. On a CPU attention beyond these takes longer than anybody waits for a probe.
GPU_LENGTHS = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536)
CPU_LENGTHS = GPU_LENGTHS[:9]
# Sparse must take at most this share of the dense time: what a layer does around the operator is not timed.
MARGIN = 0.95
# Seconds to spend on each figure, beyond the fewest runs that make a median.
SECONDS = 0.05
FEWEST_RUNS = 5
# More than any cache holds. An H200 clears them 24 times in about 1.5 ms, in which its host launches one operator call; slow
# hosts need several times that. Where they are too few, waits count: .98 ms for the operator at 8192 tokens instead of .63.
QUEUE_BYTES = 256 << 20
FEWEST_CLEARINGS = 24
# A run that waits for the GPU itself can never be all in the queue.
MOST_CLEARINGS = 1024

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

    def dense() -> None:
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    def sparse() -> None:
        pooled, means = pool_inputs(key, value, geometry, config, backend)
        selecting.select_blocks(query, pooled, geometry, scale=scale, **blocks, **(rule | {"alpha": 1.0}))
        backend.attend_blocks(query, key, value, index, scale=scale, output=torch.empty_like(query), means=means)

    with torch.no_grad():
        times = medians_ms({"dense": dense, "sparse": sparse}, device, SECONDS)
    return times["dense"]["median_ms"], times["sparse"]["median_ms"]


def assumed_density(length: int) -> float:
    """The published density at ``length`` tokens, straight lines in the length's logarithm between the published ones; 1 at
    1024 tokens, where sinks, window and tail are nearly all there is, and .041 from 256K on."""
    points = [(1024, 1.0), *PUBLISHED_DENSITY.items()]
    length = min(max(length, points[0][0]), points[-1][0])
    for (low, start), (high, end) in zip(points, points[1:], strict=False):
        if length <= high:
            part = math.log(length / low) / math.log(high / low)
            return start + part * (end - start)
    raise AssertionError


def imposed_index(
    geometry: PrefillGeometry, heads: int, density: float, device: torch.device, dense_tail_blocks: int = 2
) -> BlockIndex:
    """Lists of the given density: 2 sink blocks, 4 window blocks, the last query blocks in full, the rest at random. The last
    query is the last key's.

    What is kept in any case is the least density there can be: .12 at 16K tokens with two dense tail blocks.
    """
    count = geometry.key_blocks
    tile, block = torch.arange(geometry.query_blocks, device=device)[:, None], torch.arange(count, device=device)[None, :]
    tile = tile + geometry.query_offset // geometry.block_size
    causal = block <= tile
    forced = ((block < 2) | (tile - block < 4) | (tile >= count - dense_tail_blocks)) & causal
    free = (causal.sum() - forced.sum()).item()
    chance = max(0.0, density * causal.sum().item() - forced.sum().item()) / max(free, 1)
    generator = torch.Generator(device).manual_seed(0)
    # A head at a time: at 256K tokens all heads together would need gigabytes of random numbers.
    chosen = [torch.rand(causal.shape, device=device, generator=generator) < chance for _ in range(heads)]
    mask = torch.stack([(choice & causal) | forced for choice in chosen])
    return BlockIndex.from_mask(mask.expand(geometry.batch, -1, -1, -1), geometry)


def median_ms(
    run: Callable[[], object], device: torch.device, seconds: float, least: int = FEWEST_RUNS, queued: bool = False
) -> dict[str, float]:
    """``medians_ms`` of one function."""
    return medians_ms({"run": run}, device, seconds, least, queued)["run"]


def medians_ms(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    least: int = FEWEST_RUNS,
    queued: bool = False,
) -> dict[str, dict[str, float]]:
    """Median and quartiles of every one of ``runs`` in milliseconds, after an unmeasured run of each; by the GPU's clock
    where there is one.

    They run in turns, so that a clock which falls as the GPU warms up is the same for all, for ``seconds`` each on average and
    at least ``least`` times, two or more. ``queued``: the GPU is kept busy with clearing memory until all of a run is in its
    queue, however long the host takes, as it is in a model, whose host runs ahead; what counts is the GPU's own time, with
    nothing of the tensors in its cache. Otherwise an idle GPU waits for every launch.
    """
    cleared = torch.empty(QUEUE_BYTES, dtype=torch.int8, device=device) if queued and device.type == "cuda" else None
    for run in runs.values():
        run()
    clearings = dict.fromkeys(runs, FEWEST_CLEARINGS)
    times: dict[str, list[float]] = {name: [] for name in runs}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    until = time.perf_counter() + seconds * len(runs)
    rounds = 0
    while rounds < least or (time.perf_counter() < until and rounds < 200):
        for name, run in runs.items():
            if cleared is None:
                elapsed_ms = _time_ms(run, device)
            else:
                elapsed_ms, clearings[name] = _queued_ms(run, cleared, clearings[name])
            times[name].append(elapsed_ms)
        rounds += 1
    return {name: _quartiles(of_run) for name, of_run in times.items()}


def _time_ms(run: Callable[[], object], device: torch.device) -> float:
    """One run's milliseconds."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _queued_ms(run: Callable[[], object], cleared: torch.Tensor, clearings: int) -> tuple[float, int]:
    """One run's milliseconds after so many clearings, or a power of two times as many if the GPU was through with them before
    all of the run was in its queue; and how many it took."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while True:
        for _ in range(clearings):
            cleared.zero_()
        begin.record()
        run()
        end.record()
        has_waited = begin.query()
        end.synchronize()
        if not has_waited or clearings >= MOST_CLEARINGS:
            return begin.elapsed_time(end), clearings
        clearings *= 2


def _quartiles(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": median, "quartile_low_ms": low, "quartile_high_ms": high, "runs": len(times)}
