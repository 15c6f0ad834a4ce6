"""Perplexity of long documents, unpatched against patched, in two ways.

    python -m eval.perplexity                                            # the bundled model on held-out Python source
    python -m eval.perplexity --model meta-llama/Llama-3.1-8B --dataset emozilla/pg19-test --lengths 32768 65536
    python -m eval.perplexity --model Qwen/Qwen3-8B --dataset Salesforce/wikitext --subset wikitext-103-raw-v1 --join

**Prefill**: every token of one long prefill, by its position. Many tokens a document, so small rises show, and it tests the
selection everywhere. But these losses are not quite what a model would have at each position if it read no further: a query
block chooses its key blocks with all of its 128 queries, so the choice for one token knows the up to 127 tokens after it.

**Continuation**: the document without its last tokens is prefilled, sparse or dense; the last tokens are then scored on
that cache by dense attention, which is what `generate` does after a prefill, and nothing looks ahead. This is what a user
of `generate` feels, with fewer tokens a document to measure it by.

Both compare the same tokens of the same documents. A rise of .01 is a perplexity 1 % higher. Its standard error is paired:
the spread, over documents and positions, of the difference of mean losses; without a second document there is none for a
single row.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from random import Random

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from eval import commands, models, options, recording, tables
from eval.haystack import encode
from eval.scoring import hidden_states, score_tokens
from eval.statistics import perplexity_rise
from eval.texts import add_text_arguments, documents
from hf_flashprefill import FlashPrefillConfig, patched, prefill_stats


@dataclass(frozen=True)
class BucketRow:
    """Mean losses of the tokens from position ``start`` to before ``end``; the first token of a prompt has none."""

    start: int
    end: int
    tokens: int
    unpatched_nll: float
    patched_nll: float


@dataclass(frozen=True)
class PerplexityRow:
    """One document in the JSON: the prefill by position, and the continuation of its last tokens after a shorter prefill."""

    length: int
    document: str
    density: float | None
    continuation_density: float | None
    unpatched_seconds: float
    patched_seconds: float
    head_density: list[list[float]]
    prefill: list[BucketRow]
    continuation: BucketRow


def compare(
    model: PreTrainedModel, ids: torch.Tensor, name: str, config: FlashPrefillConfig, continuation: int, buckets: int
) -> PerplexityRow:
    """Both ways, unpatched and patched, on one document of token ids [S]."""
    started = time.perf_counter()
    before = score_tokens(model, ids).nll
    between = time.perf_counter()
    with patched(model, config=config):
        after = score_tokens(model, ids).nll
        ended = time.perf_counter()
        density, heads = prefill_stats(model).density, models.head_densities(model)
    length = len(ids)
    edges = [length * part // buckets for part in range(buckets + 1)]
    rows = [_bucket(before, after, max(1, start), end) for start, end in itertools.pairwise(edges)]
    dense, _ = continuation_losses(model, ids, continuation, None)
    sparse, continued_density = continuation_losses(model, ids, continuation, config)
    continued = _bucket(dense, sparse, length - continuation, length)
    seconds = between - started, ended - between
    return PerplexityRow(length, name, density, continued_density, *seconds, heads, rows, continued)


def continuation_losses(
    model: PreTrainedModel, ids: torch.Tensor, continuation: int, config: FlashPrefillConfig | None
) -> tuple[torch.Tensor, float | None]:
    """Losses [S] of the last ``continuation`` tokens, NaN before, after a prefill that is patched if there is a config; and
    the density of that prefill, None if it was dense."""
    context, rest = ids[:-continuation], ids[-continuation:]
    density = None
    cache = DynamicCache(config=model.config)
    if config is None:
        hidden = hidden_states(model, context, cache)
    else:
        with patched(model, config=config):
            hidden = hidden_states(model, context, cache)
            density = prefill_stats(model).density
    # Scoring many tokens at once is not decode to the patched model, which would run it sparse. What follows the prefill is.
    losses = score_tokens(model, rest, cache, hidden[-1]).nll
    return torch.cat([torch.full((len(context),), float("nan")), losses]), density


def _bucket(before: torch.Tensor, after: torch.Tensor, start: int, end: int) -> BucketRow:
    means = (losses[start:end].double().mean().item() for losses in (before, after))
    return BucketRow(start, end, end - start, *means)


def windows(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int = 0
) -> list[tuple[str, torch.Tensor]]:
    """Up to ``count`` named stretches of ``length`` tokens: the start of each document that is long enough, and if those
    are too few, the stretches after it. Each begins with what the tokenizer puts in front of a text. With a seed other than 0
    the first stretch of a document begins at random instead, less than a stretch from its start."""
    prefix = models.text_prefix(tokenizer)
    room = length - len(prefix)
    kept: list[tuple[int, list[int]]] = []
    for number, text in enumerate(texts):
        ids = encode(tokenizer, text)
        if len(ids) >= room:
            kept.append((number, ids))
        if len(kept) == count:
            break
    places = []
    for i, (number, ids) in enumerate(kept):
        last = len(ids) - room
        first = Random(f"{seed}/{length}/{number}").randrange(min(room, last + 1)) if seed else 0
        places += [(start, number, i) for start in range(first, last + 1, room)]
    places.sort()
    return [
        (f"{number}/{start}", torch.tensor(prefix + kept[i][1][start : start + room])) for start, number, i in places[:count]
    ]


def summarise(rows: list[dict]) -> list[dict]:
    """Per length: the prefill as a whole and by position, and the continuation."""
    summary = []
    for length in sorted({row["length"] for row in rows}):
        chosen = [row for row in rows if row["length"] == length]
        buckets = [[row["prefill"][i] for row in chosen] for i in range(len(chosen[0]["prefill"]))]
        continued = tables.densities([{"density": row["continuation_density"]} for row in chosen])
        summary.append(
            {
                "length": length,
                "documents": len(chosen),
                **tables.densities(chosen),
                **{f"continuation_{name}": value for name, value in continued.items()},
                "prefill": _paired([bucket for row in chosen for bucket in row["prefill"]]),
                "continuation": _paired([row["continuation"] for row in chosen]),
                "by_position": [{"start": b[0]["start"], "end": b[0]["end"]} | _paired(b) for b in buckets],
            }
        )
    return summary


def _paired(groups: list[dict]) -> dict:
    """Losses of all groups together and the rise from one state to the other."""
    tokens = sum(group["tokens"] for group in groups)
    losses = {f"{s}_nll": sum(g["tokens"] * g[f"{s}_nll"] for g in groups) / tokens for s in ("unpatched", "patched")}
    rise = perplexity_rise([g["patched_nll"] - g["unpatched_nll"] for g in groups], [g["tokens"] for g in groups])
    return {"tokens": tokens} | losses | {"rise": rise.rise, "rise_standard_error": rise.standard_error}


def summary_table(summary: list[dict]) -> str:
    header = ["tokens", "documents", "density", "way", "scored", "unpatched", "patched", "rise"]
    cells = [
        [str(row["length"]), str(row["documents"]), _density_cell(row, way), way, *_cells(row[way])]
        for row in summary
        for way in ("prefill", "continuation")
    ]
    return tables.format_table(header, cells)


def _density_cell(row: dict, way: str) -> str:
    """The density of a way; older results have none of the continuation."""
    if way == "continuation":
        if "continuation_density" not in row:
            return ""
        row = row | {"density": row["continuation_density"], "dense": row["continuation_dense"]}
    return tables.format_densities(row, "documents")


def position_table(table: list[dict]) -> str:
    header = ["position", "scored", "unpatched", "patched", "rise"]
    return tables.format_table(header, [[f"{row['start']}-{row['end']}", *_cells(row)] for row in table])


def _cells(entry: dict) -> list[str]:
    losses = [tables.format_perplexity(entry[f"{state}_nll"]) for state in ("unpatched", "patched")]
    return [str(entry["tokens"]), *losses, tables.format_rise(entry["rise"], entry["rise_standard_error"])]


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("perplexity", __doc__)
    options.add_run_arguments(parser, "perplexity", lengths=[4096, 8192])
    add_text_arguments(parser)
    parser.add_argument("--join", action="store_true", help="join the documents into one, for data sets of short ones")
    parser.add_argument("--documents", type=int, default=4, help="per length (default: %(default)s)")
    parser.add_argument("--continuation", type=int, default=512, help="tokens scored after the prefill (default: %(default)s)")
    parser.add_argument("--buckets", type=int, default=8, help="parts of a prompt, by position (default: %(default)s)")
    return parser


def check_arguments(args: argparse.Namespace) -> FlashPrefillConfig:
    config = options.check_run_arguments(args, shortest=3).resolved()
    shortest = min(args.lengths)
    options.check_range("--documents", args.documents, 1)
    for name, most in (("continuation", shortest - 2), ("buckets", shortest // 2)):
        if not 1 <= getattr(args, name) <= most:
            allowed = f"from 1 to {most} for prompts of {shortest} tokens"
            raise commands.UsageError(f"--{name} must be {allowed}, got {getattr(args, name)}")
    return config


def source(args: argparse.Namespace) -> Iterator[str]:
    """The documents, joined into one if asked to."""
    return iter(["\n".join(documents(args))]) if args.join else documents(args)


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    config = check_arguments(args)
    model, tokenizer = models.load_model(args.model, args.device, args.dtype)
    models.check_context(model, max(args.lengths))
    groups = []
    for length in dict.fromkeys(args.lengths):
        found = windows(source(args), tokenizer, length, args.documents, args.seed)
        if not found:
            raise commands.UsageError(f"--lengths {length}: no document has that many tokens")
        groups.append([(f"{length}/{name}", ids) for name, ids in found])
    prompts = options.limited(groups, args.limit)

    def work(i: int) -> list[dict]:
        name, ids = prompts[i]
        return [asdict(compare(model, ids, name, config, args.continuation, args.buckets))]

    names, text = [name for name, _ in prompts], [ids.tolist() for _, ids in prompts]
    result = recording.run_and_record("perplexity", args, model, config, names, work, summarise, text)
    if result:
        print(summary_table(result.summary))
        print(f"\nprefill of {result.summary[-1]['length']} tokens, by position")
        print(position_table(result.summary[-1]["by_position"]))
        print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
