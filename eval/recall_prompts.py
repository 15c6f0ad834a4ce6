"""Prompts with many planted facts and many questions about them, all over the prompt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerBase

from eval.commands import UsageError
from eval.haystack import encode_fact, plant, random_facts
from eval.models import text_prefix
from eval.options import check_range

PLACEMENTS = ("second-half", "everywhere", "end")
# Made-up names are 343,000 in all.
MOST_FACTS = 100_000


@dataclass(frozen=True)
class Question:
    """One question of a prompt.

    Attributes:
        answer: Token positions of the code; the tokens before it ask for it.
        distance: Tokens from the nearest earlier copy of the code to this one.
        fact_distance: Tokens from the fact itself; equals ``distance`` when it is asked for the first time.
        asked_before: How often the same fact was asked earlier in the prompt.
    """

    answer: slice
    distance: int
    fact_distance: int
    asked_before: int


@dataclass(frozen=True)
class RecallPrompt:
    """Token ids with planted facts and questions.

    Attributes:
        name: Unique among the prompts of a run; the same arguments give the same prompt.
        ids: int64 [S] token ids.
        questions: In the order they stand in the prompt.
        text: bool [S], the tokens of the ordinary text, without what is planted and without the first token.
    """

    name: str
    ids: torch.Tensor
    questions: list[Question]
    text: torch.Tensor


def check_prompt_arguments(args: argparse.Namespace) -> None:
    """Look at --prompts, --facts and --questions; --lengths have been looked at.

    Raises:
        UsageError: A number is out of its range.
    """
    check_range("--prompts", args.prompts, 1)
    check_range("--facts", args.facts, 1, MOST_FACTS)
    check_range("--questions", args.questions, 1)
    together, shortest = args.facts + args.questions, min(args.lengths)
    if together > shortest:
        raise UsageError(f"--facts and --questions must be at most {shortest} together for that --lengths, got {together}")


def make_prompts(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Sequence[int],
    length: int,
    prompts: int,
    facts: int = 16,
    questions: int = 48,
    seed: int = 0,
    placement: str = "second-half",
) -> list[RecallPrompt]:
    """Prompts of ``length`` tokens.

    Args:
        tokenizer: Encodes the facts.
        corpus: Token ids of the ordinary text.
        length: Tokens of each prompt.
        prompts: How many. A smaller number gives the first ones of a larger.
        facts: Facts in each prompt.
        questions: Questions in each prompt, dealt to the facts in turn: 48 questions ask each of 16 facts three times.
        seed: Prompts are the same for the same seed, length and number.
        placement: ``"second-half"``: facts in the first half, questions in the second. ``"everywhere"``: facts anywhere,
            questions anywhere after their fact. ``"end"``: facts anywhere, all questions at the end.

    Raises:
        ValueError: A number is too small, the placement is unknown, or the prompt or the text is too short.
    """
    for name, value in (("prompts", prompts), ("facts", facts), ("questions", questions)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {PLACEMENTS}, got {placement!r}")
    return [
        make_prompt(tokenizer, corpus, length, facts, questions, placement, f"{seed}/{length}/{number}")
        for number in range(prompts)
    ]


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Sequence[int],
    length: int,
    facts: int,
    questions: int,
    placement: str,
    name: str,
) -> RecallPrompt:
    """One prompt; ``name`` is its seed."""
    random = Random(name)
    encoded = [encode_fact(tokenizer, fact) for fact in random_facts(random, facts)]
    owners = [i % facts for i in range(questions)]
    random.shuffle(owners)
    fact_end = 0.5 if placement == "second-half" else 1.0
    fact_at = [random.random() * fact_end for _ in range(facts)]
    # Ties must leave a fact before its questions, so the second entry orders them.
    spots = [(fraction, 0, owner) for owner, fraction in enumerate(fact_at)]
    spots += [(_question_fraction(placement, fact_at[owner], random), 1, owner) for owner in owners]
    spots.sort()
    pieces = [(fraction, encoded[owner].sentence) for fraction, _, owner in spots]
    prefix = text_prefix(tokenizer)
    ids, positions = plant(corpus, length, pieces, random, prefix)

    text = torch.ones(length, dtype=torch.bool)
    text[: max(1, len(prefix))] = False
    seen: dict[int, list[int]] = {}
    asked = []
    for start, (_, _, owner) in zip(positions, spots, strict=True):
        fact = encoded[owner]
        text[start : start + len(fact.sentence)] = False
        answer = slice(start + fact.answer_start, start + fact.answer_end)
        earlier = seen.setdefault(owner, [])
        if earlier:
            asked.append(Question(answer, answer.start - earlier[-1], answer.start - earlier[0], len(earlier) - 1))
        earlier.append(answer.start)
    return RecallPrompt(name, torch.tensor(ids), asked, text)


def _question_fraction(placement: str, fact: float, random: Random) -> float:
    if placement == "end":
        return 1.0
    start = 0.5 if placement == "second-half" else fact
    return start + random.random() * (1 - start)
