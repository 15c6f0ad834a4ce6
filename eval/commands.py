"""How a command starts and how it ends: its parser, and mistakes that end in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from eval.runner import process_count, process_rank


class UsageError(Exception):
    """Something the user asked for cannot be had; ends the command with one line and exit status 2."""


class WorkError(UsageError):
    """One of a process's own tasks; all others are the same in every process, and the first tells of them."""


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
        if process_count() > 1 and isinstance(error, WorkError):
            print(f"error: process {process_rank()} of {process_count()}: {error}", file=sys.stderr)
        elif process_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if process_rank() == 0:
            print("interrupted", file=sys.stderr)
        return 130


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next ones where it ends in a colon, or its type if it has none."""
    lines = str(error).split("\n") if str(error).strip() else [type(error).__name__]
    lines = [line.strip() for line in lines if line.strip()]
    last = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: last + 1])
