"""The operator: sparse causal attention of one prefill call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import torch

from . import reference
from .arithmetic import exact_arithmetic
from .backends.interface import Backend
from .block_index import BlockIndex
from .config import SORTING_SELECTORS, FlashPrefillConfig
from .geometry import PrefillGeometry
from .kept_pools import KeptPools
from .operator_arguments import as_kernels_read, checked_geometry, checked_scale, checked_sinks, checked_window

# Scores (float32) and lists (int32) of the query blocks in work, in bytes. Query blocks beyond it wait for the next round:
# 1M tokens and 32 heads would take 17 GiB at once. The pooled keys of such a prompt, 8 heads and 128 channels, are
# a quarter of a GiB already, and all scratch together should stay below one.
SCRATCH_BYTES = 1 << 28
# Query blocks of a round at most: a launch of the attention has up to four programs for each, side by side in a dimension of
# its grid that ends at 65535.
ROUND_BLOCKS = 1 << 13


class PrefillOutput(NamedTuple):
    """Attention output [B, Hq, Sq, D] and the lists of kept key blocks."""

    output: torch.Tensor
    index: BlockIndex


@overload
def flash_prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    config: FlashPrefillConfig | None = ...,
    scale: float | None = ...,
    query_offset: int | None = ...,
    valid_ranges: torch.Tensor | None = ...,
    sliding_window: int | None = ...,
    sinks: torch.Tensor | None = ...,
    kept_pools: KeptPools | None = ...,
    return_index: Literal[False] = ...,
    on_index: Callable[[BlockIndex], None] | None = ...,
) -> torch.Tensor: ...


@overload
def flash_prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    config: FlashPrefillConfig | None = ...,
    scale: float | None = ...,
    query_offset: int | None = ...,
    valid_ranges: torch.Tensor | None = ...,
    sliding_window: int | None = ...,
    sinks: torch.Tensor | None = ...,
    kept_pools: KeptPools | None = ...,
    return_index: Literal[True],
    on_index: Callable[[BlockIndex], None] | None = ...,
) -> PrefillOutput: ...


# A graph would follow it in pieces and be made anew for other lengths; custom_op.py has the operator for graphs.
@torch.compiler.disable
def flash_prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    config: FlashPrefillConfig | None = None,
    scale: float | None = None,
    query_offset: int | None = None,
    valid_ranges: torch.Tensor | None = None,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    kept_pools: KeptPools | None = None,
    return_index: bool = False,
    on_index: Callable[[BlockIndex], None] | None = None,
) -> torch.Tensor | PrefillOutput:
    """Causal attention over the key blocks that the configured selector keeps.

    Query head h reads key-value head h // (Hq / Hkv). Query i stands at buffer position ``query_offset + i`` and sees the
    keys at and before it. Any strides are accepted; nothing is written to the inputs. No gradients are computed. For a
    prompt without padding on the triton backend nothing waits for the device.

    Args:
        query: [B, Hq, Sq, D], float32, float16 or bfloat16.
        key: [B, Hkv, Skv, D], of the query's dtype and device. Hkv divides Hq.
        value: [B, Hkv, Skv, D].
        config: Settings; ``FlashPrefillConfig()`` if None. ``min_seq_len`` and ``dense_layers`` concern models, not this
            function, which is always sparse.
        scale: Multiplies query-key products; ``D ** -0.5`` if None.
        query_offset: Buffer position of the first query, 0 to Skv - Sq; ``Skv - Sq`` if None, which suits whole prompts,
            chunks and continuations of a cached prefix.
        valid_ranges: Integers [B, 2]: each row's first valid buffer position and the one after its last. The values lie
            in 0..Skv; they are read on the device only. None if nothing is padding.
        sliding_window: Tokens, >= 1: a query sees itself and the keys up to ``sliding_window - 1`` tokens before it. If the
            window is shorter than Skv, every block in it is kept and the result is exact, at a cost that grows with
            Sq * sliding_window. None, or a longer window, leaves the choice to the selector.
        sinks: [Hq] on the query's device: a logit per head that takes part in every softmax and has no value, as in
            gpt-oss. Selection does not see it.
        kept_pools: What earlier calls on the same cache have pooled, and where this one puts what it pools; see KeptPools for
            what that promises. None pools all keys. Not with ``valid_ranges``; with a ``sliding_window`` that is shorter than
            Skv and with the reference backend nothing is pooled.
        return_index: Also return the lists of kept blocks.
        on_index: Called with the lists as they are made, a part of a long prompt's query blocks at a time, which never
            holds all of them.

    Returns:
        [B, Hq, Sq, D] in the query's dtype, a view of [B, Sq, Hq, D] memory; zeros for queries outside their row's valid
        range. With ``return_index`` a PrefillOutput.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: Shapes, devices or values do not fit; or the backend asked for cannot run here.
    """
    config = FlashPrefillConfig() if config is None else config
    if not isinstance(config, FlashPrefillConfig):
        raise TypeError(f"config must be a FlashPrefillConfig, got {type(config).__name__}")
    config = config.resolved()
    geometry = checked_geometry(query, key, value, config.block_size, query_offset, valid_ranges)
    window = checked_window(sliding_window, geometry.kv_len)
    sinks = None if sinks is None else checked_sinks(sinks, query)
    scale = query.shape[-1] ** -0.5 if scale is None else checked_scale(scale)
    backend = resolve_backend(config.backend, query)
    if kept_pools is not None:
        _check_kept_pools(kept_pools, key, config, backend, valid_ranges)
        kept_pools.forget_from(geometry.query_offset)
    # Here and once: each round of a long prompt would copy what has its channels apart.
    query, key, value = (as_kernels_read(tensor) for tensor in (query, key, value))
    options: dict[str, Any] = {"scale": scale, "sliding_window": window, "sinks": sinks}
    parts: list[BlockIndex] = []
    pooled = None
    with exact_arithmetic(query.device):
        if backend is reference:
            options["mean_blocks"] = config.mean_blocks if config.correction and window is None else None
        else:
            output = backend.new_output(query, geometry)
            # A window keeps all it sees, and what it does not see must not come back as a mean.
            if window is None:
                pooled, options["means"] = pool_inputs(key, value, geometry, config, backend, kept_pools)
        for index in select_in_rounds(query, key, geometry, config, scale, window, pooled):
            if backend is reference:
                output = reference.attend_blocks(query, key, value, index, **options).to(query.dtype)
            else:
                backend.attend_blocks(query, key, value, index, output=output, **options)
            if return_index:
                parts.append(index)
            if on_index is not None:
                on_index(index)
            # Or these lists would live on while the next are made: 128 MiB of a prompt of 1M tokens.
            del index
    return PrefillOutput(output, BlockIndex.concatenate(parts)) if return_index else output


def pool_inputs(
    key: torch.Tensor,
    value: torch.Tensor,
    geometry: PrefillGeometry,
    config: FlashPrefillConfig,
    backend: Backend,
    kept_pools: KeptPools | None = None,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor] | None]:
    """The pooled keys that the selector probes and, with the correction, the means of keys and of values that stand for
    dropped blocks, ``run_means`` of the backend. ``backend`` is the one that attends, not the reference."""
    config, block_size = config.resolved(), config.block_size
    pool_size, selecting = selection_rule(config)["pool_size"], selecting_backend(config.selector, backend)

    def pool(key: torch.Tensor, value: torch.Tensor, geometry: PrefillGeometry) -> tuple[torch.Tensor, ...]:
        if not config.correction:
            return selecting.pool_keys(key, geometry, pool_size)
        if selecting is backend:
            pooled, *blocks = backend.pool_keys_and_values(key, value, geometry, pool_size)
        else:
            _, *blocks = backend.pool_keys_and_values(key, value, geometry, block_size)
            pooled = selecting.pool_keys(key, geometry, pool_size)
        return *pooled, *blocks

    if kept_pools is None:
        pools = pool(key, value, geometry)
    else:
        together = max(block_size, selecting.pooled_together(block_size, pool_size))
        row_tokens = selecting.tokens_per_row(block_size, pool_size) + (block_size, block_size) * config.correction
        made_for = _pools_made_for(key, config, backend)
        pools = kept_pools.extended(key, value, geometry, pool, made_for, together, row_tokens)
    if not config.correction:
        return pools, None
    *pooled, key_blocks, value_blocks = pools
    return tuple(pooled), backend.run_means(key_blocks, value_blocks, config.mean_blocks)


def select_in_rounds(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: PrefillGeometry,
    config: FlashPrefillConfig,
    scale: float,
    sliding_window: int | None = None,
    pooled: tuple[torch.Tensor, ...] | None = None,
) -> Iterator[BlockIndex]:
    """The lists that ``flash_prefill_attention`` attends, a part of the query blocks at a time.

    Arguments have been checked; ``sliding_window`` is None or shorter than the keys, and ``pooled`` what ``pool_inputs`` made
    of the keys, if it was called.
    """
    backend, heads = resolve_backend(config.backend, query), query.shape[1]
    width = geometry.key_blocks if sliding_window is None else geometry.window_width(sliding_window)
    # The reference attends a whole call at once.
    rounds = [(0, geometry.query_blocks)] if backend is reference else _rounds(geometry, heads, width)
    if sliding_window is not None:
        for first, count in rounds:
            yield BlockIndex.of_window(geometry, heads, sliding_window, first, count, query.device)
        return
    rule = {"scale": scale, **selection_rule(config)}
    # Kernels count in 32 bits.
    rule["dense_tail_blocks"] = min(rule["dense_tail_blocks"], geometry.query_blocks)
    if backend is reference:
        yield reference.select_blocks(query, key, geometry, **rule)
        return
    selecting = selecting_backend(config.selector, backend)
    if pooled is None:
        pooled = selecting.pool_keys(key, geometry, rule["pool_size"])
    for first, count in rounds:
        yield selecting.select_blocks(query, pooled, geometry, first_query_block=first, query_blocks=count, **rule)


def selection_rule(config: FlashPrefillConfig) -> dict[str, Any]:
    """The settings that decide which blocks are kept, as the arguments of every backend's ``select_blocks``."""
    names = ("selector", "pool_size", "query_stride", "alpha", "sink_blocks", "window_blocks", "dense_tail_blocks")
    config = config.resolved()
    rule = {name: getattr(config, name) for name in names}
    if config.selector == "flashprefill":
        # The published rule pools whole blocks and asks every query.
        rule |= {"pool_size": config.block_size, "query_stride": 1}
    return rule


def selecting_backend(selector: str, backend: Backend) -> Backend:
    """The module whose pools and ``select_blocks`` serve a selector when ``backend`` attends."""
    if selector not in SORTING_SELECTORS:
        return backend
    from .backends import torch as torch_backend

    return torch_backend


def resolve_backend(name: str, query: torch.Tensor) -> ModuleType:
    """The module that serves backend ``name`` for tensors like ``query``: a Backend, or the reference, which selects and
    attends a whole call at once.

    Raises:
        ValueError: ``"triton"`` was asked for and cannot run on this device, dtype or head_dim.
    """
    if name == "reference":
        return reference
    # Triton's interpreter takes CPU tensors too, but nobody wants it unasked.
    if name == "triton" or (name == "auto" and query.is_cuda):
        obstacle = triton_obstacle(query)
        if obstacle is None:
            from .backends import triton

            return triton
        if name == "triton":
            raise ValueError(f'backend "triton" cannot run here: {obstacle}')
    from .backends import torch as torch_backend

    return torch_backend


class TensorKind(NamedTuple):
    """What of a tensor decides whether kernels can take it."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]


# A graph takes the answer as it is.
@torch._dynamo.assume_constant_result
def lacks_kernel(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether ``"auto"`` serves such tensors in torch on a GPU, where dense attention is faster."""
    return backend == "auto" and device.type == "cuda" and triton_obstacle(TensorKind(device, dtype, (head_dim,))) is not None


def triton_obstacle(query: torch.Tensor | TensorKind) -> str | None:
    """Why the triton backend cannot take tensors like ``query``, or None."""
    try:
        from .backends import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    return triton.obstacle(query)


def _rounds(geometry: PrefillGeometry, heads: int, width: int) -> list[tuple[int, int]]:
    """(first, count) of the query blocks worked on together, whose lists hold up to ``width`` blocks; follows from shapes
    alone."""
    bytes_per_block = 8 * geometry.batch * heads * width
    step = min(max(1, SCRATCH_BYTES // max(1, bytes_per_block)), ROUND_BLOCKS)
    return [(first, min(step, geometry.query_blocks - first)) for first in range(0, geometry.query_blocks, step)]


def _pools_made_for(key: torch.Tensor, config: FlashPrefillConfig, backend: ModuleType) -> dict[str, Any]:
    """All that pools depend on beside keys, values and where they stand, by names that users know."""
    batch, heads, _, head_dim = key.shape
    return {
        "batch": batch,
        "key heads": heads,
        "head_dim": head_dim,
        "dtype": key.dtype,
        "device": key.device,
        "block_size": config.block_size,
        "pool_size": selection_rule(config)["pool_size"],
        "correction": config.correction,
        "backend": backend.__name__.rpartition(".")[2],
        "backend that selects": selecting_backend(config.selector, backend).__name__.rpartition(".")[2],
    }


def _check_kept_pools(
    kept_pools: KeptPools,
    key: torch.Tensor,
    config: FlashPrefillConfig,
    backend: ModuleType,
    valid_ranges: torch.Tensor | None,
) -> None:
    if not isinstance(kept_pools, KeptPools):
        raise TypeError(f"kept_pools must be KeptPools or None, got {type(kept_pools).__name__}")
    if valid_ranges is not None:
        raise ValueError("kept_pools must be None with valid_ranges: where a padded row begins only the device knows")
    if backend is not reference:
        kept_pools.require(_pools_made_for(key, config, backend))
