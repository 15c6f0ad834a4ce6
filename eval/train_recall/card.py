"""The model card in the folder of the trained model."""

from __future__ import annotations

import shlex
import sys

import torch
from transformers import LlamaForCausalLM

from eval.haystack import CODE_DIGITS


def model_card(model: LlamaForCausalLM, arguments: list[str], record: dict) -> str:
    recall, log, config = record["recall"], record["log"], model.config
    lengths = sorted({row["length"] for row in recall})
    depths = sorted({row["depth"] for row in recall})
    value = {(row["length"], row["depth"]): row["recall"] for row in recall}
    table = ["| tokens | " + " | ".join(f"depth {d:g}" for d in depths) + " |", "|---" * (len(depths) + 1) + "|"]
    packages = "".join(f", and of the installed package {name} {version}" for name, version in record["packages"].items())
    table += [f"| {n} | " + " | ".join(f"{value[n, d]:.3f}" for d in depths) + " |" for n in lengths]
    return (
        f"""---
license: apache-2.0
---
# A small Llama that recalls planted facts

{model.num_parameters() / 1e6:.1f} M parameters: {config.num_hidden_layers} layers, {config.num_attention_heads} query heads,
{config.num_key_value_heads} key-value heads, head dim {config.head_dim}, vocabulary {config.vocab_size}. It recalls facts
planted in Python source and knows nothing else: it exists so that the tests and harnesses have a model whose attention
really retrieves. Do not use it for anything else.

## Made by
`python -m eval.train_recall {shlex.join(arguments)}` on {record["device"]}: {log[-1]["step"]} of
{sum(stage["steps"] for stage in record["settings"]["stages"])} steps in {log[-1]["seconds"] / 60:.1f} minutes,
torch {torch.__version__}, Python {sys.version.split()[0]}.

## Data
The Python standard library's source (PSF licence), read from the interpreter that ran the training, without its test
suites, one file in ten held out{packages}. Seven windows in ten carry made-up facts ("The secret code of Dalomi is 481923.")
that are asked again later. Text loss in nats per token: {log[-1]["text_loss"]:.2f} in training,
{record["held_out_loss"]:.2f} on held-out files.

## Dense recall on held-out text
Exact match of all {CODE_DIGITS} digits, facts at five depths asked one after the other at the end of the prompt,
{recall[0]["prompts"]} questions a cell, weights as stored (bfloat16). All records are in `training.json`.

"""
        + "\n".join(table)
        + "\n"
    )
