"""Options that several commands have: how they are written, and whether what was given can be had."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eval.commands import UsageError, first_line
from eval.models import BUNDLED_MODEL, DTYPES
from eval.runner import process_count
from hf_flashprefill import FlashPrefillConfig
from hf_flashprefill.command_line import unwritable_reason

# Tokens; more than any prompt has.
LONGEST = 1 << 24


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="(default: cuda where there is a GPU, else cpu)")


def add_seed_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: %(default)s)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="hub id, folder or shape:NAME (default: the bundled model)")
    add_device_argument(parser)
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")


def add_config_arguments(parser: argparse.ArgumentParser, has_rule: bool = True, min_seq_len: int | str = 1) -> None:
    """Settings of the patched state.

    Args:
        has_rule: False if a command has its own way to say alpha and selector.
        min_seq_len: What it is when neither its option nor ``--config`` says it.
    """
    defaults = FlashPrefillConfig(min_seq_len=min_seq_len)
    parser.set_defaults(alpha=None, selector=None, config_defaults=defaults)
    if has_rule:
        parser.add_argument("--alpha", type=float, help="threshold, the same for all layers (default: the selector's)")
        parser.add_argument("--selector", help=f"rule that scores blocks (default: {defaults.selector})")
    parser.add_argument(
        "--min-seq-len",
        type=_json_or_text,
        metavar="TOKENS",
        help=f'shortest prompt that runs sparse, or "auto" (default: {min_seq_len})',
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON file of FlashPrefillConfig's fields, such as eval.calibrate writes"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="other fields of FlashPrefillConfig, values as in JSON (default: none)",
    )


def given_config(args: argparse.Namespace) -> FlashPrefillConfig:
    """The settings that the options of ``add_config_arguments`` ask for; those named one by one go before ``--config``.
    What nobody asked for and the selector decides is None.

    Raises:
        UsageError: A value is out of its range, a field does not exist, or the file is none.
    """
    try:
        base = args.config_defaults if args.config is None else FlashPrefillConfig.from_json(args.config)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--config {args.config}: {first_line(error)}") from None
    options = {"alpha": args.alpha, "selector": args.selector, "min_seq_len": args.min_seq_len}
    fields = {name: value for name, value in options.items() if value is not None}
    try:
        fields |= dict(parse_field(setting) for setting in args.set)
    except ValueError as error:
        raise UsageError(f"--set takes {error}") from None
    if "alpha" in fields:
        # As in patch_model: one alpha for all layers replaces those of a file.
        fields = {"layer_alphas": None} | fields
    try:
        return replace(base, **fields)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None


def add_run_arguments(parser: argparse.ArgumentParser, harness: str, lengths: Sequence[int], has_rule: bool = True) -> None:
    """Model, settings of the patched state, and what all harnesses that ask prompts have in common."""
    add_model_arguments(parser)
    add_config_arguments(parser, has_rule)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(lengths), help="tokens (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="quick look: at most this many prompts of each kind and length")
    parser.add_argument("--output", type=Path, default=Path(f"results/{harness}.json"), help="JSON file (default: %(default)s)")
    add_seed_argument(parser)


def check_run_arguments(args: argparse.Namespace, shortest: int = 1) -> FlashPrefillConfig:
    """The settings of the patched state as ``given_config`` has them, after a look at the other arguments. Prompts have at
    least ``shortest`` tokens.

    Raises:
        UsageError: A value is out of its range or a field does not exist.
    """
    check_range("--lengths", args.lengths, shortest, LONGEST)
    return check_config_arguments(args)


def check_config_arguments(args: argparse.Namespace) -> FlashPrefillConfig:
    """The settings of the patched state as ``given_config`` has them; checks --limit and --output, too.

    Raises:
        UsageError: A value is out of its range or a field does not exist.
    """
    config = given_config(args)
    check_output_arguments(args)
    return config


def check_output_arguments(args: argparse.Namespace) -> None:
    """Look at --limit and --output.

    Raises:
        UsageError: The limit is out of its range, or the output is no JSON file or cannot be written.
    """
    if args.limit is not None:
        check_range("--limit", args.limit, 1)
    if args.output.is_dir():
        raise UsageError(f"--output must name a JSON file, {args.output} is a folder")
    # A picture lies beside it under the same name.
    if args.output.suffix != ".json":
        raise UsageError(f"--output must end in .json, got {args.output}")
    check_writable(args.output)


def check_range(option: str, given: float | Sequence[float], least: float, most: float = math.inf) -> None:
    """Look at the numbers that an option has.

    Raises:
        UsageError: One of them is below ``least``, above ``most``, or none at all.
    """
    for value in given if isinstance(given, Sequence) else [given]:
        if not least <= value <= most:
            allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise UsageError(f"{option} must be {allowed}, got {value}")


def check_share(option: str, given: float | Sequence[float]) -> None:
    """Look at the shares that an option has, none of which may be 0.

    Raises:
        UsageError: One of them is not above 0 and at most 1.
    """
    for value in given if isinstance(given, Sequence) else [given]:
        if not 0 < value <= 1:
            raise UsageError(f"{option} must be above 0 and at most 1, got {value}")


def check_writable(path: Path) -> None:
    """See whether a file of this name can be written, in folders that may be missing yet. Leaves nothing behind.

    Raises:
        UsageError: It cannot.
    """
    # About as long a name as that of the file of finished tasks, see eval.runner.
    reason = unwritable_reason(path, ".partial.jsonl")
    if reason is not None:
        raise UsageError(f"--output {path}: {reason}")


def check_one_process(harness: str) -> None:
    """For harnesses that have no rows to split.

    Raises:
        UsageError: `accelerate launch` started several processes.
    """
    if process_count() > 1:
        raise UsageError(f"eval.{harness} runs in one process; start it without accelerate launch")


def limited(groups: Sequence[Sequence[Any]], limit: int | None) -> list[Any]:
    """All groups one after the other, at most ``limit`` entries of each."""
    return [entry for group in groups for entry in list(group)[:limit]]


def parse_field(setting: str) -> tuple[str, Any]:
    """A field of FlashPrefillConfig and its value, not checked, from FIELD=VALUE with a value as in JSON.

    Raises:
        ValueError: It is written in another way or there is no such field.
    """
    name, equals, value = setting.partition("=")
    if not equals or name not in FlashPrefillConfig.__dataclass_fields__:
        known = ", ".join(FlashPrefillConfig.__dataclass_fields__)
        raise ValueError(f"FIELD=VALUE with one of the fields {known}, got {setting!r}")
    return name, _json_or_text(value)


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
