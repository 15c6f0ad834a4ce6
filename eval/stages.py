"""The operator's stages as functions to be timed, of this package or of another checkout's."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

import hf_flashprefill
from hf_flashprefill import BlockIndex, FlashPrefillConfig

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def stage_runs(
    backend: Any,
    tensors: Tensors,
    index: BlockIndex,
    config: FlashPrefillConfig,
    scale: float,
    package: ModuleType = hf_flashprefill,
) -> dict[str, Callable[[], Any]]:
    """The stages of the operator as functions without arguments: pool, select, attend, and operator, all of them in turn.

    What is attended are the lists of ``index``, whatever ``select`` finds. ``backend``, ``index`` and ``config`` are
    ``package``'s.
    """
    query, key, value = tensors
    config, functional = config.resolved(), package.functional
    geometry, rule = index.geometry, functional.selection_rule(config)
    selecting = functional.selecting_backend(config.selector, backend)
    blocks = {"first_query_block": 0, "query_blocks": geometry.query_blocks}
    output = torch.empty_like(query)

    def pool() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor] | None]:
        return functional.pool_inputs(key, value, geometry, config, backend)

    pooled, means = pool()

    def select(pooled: tuple[torch.Tensor, ...] = pooled) -> BlockIndex:
        return selecting.select_blocks(query, pooled, geometry, scale=scale, **blocks, **rule)

    def attend() -> torch.Tensor:
        backend.attend_blocks(query, key, value, index, scale=scale, output=output, means=means)
        return output

    def operator() -> None:
        select(pool()[0])
        attend()

    return {stage.__name__: stage for stage in (pool, select, attend, operator)}


class Stages(NamedTuple):
    """What a package does with one shape, as functions without arguments.

    Attributes:
        timed: ``attend`` of the blocks alone, and the stages of every selector.
        lists: With ``--before``, by selector, what it selects at the default alpha. At that of what is timed all are the same.
    """

    timed: dict[str, Callable[[], Any]]
    lists: dict[str, Callable[[], BlockIndex]]


def package_stages(package: ModuleType, tensors: Tensors, index: BlockIndex, args: argparse.Namespace) -> Stages:
    """The stages of this package or another, with its own classes in the place of this one's."""
    scale, backend = tensors[0].shape[-1] ** -0.5, package.functional.resolve_backend(args.backend, tensors[0])
    own_index = package.BlockIndex(index.indices, index.counts, package.geometry.PrefillGeometry(**vars(index.geometry)))

    def runs(**settings: Any) -> dict[str, Callable[[], Any]]:
        config = package.FlashPrefillConfig(**args.config.to_dict() | settings)
        return stage_runs(backend, tensors, own_index, config, scale, package)

    timed = {"attend": runs(correction=False)["attend"]}
    for selector in args.selectors:
        timed |= {f"{stage}_{selector}": run for stage, run in runs(selector=selector).items()}
    alpha, compared_selectors = FlashPrefillConfig().resolved().alpha, args.selectors if args.before else ()
    return Stages(timed, {selector: runs(selector=selector, alpha=alpha)["select"] for selector in compared_selectors})
