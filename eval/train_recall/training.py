"""Training in stages of growing windows."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaForCausalLM

from eval.train_recall.data import ANSWER_WEIGHT, PlantedWindows


@dataclass(frozen=True)
class Stage:
    """``steps`` optimiser steps on windows of ``window`` tokens."""

    window: int
    steps: int


def train(
    model: LlamaForCausalLM,
    data: PlantedWindows,
    stages: list[Stage],
    *,
    tokens_per_step: int,
    learning_rate: float,
    minutes: float,
) -> list[dict]:
    """Run all stages and return one log record per fifty steps.

    After ``minutes`` it stops where it is. The learning rate falls with the steps done or with the time gone, whichever is
    further, so that a slow machine leaves a settled model too, only of fewer steps.
    """
    device = model.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    total = sum(stage.steps for stage in stages)
    step, log, started = 0, [], time.monotonic()
    for stage in stages:
        # Activations grow with tokens per micro-batch, not with the window.
        batch_size = max(1, tokens_per_step // stage.window)
        batches = data.batches(stage.window, batch_size)
        for _ in tqdm(range(stage.steps), desc=f"window {stage.window}", mininterval=5):
            time_gone = (time.monotonic() - started) / (minutes * 60)
            # Warm up 100 steps, then cosine to a tenth.
            progress = min(1.0, max(time_gone, max(0, step - 100) / max(1, total - 100)))
            rate = learning_rate * min(1.0, (step + 1) / 100) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens, weights = (part.to(device, non_blocking=True) for part in next(batches))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(tokens[:, :-1], use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
            weight = weights[:, 1:].flatten()
            (losses * weight).sum().div(weight.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            is_over = step == total or time_gone >= 1
            if step % 50 == 0 or is_over:
                answers = weight == ANSWER_WEIGHT
                log.append(
                    {
                        "step": step,
                        "window": stage.window,
                        "seconds": round(time.monotonic() - started, 1),
                        "text_loss": losses[weight == 1].mean().item(),
                        "answer_loss": losses[answers].mean().item() if answers.any() else None,
                    }
                )
                print(json.dumps(log[-1]), flush=True)
            if is_over:
                break
        batches.close()
        if is_over:
            break
    return log
