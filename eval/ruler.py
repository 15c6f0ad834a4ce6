r"""RULER: thirteen long-context tasks at any length, unpatched against patched.

    python -m eval.ruler --limit 1                                       # proves the path; the bundled model reads no English
    python -m eval.ruler --model meta-llama/Llama-3.1-8B-Instruct --lengths 4096 8192 16384 32768 65536 131072 \
        --samples 100 --qa-1 rajpurkar/squad_v2 --qa-2 hotpotqa/hotpot_qa:distractor --dataset essays.txt

Samples are generated here (`ruler_tasks.py` names the departures from the published generator) and scored as published:
the share of the expected strings that the answer holds, for question answering whether it holds any. A tokenizer with a
chat template wraps every prompt in it. Both states answer the same samples by greedy decoding, so compare the two columns;
compare with published rows only roughly, since full attention itself differs by up to five points between papers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval import commands, models, options, recording, tables
from eval.haystack import encode
from eval.ruler_tasks import TASKS, QaRecord, Sample, Sources, fit_amount, make_sample, split_sentences
from eval.statistics import paired_mean
from eval.texts import add_text_arguments, documents, records
from hf_flashprefill import FlashPrefillConfig, patched, prefill_stats

QA_TASKS = ("qa_1", "qa_2")
# Averages over the thirteen tasks as the FlashPrefill V2 paper prints them, block size 128, alpha .1, on an H20.
PUBLISHED = {
    "Llama-3.1-8B-Instruct, full": (95.98, 94.74, 93.07, 89.06, 86.27, 73.82),
    "Llama-3.1-8B-Instruct, FlashPrefill": (95.16, 94.29, 92.11, 87.49, 84.18, 70.91),
    "Llama-3.1-8B-Instruct, FlashPrefill V2": (95.52, 94.65, 92.95, 88.48, 83.07, 72.08),
    "Qwen3-4B, full": (None, None, None, None, None, 71.22),
    "Qwen3-4B, FlashPrefill": (None, None, None, None, None, 69.02),
    "Qwen3-30B-A3B, full": (None, None, None, None, None, 84.12),
    "Qwen3-30B-A3B, FlashPrefill": (None, None, None, None, None, 82.96),
}
PUBLISHED_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class RulerRow:
    """One sample in the JSON. Scores are shares of the expected strings."""

    task: str
    length: int
    tokens: int
    expected: list[str]
    unpatched_answer: str
    patched_answer: str
    unpatched_score: float
    patched_score: float
    density: float | None
    unpatched_seconds: float
    patched_seconds: float


def encode_sample(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[int]:
    """Token ids of the prompt, in the chat template if the tokenizer has one, with the start of the answer."""
    if tokenizer.chat_template is None:
        # A tokenizer may also put a token after every text; the answer goes on with this one.
        return models.text_prefix(tokenizer) + encode(tokenizer, sample.prompt + sample.answer_start)
    message = [{"role": "user", "content": sample.prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) + sample.answer_start.lstrip()
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], new_tokens: int) -> tuple[str, float]:
    """What the model as it is goes on with, and the seconds it took."""
    started = time.perf_counter()
    text = tokenizer.decode(models.continuation(model, ids, new_tokens), skip_special_tokens=True)
    return text.strip(), time.perf_counter() - started


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    length: int,
    sample: Sample,
    config: FlashPrefillConfig,
) -> RulerRow:
    """The same sample unpatched and patched."""
    task, ids = TASKS[name], encode_sample(tokenizer, sample)
    before, before_seconds = answer(model, tokenizer, ids, task.new_tokens)
    with patched(model, config=config):
        after, after_seconds = answer(model, tokenizer, ids, task.new_tokens)
        density = prefill_stats(model).density
    return RulerRow(
        task=name,
        length=length,
        tokens=len(ids),
        expected=sample.expected,
        unpatched_answer=before,
        patched_answer=after,
        unpatched_score=task.score(before, sample.expected),
        patched_score=task.score(after, sample.expected),
        density=density,
        unpatched_seconds=before_seconds,
        patched_seconds=after_seconds,
    )


def qa_records(raw: Iterable[dict], option: str) -> list[QaRecord]:
    """Questions of an option from records in the form of SQuAD, of HotpotQA, or with plain ``documents`` and ``answers``.

    Questions without an answer are left out.

    Raises:
        UsageError: A record has another form.
    """
    made = []
    for record in raw:
        try:
            answers = record["answers"] if "answers" in record else record["answer"]
            answers = _strings(answers["text"] if isinstance(answers, dict) else answers)
            if "documents" in record:
                texts = _strings(record["documents"])
            elif isinstance(record["context"], dict):
                parts = zip(record["context"]["title"], record["context"]["sentences"], strict=True)
                texts = [f"{title}\n{''.join(sentences)}" for title, sentences in parts]
            else:
                texts = _strings(record["context"])
            (question,) = _strings(record["question"])
        except (KeyError, TypeError, ValueError):
            raise commands.UsageError(
                f"{option} takes records with question, answers, and context or documents; got {sorted(record)}"
            ) from None
        if answers:
            made.append(QaRecord(question, texts, answers))
    if not made:
        raise commands.UsageError(f"{option}: the source has no question with an answer")
    return made


def _strings(value: str | list[str]) -> list[str]:
    """One string or several as a list, without empty ones: those are part of every answer.

    Raises:
        TypeError: It is anything else.
    """
    strings = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(string, str) for string in strings):
        raise TypeError("not strings")
    return [string for string in strings if string.strip()]


def load_sources(args: argparse.Namespace) -> Sources:
    """The texts of all tasks asked for."""
    qa = {}
    for name in QA_TASKS:
        source = getattr(args, name)
        if name in args.tasks:
            dataset, _, subset = source.partition(":")
            option = f"--{name.replace('_', '-')}"
            qa[name] = qa_records(records(dataset, subset or None, args.qa_split, option), option)
    return Sources(split_sentences("\n".join(documents(args))), qa)


def make_samples(
    tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, sources: Sources
) -> list[list[tuple[str, str, int, partial[Sample]]]]:
    """Groups by task and length of (name, task, length, what makes the sample); a sample's name is its seed."""

    def count_tokens(sample: Sample) -> int:
        return len(encode_sample(tokenizer, sample))

    groups = []
    for length in dict.fromkeys(args.lengths):
        for name in args.tasks:
            seeds = [f"{args.seed}/{name}/{length}/{number}" for number in range(args.samples)]
            try:
                amount = fit_amount(TASKS[name], sources, count_tokens, length, seeds[0])
            except ValueError as error:
                raise commands.UsageError(f"--lengths, for --tasks {name}: {error}") from None
            make = partial(make_sample, TASKS[name], sources, count_tokens, length, amount)
            groups.append([(seed, name, length, partial(make, seed)) for seed in seeds])
    return groups


def summarise(rows: list[dict]) -> list[dict]:
    """Per task and length, and per length over all tasks: scores, and the paired change with its standard error."""
    summary = []
    for length in sorted({row["length"] for row in rows}):
        at_length = [row for row in rows if row["length"] == length]
        tasks = [name for name in TASKS if any(row["task"] == name for row in at_length)]
        entries = [_entry(name, length, [row for row in at_length if row["task"] == name]) for name in tasks]
        average = {key: tables.mean([entry[key] for entry in entries]) for key in ("unpatched", "patched", "change", "density")}
        errors = [entry["change_standard_error"] for entry in entries]
        error = None if None in errors else sum(e**2 for e in errors) ** 0.5 / len(errors)
        average |= {"task": "average", "length": length, "samples": len(at_length), "change_standard_error": error}
        average["dense"] = tables.densities(at_length)["dense"]
        summary += [*entries, average]
    return summary


def _entry(task: str, length: int, rows: list[dict]) -> dict:
    change, error = paired_mean([row["patched_score"] - row["unpatched_score"] for row in rows])
    return {
        "task": task,
        "length": length,
        "samples": len(rows),
        "unpatched": tables.mean([row["unpatched_score"] for row in rows]),
        "patched": tables.mean([row["patched_score"] for row in rows]),
        "change": change,
        "change_standard_error": error,
        **tables.densities(rows),
    }


def summary_table(summary: list[dict]) -> str:
    """Tasks down, lengths across, unpatched and patched scores in percent as the papers print them."""
    lengths = sorted({entry["length"] for entry in summary})
    entries = {(entry["task"], entry["length"]): entry for entry in summary}
    names = [name for name in (*TASKS, "average") if any((name, length) in entries for length in lengths)]
    header = ["task", *(f"{length}{state}" for length in lengths for state in ("", " patched"))]
    cells = [
        [name, *(f"{100 * entries[name, length][s]:.1f}" for length in lengths for s in ("unpatched", "patched"))]
        for name in names
    ]
    densities = [tables.format_densities(entries["average", length], "samples") for length in lengths]
    return tables.format_table(header, [*cells, ["density", *(cell for density in densities for cell in ("", density))]])


def published_table() -> str:
    header = ["published average", *(str(length) for length in PUBLISHED_LENGTHS)]
    cells = [[name, *("" if v is None else f"{v:.2f}" for v in values)] for name, values in PUBLISHED.items()]
    return tables.format_table(header, cells)


def build_parser() -> argparse.ArgumentParser:
    parser = commands.Parser("ruler", __doc__)
    options.add_run_arguments(parser, "ruler", lengths=[2048])
    add_text_arguments(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="default: all whose source is given")
    parser.add_argument(
        "--samples", type=int, default=5, help="per task and length (default: %(default)s; papers use 25 to 500)"
    )
    parser.add_argument("--qa-1", help="`datasets` name[:subset] or local file, such as rajpurkar/squad_v2")
    parser.add_argument("--qa-2", help="`datasets` name[:subset] or local file, such as hotpotqa/hotpot_qa:distractor")
    parser.add_argument("--qa-split", default="validation", help="of both (default: %(default)s)")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    config = options.check_run_arguments(args).resolved()
    options.check_range("--samples", args.samples, 1)
    missing = [name for name in QA_TASKS if getattr(args, name) is None]
    if args.tasks is None:
        args.tasks = [name for name in TASKS if name not in missing]
    args.tasks = list(dict.fromkeys(args.tasks))
    for name in missing:
        if name in args.tasks:
            raise commands.UsageError(f"--tasks {name} needs a source: give --{name.replace('_', '-')}")
    model, tokenizer = models.load_model(args.model, args.device, args.dtype)
    models.check_context(model, max(args.lengths))
    sources = load_sources(args)
    samples = options.limited(make_samples(tokenizer, args, sources), args.limit)

    def work(i: int) -> list[dict]:
        _, name, length, make = samples[i]
        return [asdict(compare(model, tokenizer, name, length, make(), config))]

    names = [seed for seed, *_ in samples]
    result = recording.run_and_record("ruler", args, model, config, names, work, summarise, sources)
    if result:
        print(summary_table(result.summary))
        print(f"\nfor orientation, FlashPrefill V2's paper\n{published_table()}\nwrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
