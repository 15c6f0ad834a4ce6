"""The thirteen RULER tasks (arXiv 2404.06654), generated here from their published definitions.

A task makes a sample from a random generator and an amount (words, lines, documents): its prompt, the beginning of the
answer that the published templates put into the model's mouth, and the strings expected in what follows. `fit_amount` finds
the amount that fills a length.

The prompts' wording is RULER's (NVIDIA, Apache-2.0). Departures: keys and listed words come from `ruler_words`; the essays
are whatever text is passed in; sentences are split at full stops by a regular expression; the solved example of variable
tracking and common words is made anew for each sample.
"""

from __future__ import annotations

import math
import re
import string
import uuid
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from eval.ruler_words import word_pairs

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."


@dataclass(frozen=True)
class Sample:
    """A prompt, the start of its answer, and the strings that the rest of the answer must hold."""

    prompt: str
    answer_start: str
    expected: list[str]


@dataclass(frozen=True)
class Sources:
    """Texts that tasks draw from.

    Attributes:
        essay: Sentences of the ordinary text.
        qa: By task name, the records to ask about.
    """

    essay: list[str]
    qa: dict[str, list[QaRecord]] = field(default_factory=dict)


@dataclass(frozen=True)
class QaRecord:
    """A question, the documents that answer it, and the accepted answers."""

    question: str
    documents: list[str]
    answers: list[str]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        make: Makes a sample from a generator, an amount and the sources; more is longer.
        new_tokens: Tokens that the answer may take; they count towards the length.
        score: Share of a sample that is right, from the answer and the expected strings.
        least: The smallest amount.
        most: The largest amount that the sources allow; None if there is no such limit.
        make_short: What takes the place of ``make`` for lengths under 4096 tokens, as published.
    """

    make: Callable[[Random, int, Sources], Sample]
    new_tokens: int
    score: Callable[[str, Sequence[str]], float]
    least: int = 1
    most: Callable[[Sources], int] | None = None
    make_short: Callable[[Random, int, Sources], Sample] | None = None

    def sample(self, seed: str, amount: int, sources: Sources, length: int) -> Sample:
        """The sample of a seed for prompts of ``length`` tokens; the same arguments give the same sample."""
        make = self.make_short if self.make_short and length < 4096 else self.make
        return make(Random(seed), amount, sources)


def match_all(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that the answer holds, whatever their case."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


def match_part(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer holds any of the expected strings, else 0."""
    return float(any(text.lower() in answer.lower() for text in expected))


def split_sentences(text: str) -> list[str]:
    """Sentences of a text with its white space collapsed."""
    return re.split(r"(?<=[.!?]) ", " ".join(text.split()))


def _value(kind: str, random: Random, words: Sequence[str]) -> str:
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    return random.choice(words) if kind == "words" else str(uuid.UUID(int=random.getrandbits(128), version=4))


def _key(kind: str, random: Random, words: Sequence[str], hidden: Container[str]) -> str:
    """A key that is not hidden: nobody asks for it."""
    while (key := _value(kind, random, words)) in hidden:
        pass
    return key


def needles(
    haystack: Literal["noise", "essay", "needles"],
    keys: str = "words",
    values: str = "numbers",
    key_count: int = 1,
    value_count: int = 1,
    query_count: int = 1,
) -> Callable[[Random, int, Sources], Sample]:
    """A needle task: ``key_count`` keys with ``value_count`` values each are hidden, ``query_count`` keys are asked for."""
    key_count = max(key_count, query_count)
    total = key_count * value_count

    def make(random: Random, amount: int, sources: Sources) -> Sample:
        words = word_pairs()
        hidden: dict[str, list[str]] = {}
        while len(hidden) < key_count:
            hidden.setdefault(_value(keys, random, words), [_value(values, random, words) for _ in range(value_count)])
        sentences = [NEEDLE.format(kind=values, key=key, value=value) for key, chosen in hidden.items() for value in chosen]
        random.shuffle(sentences)
        if haystack == "essay":
            context = " ".join(_insert_at_depths(_stretch(sources.essay, amount, random), sentences, random))
        else:
            made = [NOISE] * amount
            if haystack == "needles":
                pairs = [(_key(keys, random, words, hidden), _value(values, random, words)) for _ in range(amount)]
                made = [NEEDLE.format(kind=values, key=key, value=value) for key, value in pairs]
            for place in sorted(random.sample(range(amount), total), reverse=True):
                made.insert(place, sentences.pop())
            context = "\n".join(made)
        asked = random.sample(sorted(hidden), query_count)
        query = f"{', '.join(asked[:-1])}, and {asked[-1]}" if len(asked) > 1 else asked[0]
        return _needle_sample(context, query, values, [value for key in asked for value in hidden[key]])

    return make


def _needle_sample(context: str, query: str, kind: str, expected: list[str]) -> Sample:
    if len(expected) == 1:
        some, are_all, are, kind = "A", "is", "is", kind[:-1]
    else:
        some, are_all, are = "Some", "are all", "are"
    hidden = "is" if len(expected) == 1 else "are"
    return Sample(
        f"{some} special magic {kind} {hidden} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n{context}\n"
        f"What {are_all} the special magic {kind} for {query} mentioned in the provided text?",
        f" The special magic {kind} for {query} mentioned in the provided text {are}",
        expected,
    )


def _stretch(sentences: Sequence[str], amount: int, random: Random) -> list[str]:
    """Consecutive sentences of ``amount`` words, the last cut short, from a random one on, from the first after the end."""
    start, stretch = random.randrange(len(sentences)), []
    while amount > 0:
        words = sentences[(start + len(stretch)) % len(sentences)].split(" ")
        stretch.append(" ".join(words[:amount]))
        amount -= len(words)
    return stretch


def _insert_at_depths(sentences: list[str], inserted: list[str], random: Random) -> list[str]:
    """Sentences with others inserted at different ones of forty evenly spaced depths."""
    depths = sorted(random.sample([round(100 * i / 39) for i in range(40)], len(inserted)))
    places = [len(sentences) * depth // 100 for depth in depths]
    for place, sentence in zip(reversed(places), reversed(inserted), strict=True):
        sentences.insert(place, sentence)
    return sentences


def variable_tracking(random: Random, amount: int, sources: Sources) -> Sample:
    """One chain of five variables hidden in noise, after a short solved example; all five are asked for."""
    example = _chain(random, 8, name_length=3)
    question = _chain(random, amount, name_length=5)
    solved = f"{example.prompt}{example.answer_start} {' '.join(example.expected)}\n\n"
    return Sample(solved + question.prompt, question.answer_start, question.expected)


def _chain(random: Random, amount: int, name_length: int, hops: int = 4) -> Sample:
    names: dict[str, None] = {}
    while len(names) <= hops:
        names["".join(random.choices(string.ascii_uppercase, k=name_length))] = None
    variables, value = list(names), str(random.randint(10000, 99998))
    chain = [f"VAR {variables[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in zip(variables, variables[1:], strict=False)]
    sentences = [NOISE + "\n"] * amount
    for shift, place in enumerate(sorted(random.sample(range(amount), len(chain)))):
        sentences.insert(place + shift, chain[shift])
    context = " ".join(sentences).replace(". \n", ".\n")
    return Sample(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{hops + 1} variables are assgined the value {value}, they are: ",
        variables,
    )


def common_words(often: int, seldom: int, example: tuple[int, int, int]) -> Callable[[Random, int, Sources], Sample]:
    """Ten words are listed ``often`` times, the others ``seldom``, after a solved example of (words, often, seldom).

    ``amount`` counts different words.
    """

    def make(random: Random, amount: int, sources: Sources) -> Sample:
        first, question = _word_list(random, *example), _word_list(random, amount, often, seldom)
        solved = f"{first.prompt}{first.answer_start} {_numbered(first.expected)}\n"
        return Sample(solved + question.prompt, question.answer_start, question.expected)

    return make


def _word_list(random: Random, amount: int, often: int, seldom: int, common: int = 10) -> Sample:
    words = random.sample(word_pairs(), amount)
    listed = words[:common] * often + words[common:] * seldom
    random.shuffle(listed)
    return Sample(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{_numbered(listed)}\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        words[:common],
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def frequent_words(random: Random, amount: int, sources: Sources, alpha: float = 2.0) -> Sample:
    """Made-up words by Zipf's law with exponent ``alpha``; the most frequent is dots, the next three are asked for."""
    vocabulary: dict[str, None] = {"...": None}
    # The published vocabulary has a word per 50 tokens; words past the last that occurs once change nothing.
    for _ in range(math.isqrt(amount) + 4):
        vocabulary["".join(random.choices(string.ascii_lowercase, k=6))] = None
    words = list(vocabulary)
    zeta = sum(k**-alpha for k in range(1, 100_000))
    counts = [int(amount * k**-alpha / zeta) for k in range(1, len(words) + 1)]
    coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    random.shuffle(coded)
    return Sample(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(coded)}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        words[1:4],
    )


def _documents(records: Sequence[QaRecord]) -> list[str]:
    """All different documents."""
    return list(dict.fromkeys(text for record in records for text in record.documents))


def questions(name: str) -> Callable[[Random, int, Sources], Sample]:
    """A question about one record's documents among others'. ``amount`` counts documents."""

    def make(random: Random, amount: int, sources: Sources) -> Sample:
        records = sources.qa[name]
        record = random.choice(records)
        others = [text for text in _documents(records) if text not in record.documents]
        shown = record.documents + random.sample(others, max(0, min(amount - len(record.documents), len(others))))
        random.shuffle(shown)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(shown, 1))
        task = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        return Sample(
            f"{task}\n\nThe following are given documents.\n\n{context}\n\n{task}\n\nQuestion: {record.question}",
            " Answer:",
            record.answers,
        )

    return make


TASKS = {
    "niah_single_1": Task(needles("noise"), 128, match_all),
    "niah_single_2": Task(needles("essay"), 128, match_all),
    "niah_single_3": Task(needles("essay", values="uuids"), 128, match_all),
    "niah_multikey_1": Task(needles("essay", key_count=4), 128, match_all),
    "niah_multikey_2": Task(needles("needles"), 128, match_all),
    "niah_multikey_3": Task(needles("needles", keys="uuids", values="uuids"), 128, match_all),
    "niah_multivalue": Task(needles("essay", value_count=4), 128, match_all),
    "niah_multiquery": Task(needles("essay", query_count=4), 128, match_all),
    "vt": Task(variable_tracking, 30, match_all, least=6),
    "cwe": Task(
        common_words(30, 3, (40, 10, 3)),
        120,
        match_all,
        least=11,
        most=lambda sources: len(word_pairs()),
        make_short=common_words(6, 1, (20, 3, 1)),
    ),
    "fwe": Task(frequent_words, 50, match_all, least=40),
    "qa_1": Task(questions("qa_1"), 32, match_part, most=lambda sources: len(_documents(sources.qa["qa_1"]))),
    "qa_2": Task(questions("qa_2"), 32, match_part, most=lambda sources: len(_documents(sources.qa["qa_2"]))),
}


def fit_amount(task: Task, sources: Sources, count_tokens: Callable[[Sample], int], length: int, seed: str) -> int:
    """The largest amount, to within 2 %, whose sample and answer take at most ``length`` tokens.

    Args:
        task: The task.
        sources: Texts it draws from.
        count_tokens: Tokens of a sample's prompt and the start of its answer, as the model will get them.
        length: Tokens, with those that the answer may take.
        seed: The same seed gives the same sample.

    Raises:
        ValueError: Not even the smallest sample fits.
    """

    def room(amount: int) -> int:
        return length - task.new_tokens - count_tokens(task.sample(seed, amount, sources, length))

    if room(task.least) < 0:
        raise ValueError(f"length must be at least {length - room(task.least)} tokens for this task, got {length}")
    most = _most(task, sources, length)
    low, high = task.least, 2 * task.least
    while high <= most and room(high) >= 0:
        low, high = high, 2 * high
    high = min(high, most + 1)
    # Each trial encodes a whole prompt, and 98 % full is full enough.
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if room(middle) >= 0 else (low, middle)
    return low


def _most(task: Task, sources: Sources, length: int) -> int:
    """The largest amount that may fit: no amount's unit is shorter than a token."""
    return min(length, task.most(sources)) if task.most else length


def make_sample(
    task: Task, sources: Sources, count_tokens: Callable[[Sample], int], length: int, amount: int, seed: str
) -> Sample:
    """The sample of a seed with as much as fills ``length`` tokens to 98 % or more, if the task's units and sources allow
    that; if not even the least fits, that. ``amount`` is where the search begins."""
    most, fitting = _most(task, sources, length), None
    low, high = task.least - 1, most + 1
    while True:
        sample = task.sample(seed, amount, sources, length)
        used = count_tokens(sample) + task.new_tokens
        if used <= length:
            low, fitting = amount, sample
        else:
            high = amount
        if high - low <= 1 or 0.98 * length <= used <= length:
            return fitting or sample
        between = fitting is not None and high <= most
        guess = (low + high) // 2 if between else int(amount * 0.99 * length / used)
        amount = min(max(guess, low + 1), high - 1)
