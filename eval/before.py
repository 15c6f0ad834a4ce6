"""Another checkout of this repository beside this one, for ``eval.operator_speed --before``."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from eval import commands, tables
from eval.stages import Stages, Tensors, package_stages
from hf_flashprefill import BlockIndex


@functools.cache
def package(folder: Path) -> ModuleType:
    """The package of another checkout, beside this one's. Its custom op takes the place of this one's."""
    name, path = "hf_flashprefill_before", folder / "hf_flashprefill" / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_checksum(folder: Path | None) -> int | None:
    """Of the source of the package in a checkout, however it came there."""
    if folder is None:
        return None
    checksum = 0
    for path in sorted((folder / "hf_flashprefill").rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return checksum


def stages(tensors: Tensors, index: BlockIndex, args: argparse.Namespace) -> Stages:
    """Those of the checkout that ``--before`` names."""
    try:
        return package_stages(package(args.before), tensors, index, args)
    except (AttributeError, ImportError, TypeError) as error:
        raise commands.UsageError(f"--before: {args.before} has other stages: {commands.first_line(error)}") from None


def compared(now: Stages, before: Stages, times: dict[str, Any]) -> dict[str, dict]:
    """The share of the time before that each stage takes; by selector, how many blocks only one of the two lists; whether
    both attend to the same bits."""
    return {
        "share_of_time": {name: times[name]["median_ms"] / times[f"{name}_before"]["median_ms"] for name in now.timed},
        "blocks_apart": {
            name: int((run().to_mask() != before.lists[name]().to_mask()).sum()) for name, run in now.lists.items()
        },
        "same_bits": {n: torch.equal(run(), before.timed[n]()) for n, run in now.timed.items() if n.startswith("attend")},
    }


def table(rows: list[dict]) -> str:
    """Of each shape: the shares of the time before, blocks listed by one of the two only, and whether results are the same."""
    stages = list(rows[0]["before"]["share_of_time"])
    cells = []
    for row in rows:
        found = row["before"]
        shares = [f"{found['share_of_time'][stage]:.3f}" for stage in stages]
        same = "yes" if all(found["same_bits"].values()) else "no"
        cells.append([str(row["length"]), str(row["head_dim"]), *shares, str(sum(found["blocks_apart"].values())), same])
    return tables.format_table(["tokens", "head dim", *stages, "blocks apart", "same bits"], cells)
