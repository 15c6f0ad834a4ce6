"""The model that a harness asks, its device, and what is asked of any model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from eval.commands import UsageError, first_line
from eval.runner import process_count, process_rank
from hf_flashprefill import prefill_stats
from hf_flashprefill.arithmetic import wider_dtypes

BUNDLED_MODEL = Path(__file__).parent / "checkpoints" / "recall-4m"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(name: str, device: str, dtype: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from the hub or a folder.

    ``shape:NAME`` gives random weights of one of eval.ttft's published shapes with the bundled tokenizer: its answers mean
    nothing, but it shows that a harness fits and runs at that size.

    Raises:
        UsageError: There is no such model, shape or device, or the model's files do not load.
    """
    target = usable_device(device)
    chosen = DTYPES[dtype] if dtype else (torch.bfloat16 if target.type == "cuda" else torch.float32)
    if name.startswith("shape:"):
        return _random_model(name.removeprefix("shape:"), target, dtype)
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise UsageError(f"--model {name}: there is no such folder")
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise UsageError(f"--model {name}: there is no model in this folder, it has no config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=chosen)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--model {name}: {first_line(error)}") from None
    # Damaged weights and edited configs raise whatever they lead to.
    except Exception as error:
        raise UsageError(f"--model {name}: {type(error).__name__}: {first_line(error)}") from None
    return model.to(target).eval(), tokenizer


def _random_model(shape: str, device: torch.device, dtype: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Imported here because eval.ttft imports this module.
    from eval.ttft import SHAPES, random_model

    if shape not in SHAPES:
        raise UsageError(f"--model shape:{shape}: the shapes are {', '.join(sorted(SHAPES))}")
    return random_model(shape, str(device), dtype), AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def usable_device(device: str) -> torch.device:
    """The device of this process.

    Raises:
        UsageError: There is none of that name.
    """
    try:
        target = process_device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"--device {device}: {first_line(error)}") from None
    if target.type == "meta":
        raise UsageError(f"--device {device}: it computes nothing")
    return target


def process_device(device: str) -> torch.device:
    """The device of this process: with `accelerate launch`, each takes a GPU of its own."""
    if process_count() > 1:
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        return state.device if device == "cuda" else torch.device(device)
    return torch.device(device)


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of every text: a begin-of-text token, several as GLM-4's does, or none."""
    whole, text = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(text)] == text), [])


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The model's config, or that of the part of a multimodal model that reads text."""
    return model.config.get_text_config(decoder=True)


def check_context(model: PreTrainedModel, tokens: int) -> None:
    """Look whether the model can read so many tokens. One line on stderr says so if its config stops short of them: rotary
    positions go on, but what a model answers beyond those it was trained on says little.

    Raises:
        UsageError: Its positions are learned one by one, and there are fewer.
    """
    config = text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    if not limit or tokens <= max(limit, _stretched_context(config)):
        return
    # GPT-2 and its like call them wpe, OPT embed_positions, with two more than there are positions; those of images are fewer.
    tables = [(name.rsplit(".", 1)[-1], part) for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
    learned = [table.num_embeddings for name, table in tables if name == "wpe" or "position" in name]
    if any(limit <= positions <= limit + 2 for positions in learned):
        raise UsageError(f"--lengths: {tokens} tokens are more than the {limit} positions of {type(model).__name__}")
    if process_rank() == 0:
        print(f"warning: {tokens} tokens are more than the model's max_position_embeddings, {limit}", file=sys.stderr)


def _stretched_context(config: PretrainedConfig) -> int:
    """Tokens that YaRN and its like stretch rotary positions to; Qwen's configs leave max_position_embeddings as it was."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One for all layers, or one for each type of layer.
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    return max(
        (int((kind.get("factor") or 1) * (kind.get("original_max_position_embeddings") or 0)) for kind in kinds), default=0
    )


def check_numbers(model: PreTrainedModel, totals: torch.Tensor) -> None:
    """Look at logsumexps of logits. A logit of -inf is a token ruled out.

    Raises:
        ValueError: One is not finite: NaN or infinity is among the logits.
    """
    if not totals.isfinite().all():
        dtype, wider = str(model.dtype).removeprefix("torch."), wider_dtypes(model.dtype)
        hint = f"; {wider} may help (--dtype)" if wider else ""
        raise ValueError(f"{type(model).__name__}: its logits are not numbers in {dtype}{hint}")


class _NumbersOnly(LogitsProcessor):
    """Stops ``generate`` where the largest of no numbers would be a token like any other: the first of the vocabulary."""

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_numbers(self._model, scores.logsumexp(-1))
        return scores


@torch.no_grad()
def continuation(
    model: PreTrainedModel, ids: Sequence[int], new_tokens: int, streamer: BaseStreamer | None = None
) -> list[int]:
    """Up to so many tokens that the model as it is finds likeliest after ``ids``, with whatever ends the text.

    Raises:
        ValueError: Its logits are not numbers.
    """
    prompt = torch.tensor([ids], device=model.device)
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": new_tokens, "streamer": streamer}
    with greedy(model):
        made = model.generate(prompt, logits_processor=[_NumbersOnly(model)], **asked)
    return made[0, len(ids) :].tolist()


@contextlib.contextmanager
def greedy(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts ``generate`` has none of the model's own settings (sampling, beams, penalties, kinds of cache), which are
    not what is measured, but for the tokens that end a text and pad it."""
    own = model.generation_config
    stop = own.eos_token_id if own.eos_token_id is not None else getattr(text_config(model), "eos_token_id", None)
    pad = own.pad_token_id if own.pad_token_id is not None else stop[0] if isinstance(stop, list) else stop
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, eos_token_id=stop, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = own


def head_densities(model: PreTrainedModel) -> list[list[float]]:
    """Density of every query head of every layer since the model was patched, to four places; a dense layer has no heads."""
    return [[round(density, 4) for density in layer.head_density] for layer in prefill_stats(model).layers]
