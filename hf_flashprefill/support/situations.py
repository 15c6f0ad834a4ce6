"""Every kind of call the support matrix makes of a model: each takes a tiny model and returns the numbers to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache

from .families import VOCABULARY, tiny_model

LENGTH = 160
PADDED = 61

# Where something costs seconds or an installation, a few families stand for all.
COMPILED_FAMILIES = ("llama", "mistral", "gemma3", "gemma4", "phi3")
QUANTIZED_FAMILIES = ("llama", "qwen3", "gemma3")

Outcome = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Situation:
    """One kind of call.

    Attributes:
        title: What the table says.
        run: The call, on a model in evaluation mode; returns tensors that must not depend on being patched.
        compiled: Whether it runs under torch.compile.
        with_gradients: Whether gradients are enabled while it runs.
        families: The only families it is tried on; all if empty.
    """

    title: str
    run: Callable[[PreTrainedModel], Outcome]
    compiled: bool = False
    with_gradients: bool = False
    families: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.run.__name__


SITUATIONS: dict[str, Situation] = {}


def _situation(title: str, **traits) -> Callable:
    def add(run: Callable[[PreTrainedModel], Outcome]) -> Callable[[PreTrainedModel], Outcome]:
        SITUATIONS[run.__name__] = Situation(title, run, **traits)
        return run

    return add


def prompt(batch: int = 1, length: int = LENGTH) -> torch.Tensor:
    """Token numbers [batch, length] on torch's default device, the same at every call; none is padding."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    return ids.to(torch.get_default_device())


def padding(side: str) -> torch.Tensor:
    """Attention mask [2, LENGTH]: row 0 whole, row 1 padded by PADDED tokens on the given side."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, slice(PADDED) if side == "left" else slice(-PADDED, None)] = 0
    return mask


def _logits(model: PreTrainedModel, mask: torch.Tensor) -> Outcome:
    """Logits of the real tokens; those of padding mean nothing."""
    return (model(prompt(len(mask)), attention_mask=mask).logits[mask.bool()],)


@_situation("forward")
def plain(model):
    return (model(prompt()).logits,)


@_situation("forward that keeps three logits")
def few_logits(model):
    return (model(prompt(), logits_to_keep=3).logits,)


@_situation("forward from inputs_embeds")
def embeddings(model):
    return (model(inputs_embeds=model.get_input_embeddings()(prompt())).logits,)


@_situation("left-padded batch")
def left_padded(model):
    return _logits(model, padding("left"))


@_situation("right-padded batch")
def right_padded(model):
    return _logits(model, padding("right"))


@_situation("three lengths, both sides padded")
def mixed_lengths(model):
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :100] = 0
    mask[1, :30] = 0
    mask[1, -25:] = 0
    return _logits(model, mask)


@_situation("padding with holes")
def holes_in_padding(model):
    mask = padding("left")
    mask[1, 100:110] = 0
    return _logits(model, mask)


@_situation("4-D mask")
def user_mask(model):
    mask = torch.zeros(1, 1, LENGTH, LENGTH)
    mask[:, :, 50:, :20] = 1
    mask += torch.ones_like(mask).triu(1)
    # Additive, which eager and sdpa both understand.
    return (model(prompt(), attention_mask=mask.bool() * torch.finfo(torch.float32).min).logits,)


@_situation("packed by position_ids")
def packed_by_positions(model):
    positions = torch.cat([torch.arange(70), torch.arange(LENGTH - 70)])[None]
    return (model(prompt(), position_ids=positions, use_cache=False).logits,)


@_situation("packed by cu_seq_lens")
def packed_by_lengths(model):
    positions = torch.cat([torch.arange(70), torch.arange(LENGTH - 70)])[None]
    bounds = torch.tensor([0, 70, LENGTH], dtype=torch.int32)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 90, "max_length_k": 90}
    return (model(prompt(), position_ids=positions, use_cache=False, **packing).logits,)


@_situation("prefix continuation")
def prefix_continuation(model):
    ids = prompt()
    cache = model(ids[:, :90], use_cache=True).past_key_values
    return (model(ids[:, 90:], past_key_values=cache).logits,)


@_situation("prefix continuation, left-padded")
def padded_prefix_continuation(model):
    ids, mask = prompt(2), padding("left")
    cache = model(ids[:, :100], attention_mask=mask[:, :100], use_cache=True).past_key_values
    return (model(ids[:, 100:], attention_mask=mask, past_key_values=cache).logits,)


@_situation("continuation after cropping the cache")
def cropped_cache(model):
    ids = prompt()
    cache = model(ids[:, :100], use_cache=True).past_key_values
    cache.crop(-40)
    return (model(ids[:, 60:], past_key_values=cache).logits,)


@_situation("StaticCache")
def static_cache(model):
    cache = StaticCache(config=model.config, max_cache_len=300)
    return (model(prompt(), past_key_values=cache, use_cache=True).logits,)


@_situation("StaticCache in chunks")
def static_cache_chunks(model):
    ids, cache = prompt(), StaticCache(config=model.config, max_cache_len=300)
    # transformers before 5.4 wants to be told where a static cache continues; later versions ignore it.
    steps = [(0, 60), (60, 110), (110, LENGTH)]
    return tuple(
        model(ids[:, a:b], past_key_values=cache, use_cache=True, cache_position=torch.arange(a, b)).logits for a, b in steps
    )


def _generated(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **options) -> Outcome:
    """Tokens, and the logits or scores that led to them."""
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=mask, output_logits=True, **(settings | options))
    # Beams run on differently where two scores tie, so only the first step's logits are compared.
    logits = output.logits if options.get("num_beams", 1) == 1 else output.logits[:1]
    return (output.sequences, *logits)


@_situation("generate, left-padded")
def generate(model):
    return _generated(model, prompt(2), padding("left"))


@_situation("generate with prefill_chunk_size")
def generate_in_chunks(model):
    return _generated(model, prompt(2), padding("left"), prefill_chunk_size=60)


@_situation("generate with a static cache")
def generate_static(model):
    return _generated(model, prompt(2), padding("left"), cache_implementation="static", disable_compile=True)


@_situation("generate with a static cache in chunks")
def generate_static_in_chunks(model):
    chunks = {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 60}
    return _generated(model, prompt(2), padding("left"), **chunks)


@_situation("generate with an offloaded cache")
def generate_offloaded(model):
    return _generated(model, prompt(2), padding("left"), cache_implementation="offloaded")


def _quantized(model: PreTrainedModel, backend: str) -> Outcome:
    cache = {"cache_implementation": "quantized", "cache_config": {"backend": backend, "nbits": 4, "q_group_size": 16}}
    return _generated(model, prompt(), torch.ones_like(prompt()), **cache)


@_situation("generate with a quantised cache (quanto)", families=QUANTIZED_FAMILIES)
def generate_quanto(model):
    return _quantized(model, "quanto")


@_situation("generate with a quantised cache (hqq)", families=QUANTIZED_FAMILIES)
def generate_hqq(model):
    return _quantized(model, "hqq")


@_situation("beam search")
def beams(model):
    return _generated(model, prompt(2), padding("left"), num_beams=3)


@_situation("num_return_sequences")
def return_sequences(model):
    return _generated(model, prompt(2), padding("left"), num_beams=2, num_return_sequences=2)


@_situation("assisted decoding")
def assisted(model):
    draft = tiny_model("llama", num_hidden_layers=1)
    return _generated(model, prompt(), torch.ones_like(prompt()), assistant_model=draft)


@_situation("prompt-lookup decoding")
def prompt_lookup(model):
    ids = prompt().repeat(1, 2)
    return _generated(model, ids, torch.ones_like(ids), prompt_lookup_num_tokens=3)


@_situation("output_attentions")
def output_attentions(model):
    return (model(prompt(), output_attentions=True).logits,)


def _gradients(model: PreTrainedModel) -> Outcome:
    """Loss, and the gradients of the first layer and of the embeddings that were asked for."""
    model.train()
    try:
        model.zero_grad()
        loss = model(prompt(), labels=prompt(), use_cache=False).loss
        loss.backward()
        return (loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None))
    finally:
        model.zero_grad()
        model.eval()


@_situation("training", with_gradients=True)
def training(model):
    return _gradients(model)


@_situation("training with gradient checkpointing", with_gradients=True)
def checkpointed_training(model):
    model.gradient_checkpointing_enable()
    try:
        return _gradients(model)
    finally:
        model.gradient_checkpointing_disable()


@_situation("forward that needs gradients", with_gradients=True)
def forgotten_no_grad(model):
    return (model(prompt()).logits.detach(),)


@_situation("torch.compile of the forward", compiled=True, families=COMPILED_FAMILIES)
def compiled(model):
    return (torch.compile(model, backend="eager")(prompt()).logits,)


@_situation("torch.compile, left-padded batch", compiled=True, families=COMPILED_FAMILIES)
def compiled_padded(model):
    return _logits(torch.compile(model, backend="eager"), padding("left"))


def _compiled_static(model: PreTrainedModel, **options) -> Outcome:
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    # Otherwise transformers compiles on GPUs only.
    config._compile_all_devices = True
    return _generated(model, prompt(2), padding("left"), cache_implementation="static", compile_config=config, **options)


@_situation("generate with a compiled static cache", compiled=True, families=COMPILED_FAMILIES)
def generate_compiled_static(model):
    return _compiled_static(model)


@_situation("generate with a compiled static cache in chunks", compiled=True, families=("llama",))
def generate_compiled_static_in_chunks(model):
    return _compiled_static(model, prefill_chunk_size=60)
