"""What every harness needs: options, a loaded model, words for its tables, and errors that end in one line."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eval.runner import process_count, process_rank
from hf_flashprefill import FlashPrefillConfig, prefill_stats

BUNDLED_MODEL = Path(__file__).parent / "checkpoints" / "recall-4m"
# Tokens; more than any prompt has.
LONGEST = 1 << 24
# For ``generate``, which takes what nobody asks for from the model's own settings.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class UsageError(Exception):
    """Something the user asked for cannot be had; ends the command with one line and exit status 2."""


class Parser(argparse.ArgumentParser):
    """The options of ``python -m eval.NAME``; a mistake is a UsageError, so that it ends in one line like all others."""

    def __init__(self, name: str, documentation: str):
        super().__init__(prog=f"python -m eval.{name}", description=documentation.split("\n\n")[0])

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def run_command(main: Callable[[list[str]], int]) -> int:
    """Run a command's main function and turn usage errors into one line on stderr and exit status 2."""
    try:
        return main(sys.argv[1:])
    except UsageError as error:
        if process_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if process_rank() == 0:
            print("interrupted", file=sys.stderr)
        return 130


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="hub id, folder or shape:NAME (default: the bundled model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
        parser.add_argument("--alpha", type=float, help=f"threshold, the same for all layers (default: {defaults.alpha})")
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
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other fields of FlashPrefillConfig, values as in JSON"
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
    parser.add_argument("--seed", type=int, default=0)


def check_run_arguments(args: argparse.Namespace, shortest: int = 1) -> FlashPrefillConfig:
    """The settings of the patched state as ``given_config`` has them, after a look at the other arguments. Prompts have at
    least ``shortest`` tokens.

    Raises:
        UsageError: A value is out of its range or a field does not exist.
    """
    check_range("--lengths", args.lengths, shortest, LONGEST)
    return check_config_arguments(args)


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
    if args.output is None:
        return
    if args.output.is_dir():
        raise UsageError(f"--output must name a JSON file, {args.output} is a folder")
    # A picture lies beside it under the same name.
    if args.output.suffix != ".json":
        raise UsageError(f"--output must end in .json, got {args.output}")
    check_writable(args.output)


def check_writable(path: Path) -> None:
    """See whether a file of this name can be written, in folders that may be missing yet. Leaves nothing behind.

    Raises:
        UsageError: It cannot.
    """
    try:
        if path.exists():
            reason = "it is a folder" if path.is_dir() else None if os.access(path, os.W_OK) else "it may not be written"
        else:
            folder = next(folder for folder in path.absolute().parents if folder.exists())
            reason = None if folder.is_dir() else f"{folder} is no folder"
            if reason is None:
                # About as long a name as that of the file of finished tasks, see eval.runner.
                tempfile.NamedTemporaryFile(dir=folder, prefix=f"{path.name}.", suffix=".partial.jsonl").close()
    except OSError as error:
        reason = error.strerror
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


def load_model(name: str, device: str, dtype: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from the hub or a folder.

    ``shape:NAME`` gives random weights of one of eval.ttft's published shapes with the bundled tokenizer: its answers mean
    nothing, but it shows that a harness fits and runs at that size.

    Raises:
        UsageError: There is no such model, shape or device.
    """
    target = usable_device(device)
    chosen = DTYPES[dtype] if dtype else (torch.bfloat16 if target.type == "cuda" else torch.float32)
    if name.startswith("shape:"):
        return _random_model(name.removeprefix("shape:"), target, dtype)
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise UsageError(f"--model {name}: there is no such folder")
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise UsageError(f"--model {name}: there is no model in this folder, it has no config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=chosen)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {name}: {first_line(error)}") from None
    return model.to(target).eval(), tokenizer


def _random_model(shape: str, device: torch.device, dtype: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Imported here because eval.ttft imports this module.
    from eval.ttft import SHAPES, random_model

    if shape not in SHAPES:
        raise UsageError(f"--model shape:{shape}: the shapes are {', '.join(sorted(SHAPES))}")
    return random_model(shape, str(device), dtype), AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def usable_device(device: str) -> torch.device:
    """The device of this process.

    Raises:
        UsageError: There is none of that name.
    """
    try:
        target = process_device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"--device {device}: {first_line(error)}") from None
    if target.type == "meta":
        raise UsageError(f"--device {device}: it computes nothing")
    return target


def process_device(device: str) -> torch.device:
    """The device of this process: with `accelerate launch`, each takes a GPU of its own."""
    if process_count() > 1:
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        return state.device if device == "cuda" else torch.device(device)
    return torch.device(device)


def read_text(path: str, option: str = "--dataset") -> str:
    """The text of a file that an option names.

    Raises:
        UsageError: It cannot be read as UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path}: {first_line(error)}") from None


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows])


def head_densities(model: PreTrainedModel) -> list[list[float]]:
    """Density of every query head of every layer since the model was patched, to four places; a dense layer has no heads."""
    return [[round(density, 4) for density in layer.head_density] for layer in prefill_stats(model).layers]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def densities(rows: Sequence[dict]) -> dict[str, Any]:
    """For summaries: the density of the rows that ran sparse, and how many stayed dense."""
    return {"density": mean([row["density"] for row in rows]), "dense": sum(row["density"] is None for row in rows)}


def describe(config: FlashPrefillConfig | dict[str, Any]) -> str:
    """Selector and threshold, for titles; ``config`` may be what a result holds."""
    fields = config if isinstance(config, dict) else config.to_dict()
    alphas = fields.get("layer_alphas")
    alpha = f"{min(alphas):g} to {max(alphas):g} by layer" if alphas else f"{fields['alpha']:g}"
    return f"selector {fields['selector']}, alpha {alpha}"


def format_density(density: float | None) -> str:
    return "dense" if density is None else f"{density:.3f}"


def format_densities(summary: dict, counted: str) -> str:
    """What ``densities`` found, if the field ``counted`` says of how many rows; ``dense`` is missing in older results."""
    text, dense = format_density(summary["density"]), summary.get("dense")
    return f"{text}, {dense} of {summary[counted]} dense" if dense and summary["density"] is not None else text


def format_perplexity(nll: float) -> str:
    """The perplexity of a mean negative log-likelihood, which an untrained model can make too large for a float."""
    return f"{math.exp(nll):.2f}" if nll < 20 else f"e^{nll:.1f}"


def format_rise(rise: float, standard_error: float | None) -> str:
    return f"{rise:+.2%}" + ("" if standard_error is None else f" ± {standard_error:.2%}")


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of every text, such as a begin-of-text token."""
    return [] if tokenizer.bos_token_id is None or not tokenizer("")["input_ids"] else [tokenizer.bos_token_id]


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next ones where it ends in a colon, or its type if it has none."""
    lines = str(error).split("\n") if str(error).strip() else [type(error).__name__]
    lines = [line.strip() for line in lines if line.strip()]
    last = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: last + 1])
