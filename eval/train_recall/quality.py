"""How good the trained model is on text that training never saw: its loss and its dense recall."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from eval.haystack import encode, encode_fact, plant, random_facts, standard_library_text

DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
# Each fact of a recall prompt and its question, with a token for every one of their 38 bytes.
LEAST_RECALL_LENGTH = 2 * len(DEPTHS) * 38


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, window: int = 4096) -> float:
    """Nats per token over all whole windows of the held-out text."""
    corpus = encode(tokenizer, standard_library_text("held_out"))
    losses = []
    for start in range(0, len(corpus) - window, window):
        ids = torch.tensor([corpus[start : start + window]], device=model.device)
        losses.append(model(ids, labels=ids, use_cache=False).loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def dense_recall(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lengths: list[int],
    depths: list[float],
    prompts: int,
    seed: int,
) -> list[dict]:
    """Exact-match recall per length and depth, questions at the end of held-out text.

    Answers are forced into the prompt and each digit must be the model's first choice, which is what greedy decoding
    would have produced. Every prompt holds one fact per depth and asks for all of them.
    """
    corpus = encode(tokenizer, standard_library_text("held_out"))
    random, rows = Random(seed), []
    for length in lengths:
        hits = dict.fromkeys(depths, 0)
        batch = max(1, min(prompts, 65536 // length))
        for first in range(0, prompts, batch):
            count = min(batch, prompts - first)
            made = [recall_prompt(tokenizer, corpus, depths, length, random) for _ in range(count)]
            ids = torch.tensor([ids for ids, _ in made], device=model.device)
            asked_from = min(answers[0].start for _, answers in made) - 1
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
                choice = model(ids, use_cache=False, logits_to_keep=length - asked_from).logits.argmax(-1)
            # choice[:, i] continues position asked_from + i, so it is compared with the token after that.
            right = F.pad(choice[:, :-1] == ids[:, asked_from + 1 :], (asked_from + 1, 0))
            for row, (_, answers) in enumerate(made):
                for depth, answer in zip(depths, answers, strict=True):
                    hits[depth] += int(right[row, answer].all())
        rows += [{"length": length, "depth": d, "recall": hits[d] / prompts, "prompts": prompts} for d in depths]
    return rows


def recall_prompt(
    tokenizer: PreTrainedTokenizerFast, corpus: list[int], depths: list[float], length: int, random: Random
) -> tuple[list[int], list[slice]]:
    """Token ids [length] with one fact per depth, all asked for at the end, and where the answers stand."""
    facts = [encode_fact(tokenizer, fact) for fact in random_facts(random, len(depths))]
    pieces = [(depth, fact.sentence) for depth, fact in zip(depths, facts, strict=True)]
    ids, positions = plant(corpus, length, pieces + [(1.0, fact.sentence) for fact in facts], random)
    asked = zip(facts, positions[len(facts) :], strict=True)
    return ids, [slice(start + fact.answer_start, start + fact.answer_end) for fact, start in asked]
