"""Write the support matrix of the installed transformers as Markdown; exit status 1 if anything differs."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from transformers.utils import logging

from ..command_line import Parser, unwritable_reason
from .families import FAMILIES
from .matrix import BASES, check_column, columns
from .situations import SITUATIONS
from .table import render


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m hf_flashprefill.support", description=__doc__)
    every = "(default: all)"
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY", help=every)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), metavar="BASE", help=every)
    parser.add_argument(
        "--situations", nargs="+", choices=SITUATIONS, default=list(SITUATIONS), metavar="SITUATION", help=every
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes half of the time")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print it)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.output is not None:
        reason = unwritable_reason(options.output)
        if reason is not None:
            parser.error(f"--output {options.output}: {reason}")
    # The models are so small that a second thread costs more than it does.
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    situations = [name for name in options.situations if not (options.no_compile and SITUATIONS[name].compiled)]
    matrix = {}
    for family, base in columns(options.families, options.bases):
        print(f"{family} on {base}", file=sys.stderr)
        matrix[family, base] = check_column(family, base, situations)
    text = render(matrix)
    if options.output is None:
        print(text, end="")
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    return int(any(cell.verdict == "WRONG" for column in matrix.values() for cell in column.values()))


if __name__ == "__main__":
    sys.exit(main())
