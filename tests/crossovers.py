"""What the tests of the crossover share: devices, layer shapes, a rule, and measurements that nobody made."""

from __future__ import annotations

import torch

from hf_flashprefill import FlashPrefillConfig
from hf_flashprefill.crossover import Crossover, LayerShape, known, min_seq_len_for

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
SHAPE = LayerShape(4, 2, 32, torch.float32)  # of tiny_model()
AUTO = FlashPrefillConfig(alpha=0, block_size=64)
RULE = known.rule_of(AUTO)
LLAMA = LayerShape(32, 8, 128, torch.bfloat16)


def measured(tokens: int | None, longest: int = 65536, exhausted: bool = True) -> Crossover:
    return Crossover(tokens, longest, exhausted)


def answer(config=AUTO, shape=SHAPE, device=CPU) -> int:
    return min_seq_len_for(config, shape, device)
