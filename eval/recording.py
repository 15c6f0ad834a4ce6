"""What a run leaves behind: its result, what decides whether an interrupted run can go on, and where it took place."""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import hf_flashprefill
from eval.commands import UsageError, WorkError, first_line
from eval.runner import PartialRun, process_count
from eval.schema import ModelRecord, Result
from hf_flashprefill import FlashPrefillConfig, UnsupportedModelError


def run_and_record(
    harness: str,
    args: argparse.Namespace,
    model: PreTrainedModel,
    config: FlashPrefillConfig,
    names: Sequence[str],
    work: Callable[[int], list[dict]],
    summarise: Callable[[list[dict]], list[dict]],
    text: Any,
    shows_times: bool = False,
) -> Result | None:
    """Ask a loaded model all prompts and write the JSON file, as ``complete`` does.

    Args:
        harness: Its name.
        args: Parsed arguments, with those of ``add_run_arguments``.
        model: The model that ``work`` asks.
        config: Settings of the patched state.
        names: One per prompt, all different.
        work: Makes the rows of prompt ``i``.
        summarise: Makes the summary from all rows.
        text: What the prompts are made of, which its repr tells apart; a source of the same name may have changed.
        shows_times: Whether that has times, so that rows of another environment are not taken up.

    Returns:
        What was written; None in processes other than the first.

    Raises:
        UsageError: The model cannot be patched or a prompt does not fit.
    """
    run = model_run(harness, args, args.model, model, config)
    others = {"weights": fingerprint(model), "text": zlib.crc32(repr(text).encode())}
    if shows_times:
        others["environment"] = _place(run)
    return complete(run, args.output, names, work, summarise, others=others)


def time_and_record(
    run: Result,
    output: Path,
    names: Sequence[str],
    work: Callable[[int], list[dict]],
    unit: str,
    others: dict[str, Any] | None = None,
) -> Result | None:
    """``complete`` for rows that hold times, which depend on the environment, too: those of another device or of another
    version are not taken up. There is no summary."""
    return complete(run, output, names, work, lambda rows: [], unit, {"environment": _place(run)} | (others or {}))


def _place(run: Result) -> dict[str, Any]:
    """What the times of a run depend on beside its settings."""
    return {name: value for name, value in run.environment.items() if name != "time"}


def complete(
    run: Result,
    output: Path,
    names: Sequence[str],
    work: Callable[[int], list[dict]],
    summarise: Callable[[list[dict]], list[dict]],
    unit: str = "prompt",
    others: dict[str, Any] | None = None,
) -> Result | None:
    """Do all tasks of a run, resuming what an interruption left, and write the JSON file.

    Args:
        run: The result but for its summary and rows.
        output: The JSON file.
        names: One per task, all different.
        work: Makes the rows of task ``i``.
        summarise: Makes the summary from all rows.
        unit: What a task is called in the progress bar.
        others: Plain values that decide the rows, beside the model, settings and arguments of ``run``.

    Returns:
        What was written; None in processes other than the first.

    Raises:
        UsageError: The file is there and is not that of a run with the same settings.
        WorkError: ``work`` finds a model that cannot be patched or a value out of its range.
    """
    check_replaceable(run, output)
    partial = PartialRun(output, run_settings(run) | (others or {}))
    try:
        rows = partial.run(names, work, run.harness, unit)
    except (UnsupportedModelError, ValueError, UsageError) as error:
        raise WorkError(first_line(error)) from None
    if rows is None:
        return None
    result = write_result(run, output, summarise(rows), rows)
    partial.remove()
    return result


def check_replaceable(run: Result, output: Path, outcome: Sequence[str] = ()) -> None:
    """Look whether a run would write over what it could not make again. The result of a run with the same settings may be
    replaced, and a quick look by a run that asks more.

    Args:
        run: The result but for its summary and rows.
        output: The JSON file, which need not be there.
        outcome: Fields of the config that the run finds.

    Raises:
        UsageError: The file is the result of a run with other settings, is no result, or cannot be read.
    """
    try:
        found = Result.read(output)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"--output {output} is not a result; choose another name or remove it") from None

    def settings(result: Result) -> str:
        given = run_settings(result)
        given["config"] = {name: value for name, value in given["config"].items() if name not in outcome}
        given["arguments"] = {name: value for name, value in given["arguments"].items() if name != "limit"}
        return json.dumps(given, sort_keys=True)

    looked, looks = found.arguments.get("limit"), run.arguments.get("limit")
    asks_less = looks is not None and (looked is None or looks < looked)
    if asks_less or settings(found) != settings(run):
        which = f"{found.harness} of {found.environment.get('time')}"
        raise UsageError(f"--output {output} holds another run ({which}); choose another name or remove it")


def write_result(run: Result, output: Path, summary: list[dict], rows: list[dict]) -> Result:
    """Write the JSON file of a run whose rows are there; its time is this moment."""
    result = replace(run, environment=run.environment | {"time": _now()}, summary=summary, rows=rows)
    result.write(output)
    return result


def run_settings(run: Result) -> dict[str, Any]:
    """What decides the rows of a run as far as its result says it."""
    return {"harness": run.harness, "arguments": run.arguments, "model": run.model, "config": run.config}


def model_run(harness: str, args: argparse.Namespace, name: str, model: PreTrainedModel, config: FlashPrefillConfig) -> Result:
    """What is known of a run before its first row: all but the summary and the rows. The model is not patched."""
    identity, arguments = model_record(name, model), recorded_arguments(args)
    return Result(harness, environment(model.device), identity, config.to_dict(), arguments, [], [])


def model_record(name: str, model: PreTrainedModel) -> ModelRecord:
    """What a result says about its model, which must not be patched at the moment."""
    return {
        "name": Path(name).name,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "base_implementation": model.config.get_text_config(decoder=True)._attn_implementation,
    }


def recorded_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a result records as arguments: not those that its other parts hold, nor where files are."""
    of_config = {"alpha", "selector", "min_seq_len", "config", "config_defaults", "set"}
    of_config |= {"pool_size", "correction", "mean_blocks"}
    left_out = {"output", "peer", "before", "device", "dtype", "model", "shape", "backend"} | of_config
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name not in left_out}


def environment(device: torch.device) -> dict[str, Any]:
    """Where a run took place: versions, device, commit."""
    cuda = device.type == "cuda"
    return {
        "time": _now(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "threads": None if cuda else torch.get_num_threads(),
        "processes": process_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": transformers.__version__,
        "hf_flashprefill": hf_flashprefill.__version__,
        "commit": commit_of(Path(__file__).parent),
    }


def package_version(package: str) -> str | None:
    """Of an installed package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def fingerprint(model: PreTrainedModel) -> int:
    """Tells apart models that share a name, such as those of a folder that was trained again, wholly or in part, or whose
    config was edited."""
    where_from = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in model.config.to_dict().items() if name not in where_from}
    found = zlib.crc32(json.dumps(config, sort_keys=True, default=str).encode())
    # Quantised weights may be buffers.
    for parameter in itertools.chain(model.parameters(), model.buffers()):
        if parameter.is_meta or not parameter.numel():
            # Its numbers are on a disk.
            continue
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].cpu()
        found = zlib.crc32(some.contiguous().view(torch.uint8).numpy().tobytes(), found)
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit_of(folder: Path) -> str | None:
    """Of the checkout that a folder is in, with "-dirty" if it differs; None if it is in none."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
