"""Recall of many planted facts, asked all over a long prompt, and the perplexity of the text around them.

    python -m eval.recall                                                # the bundled model, minutes on two CPU cores
    python -m eval.recall --model meta-llama/Llama-3.1-8B-Instruct --lengths 32768 65536 --alpha 0.1

A prompt is ordinary text with made-up facts ("The secret code of Dalomi is 481923.") and, later, the same sentences again.
The second time, the sentence up to the code is a question. The answer is teacher-forced: it counts as right if every token
of the code would have been the model's first choice, which is what greedy decoding would have said. One forward call so
answers dozens of questions, and because they stand all over the second half of the prompt and not at its end, it is the
block selection that decides them: the last query blocks see every key block by rule and hide what a selection loses.

The same prompts are scored unpatched and patched. Differences are paired: recall per question, with a 95 % interval
(Agresti and Min), perplexity per prompt over the tokens that belong to no planted sentence, with a standard error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.haystack import encode_fact, plant, random_facts
from eval.scoring import score_tokens

PLACEMENTS = ("second-half", "everywhere", "end")


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


class RecallScore(NamedTuple):
    """What a model made of one prompt.

    Attributes:
        correct: bool [Q], per question.
        nll: float32 [S], negative log-likelihood of every token in nats; NaN for the first.
    """

    correct: torch.Tensor
    nll: torch.Tensor


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
    prefix = [] if tokenizer.bos_token_id is None or not tokenizer("")["input_ids"] else [tokenizer.bos_token_id]
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


def score(model: PreTrainedModel, prompt: RecallPrompt) -> RecallScore:
    """Answers and text perplexity of one prompt, in one forward call of the model as it is, patched or not.

    Raises:
        ValueError: The model computes its logits in a way that cannot be done in parts.
    """
    scores = score_tokens(model, prompt.ids)
    correct = [bool(scores.first_choice[question.answer].all()) for question in prompt.questions]
    return RecallScore(torch.tensor(correct), scores.nll)
