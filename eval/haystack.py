"""Text with planted facts: what the recall model is trained on and what the needle harness asks.

The text is the Python standard library's own source, so nothing is downloaded. Files are split by a hash of their path:
one in ten is held out from training and serves the harnesses. Training may add the sources of installed packages.
"""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from transformers import PreTrainedTokenizerBase

from eval.commands import UsageError

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
CODE_DIGITS = 6


@dataclass(frozen=True)
class Fact:
    """One planted fact: a made-up name and its six-digit code."""

    name: str
    code: str

    @property
    def question(self) -> str:
        """The sentence up to the code; a model that remembers continues it with the code."""
        return f"The secret code of {self.name} is "

    @property
    def statement(self) -> str:
        return f"{self.question}{self.code}."


def random_fact(rng: Random) -> Fact:
    name = "".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize()
    return Fact(name, "".join(rng.choice("0123456789") for _ in range(CODE_DIGITS)))


def random_facts(rng: Random, count: int) -> list[Fact]:
    """``count`` facts whose names all differ."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        fact = random_fact(rng)
        facts.setdefault(fact.name, fact)
    return list(facts.values())


@functools.cache
def standard_library_text(split: Literal["train", "held_out"]) -> str:
    """The running interpreter's standard-library sources, joined in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = []
    for path in python_sources(root):
        held_out = zlib.crc32(path.relative_to(root).as_posix().encode()) % 10 == 0
        if held_out == (split == "held_out"):
            parts.append(path.read_text(encoding="utf-8", errors="replace"))
    if not parts:
        raise FileNotFoundError(f"no Python sources of the {split} split under {root}")
    return "\n".join(parts)


def package_text(name: str) -> str:
    """The Python sources of an installed package, joined in path order; more text to train on than one library has.

    Raises:
        FileNotFoundError: The package is not installed or holds no Python sources.
    """
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in package_sources(name))
    if not text:
        raise FileNotFoundError(f"no installed package {name!r} with Python sources")
    return text


def package_sources(name: str) -> list[Path]:
    """Python files of an installed package in path order; none if it is not there."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    folders = [] if spec is None else spec.submodule_search_locations or []
    return [path for folder in folders for path in python_sources(Path(folder))]


def python_sources(root: Path) -> Iterator[Path]:
    """Python files under ``root`` in path order, without tests and installed packages."""
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            yield path


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class EncodedFact:
    """A fact in tokens: ``sentence[answer_start:answer_end]`` is the code; what is before it asks for it."""

    sentence: list[int]
    answer_start: int
    answer_end: int

    @property
    def question(self) -> list[int]:
        return self.sentence[: self.answer_start]

    @property
    def answer(self) -> list[int]:
        return self.sentence[self.answer_start : self.answer_end]


def encode_fact(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> EncodedFact:
    """The fact as a line of its own. A tokenizer that merges across the border moves the border before the merge.

    Raises:
        UsageError: No tokens of the line are the code: the tokenizer does not know digits, or merges them with what follows.
    """
    sentence = encode(tokenizer, f"\n{fact.statement}\n")
    asked = encode(tokenizer, f"\n{fact.question}")
    answered = encode(tokenizer, f"\n{fact.question}{fact.code}")
    encoded = EncodedFact(sentence, _common_prefix(asked, sentence), _common_prefix(answered, sentence))
    said = tokenizer.decode(encoded.answer)
    if not said.strip().endswith(fact.code):
        raise UsageError(f"the tokenizer has no tokens for the code {fact.code} alone, got {said!r}")
    return encoded


def _common_prefix(first: list[int], second: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def plant(
    corpus: Sequence[int], length: int, pieces: Sequence[tuple[float, list[int]]], random: Random, prefix: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """A stretch of ``corpus`` with pieces planted in it.

    Args:
        corpus: Token ids to draw the stretch from, at random.
        length: Tokens of the result.
        pieces: (fraction of the stretch before the piece, token ids); fractions must not fall.
        random: Chooses the stretch.
        prefix: Tokens in front, such as a begin-of-text token.

    Returns:
        The token ids and the position of each piece in them.

    Raises:
        ValueError: ``length`` has no room for the pieces, or the corpus is shorter than the room they leave.
    """
    room = length - len(prefix) - sum(len(ids) for _, ids in pieces)
    if room < 0:
        raise ValueError(f"length must be at least {length - room} tokens to hold what is planted, got {length}")
    if room > len(corpus):
        raise ValueError(f"the text must have at least {room} tokens for prompts of {length}, got {len(corpus)}")
    offset = random.randrange(len(corpus) - room + 1)
    ids, positions, used = list(prefix), [], 0
    for fraction, piece in pieces:
        cut = round(fraction * room)
        ids += corpus[offset + used : offset + cut]
        positions.append(len(ids))
        ids += piece
        used = cut
    return ids + list(corpus[offset + used : offset + room]), positions
