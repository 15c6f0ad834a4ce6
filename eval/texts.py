"""Where the harnesses' ordinary text comes from: a `datasets` name, a local file, or Python's standard library."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from eval.commands import UsageError, first_line
from eval.haystack import encode, standard_library_text

BUILDERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
# A haystack needs no more; the longest prompts have some 4M characters.
CORPUS_CHARACTERS = 20_000_000


def read_text(path: str, option: str = "--dataset") -> str:
    """The text of a file that an option names.

    Raises:
        UsageError: It cannot be read as UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path}: {first_line(error)}") from None


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", help="`datasets` name or local file; default: held-out standard-library source")
    parser.add_argument("--subset", help="configuration of the data set, such as wikitext-103-raw-v1")
    parser.add_argument("--split", default="test", help="of the data set (default: %(default)s)")
    parser.add_argument("--column", default="text", help="of the data set (default: %(default)s)")


def documents(args: argparse.Namespace) -> Iterator[str]:
    """The documents of the text source, read as they are asked for; rows without a text are skipped.

    Raises:
        UsageError: There is no such file, data set, split or column, the column holds no text, or there is nothing but white
            space in it, which shows at its end.
    """
    if args.dataset is None:
        yield standard_library_text("held_out")
        return
    is_empty = True
    for record in records(args.dataset, args.subset, args.split):
        if args.column not in record:
            raise UsageError(f"--column {args.column}: {args.dataset} has the columns {sorted(record)}")
        text = record[args.column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise UsageError(f"--column {args.column}: {args.dataset} has {type(text).__name__} there, not text")
        is_empty = is_empty and not text.strip()
        yield text
    if is_empty:
        raise UsageError(f"--dataset {args.dataset}: there is no text in it")


def records(dataset: str, subset: str | None, split: str, option: str = "--dataset") -> Iterator[dict]:
    """Records of the data set that an option names; a local text file is one record with a column "text"."""
    path = Path(dataset)
    suffix = path.suffix.lower()
    if path.is_file() and not path.stat().st_size:
        # Where datasets would raise StopIteration.
        raise UsageError(f"{option} {dataset}: there is no text in it")
    if path.is_file() and suffix not in BUILDERS:
        yield {"text": read_text(dataset, option)}
        return
    if not path.exists() and (dataset.startswith((".", "/", "~")) or suffix in {*BUILDERS, ".txt", ".md", ".py"}):
        raise UsageError(f"{option} {dataset}: there is no such file")
    try:
        import datasets
    except ImportError:
        raise UsageError(f'{option} needs the package datasets: pip install -e ".[eval]"') from None
    try:
        if path.is_file():
            # A file by itself has no splits; datasets calls the whole of it "train".
            yield from datasets.load_dataset(BUILDERS[suffix], data_files=dataset, split="train", streaming=True)
        else:
            yield from datasets.load_dataset(dataset, subset, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {dataset}: {first_line(error)}") from None


def corpus_ids(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[int]:
    """Token ids of the text source, all documents joined, up to 20 M characters of it."""
    parts, size = [], 0
    for document in documents(args):
        parts.append(document)
        size += len(document)
        if size >= CORPUS_CHARACTERS:
            break
    return encode(tokenizer, "\n".join(parts))
