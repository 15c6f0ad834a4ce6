"""What the retrieval model is trained on: its tokenizer, and windows of ordinary text with facts planted in them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.haystack import CODE_DIGITS, random_fact

NAME_POOL = 100_000
ANSWER_WEIGHT = 4.0
SPECIAL_TOKENS = ["<|pad|>", "<|end|>"]
# Every byte has a token.
LEAST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose digits stand alone, so that a code is always ``CODE_DIGITS`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[i : i + 100_000] for i in range(0, len(text), 100_000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")


def training_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Token ids of all texts, one after the other; pieces are encoded in parallel."""
    pieces = [text[i : i + 1_000_000] for text in texts for i in range(0, len(text), 1_000_000)]
    return np.concatenate([np.array(ids) for ids in tokenizer(pieces, add_special_tokens=False)["input_ids"]])


class PlantedWindows:
    """Endless windows of ordinary text, most with facts stated once and asked again later."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, corpus: np.ndarray, seed: int):
        self.corpus = corpus
        self.rng = np.random.default_rng(seed)
        random = Random(seed)
        names = [random_fact(random) for _ in range(NAME_POOL)]
        questions = tokenizer(["\n" + fact.question for fact in names], add_special_tokens=False)["input_ids"]
        self.questions = [np.array(ids, dtype=np.int64) for ids in questions]
        self.digits = np.array(tokenizer.convert_tokens_to_ids(list("0123456789")), dtype=np.int64)
        self.ending = np.array(tokenizer(".\n", add_special_tokens=False)["input_ids"], dtype=np.int64)

    def window(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and loss weights, both [length]; a code's first appearance cannot be predicted and weighs nothing."""
        start = self.rng.integers(0, len(self.corpus) - length)
        text = self.corpus[start : start + length]
        text_weights = np.ones(length, dtype=np.float32)
        if self.rng.random() < 0.3:
            return text, text_weights
        fact_count = int(self.rng.integers(2, max(4, min(48, length // 128))))
        positions, owners = [], []
        for owner in range(fact_count):
            stated = self.rng.random() * 0.9
            asked = stated + (1 - stated) * self.rng.random(self.rng.integers(1, 4))
            if owner < 2:
                # The far corners are rare among uniform draws: without these, a fact that opened a 16K window was found
                # in 67 % of the questions at its end (200 asked), and every other one in 99 %.
                # The very first token serves the model as attention sink as well, so facts that begin there need practice of
                # their own: before, 2 to 5 % of them were missed at 1K to 16K tokens (200 asked), about 0.5 % of the others.
                draw = self.rng.random()
                stated = 0.0 if draw < 0.25 and owner == 0 else self.rng.random() * 64 / length if draw < 0.5 else stated
                asked[0] = 1 - self.rng.random() * 128 / length
            positions.extend([stated, *asked])
            owners.extend([owner] * (1 + len(asked)))
        chosen = self.rng.choice(NAME_POOL, fact_count, replace=False)
        codes = [self.digits[self.rng.integers(0, 10, CODE_DIGITS)] for _ in range(fact_count)]
        pieces, weights, used, seen = [], [], 0, set()
        for index in np.argsort(positions):
            owner, cut = owners[index], int(positions[index] * length)
            question = self.questions[chosen[owner]]
            pieces += [text[used:cut], question, codes[owner], self.ending]
            answer_weight = ANSWER_WEIGHT if owner in seen else 0.0
            weights += [
                text_weights[used:cut],
                np.ones(len(question), dtype=np.float32),
                np.full(CODE_DIGITS, answer_weight, dtype=np.float32),
                np.ones(len(self.ending), dtype=np.float32),
            ]
            used = max(used, cut)
            seen.add(owner)
        pieces.append(text[used:])
        weights.append(text_weights[used:])
        return np.concatenate(pieces)[:length], np.concatenate(weights)[:length]

    def batches(self, length: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches [batch_size, length + 1] made ahead of time by a thread."""
        ready: queue.Queue = queue.Queue(maxsize=4)
        stopped = threading.Event()

        def produce() -> None:
            while not stopped.is_set():
                windows = [self.window(length + 1) for _ in range(batch_size)]
                batch = tuple(torch.from_numpy(np.stack(column)) for column in zip(*windows, strict=True))
                while not stopped.is_set():
                    try:
                        ready.put(batch, timeout=0.5)
                        break
                    except queue.Full:
                        continue

        threading.Thread(target=produce, daemon=True).start()
        try:
            while True:
                yield ready.get()
        finally:
            stopped.set()
