"""What the harnesses look at before and while they ask a model: the length of its context, and that its logits are numbers."""

import re
from random import Random

import pytest
import torch
import transformers

from eval import models, needle, ruler
from eval.commands import UsageError
from eval.haystack import encode, standard_library_text
from tests.inputs import tiny_gemma3, tiny_model

LEARNED = {
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=100)),
    "opt": (
        transformers.OPTForCausalLM,
        transformers.OPTConfig(
            hidden_size=32,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=100,
            word_embed_proj_dim=32,
        ),
    ),
}


@pytest.mark.parametrize("name", LEARNED)
@torch.no_grad()
def test_learned_positions_end_somewhere(name):
    kind, config = LEARNED[name]
    model = kind(config).eval()
    models.check_context(model, 100)
    model(torch.arange(100)[None])
    with pytest.raises(UsageError, match=f"--lengths: 101 tokens are more than the 100 positions of {kind.__name__}"):
        models.check_context(model, 101)
    with pytest.raises(IndexError):
        model(torch.arange(101)[None])


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        (None, 1000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 100}, 1000),
        ({"rope_type": "linear", "factor": 8.0}, 1000),
    ],
)
def test_rotary_models_are_asked_beyond_their_context_with_a_warning(rope, longest, capsys):
    model = tiny_model(max_position_embeddings=1000)
    model.config.rope_parameters = rope
    models.check_context(model, longest)
    assert capsys.readouterr().err == ""
    models.check_context(model, longest + 1)
    said = f"warning: {longest + 1} tokens are more than the model's max_position_embeddings, 1000\n"
    assert capsys.readouterr().err == said


def test_positions_of_images_are_not_those_of_text():
    models.check_context(tiny_gemma3(max_position_embeddings=1000), 1001)


def test_layers_with_rotary_positions_of_their_own_are_seen():
    config = tiny_model("gemma3").config
    config.max_position_embeddings = 1000
    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    config.rope_parameters = {"full_attention": stretched, "sliding_attention": {"rope_type": "default"}}
    assert models._stretched_context(config) == 4000


@pytest.mark.parametrize("placement", ["end", "middle"])
def test_answers_of_logits_that_are_no_numbers_are_not_wrong_answers(placement, recall_model, monkeypatch):
    model, tokenizer = recall_model
    corpus = encode(tokenizer, standard_library_text("held_out")[:100_000])
    if placement == "end":
        prompt = needle.end_prompt(tokenizer, corpus, 600, 0.5, Random(5))
    else:
        prompt = needle.middle_prompt(tokenizer, corpus, 600, [0.2, 0.8], Random(5))
    assert all(needle.answer(model, prompt).correct)
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: head(hidden) * float("nan"))
    with pytest.raises(ValueError, match="its logits are not numbers in float32$"):
        needle.answer(model, prompt)
    with pytest.raises(ValueError, match="its logits are not numbers"):
        ruler.answer(model, tokenizer, prompt.ids, 3)


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("float16", "; bfloat16 or float32 may help (--dtype)"),
        ("bfloat16", "; float32 may help (--dtype)"),
        ("float32", ""),
    ],
)
def test_only_wider_dtypes_are_proposed(dtype, hint):
    model = tiny_model().to(getattr(torch, dtype))
    with pytest.raises(ValueError, match=re.escape(f"its logits are not numbers in {dtype}{hint}") + "$"):
        models.check_numbers(model, torch.tensor([0.0, float("nan")]))
