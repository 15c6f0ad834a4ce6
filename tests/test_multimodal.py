"""Prompts to a model of text and images."""

import pytest
import torch
from transformers import masking_utils

from hf_flashprefill import patched, prefill_stats
from hf_flashprefill.support.matrix import SETTINGS
from tests.inputs import tiny_gemma3
from tests.tolerance import assert_same_output

needs_overlays = pytest.mark.skipif(
    not hasattr(masking_utils, "blockwise_overlay"), reason="this transformers has another function for the tokens of an image"
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # One window that cuts, and one layer without.
    return tiny_gemma3(sliding_window=64)


def prompts(types: str) -> dict[str, torch.Tensor]:
    """Two rows, the second padded, with types of tokens as the processor makes them; "image": four tokens of the first row."""
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 190, (2, 150)), torch.ones(2, 150, dtype=torch.int64)
    mask[1, :40] = 0
    kinds = torch.zeros_like(ids)
    if types == "image":
        kinds[0, 70:74] = 1
    return {"input_ids": ids, "attention_mask": mask} | ({} if types == "none" else {"token_type_ids": kinds})


@needs_overlays
@pytest.mark.parametrize("types", ["none", "text"])
@torch.no_grad()
def test_text_alone_runs_sparse_whatever_its_tokens_are_called(types, model):
    expected = model(**prompts(types)).logits
    with patched(model, alpha=0, **SETTINGS):
        logits = model(**prompts(types)).logits
        stats = prefill_stats(model)
    real = prompts(types)["attention_mask"].bool()
    assert_same_output(logits[real], expected[real])
    assert stats.dense_calls == {}
    assert stats.sparse_calls == len(stats.layers) == 2


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@torch.no_grad()
def test_tokens_of_an_image_see_each_other(base, model):
    model.set_attn_implementation(base)
    expected, text = (model(**prompts(types)).logits for types in ("image", "text"))
    assert not torch.allclose(expected, text, atol=1e-3)
    with patched(model, alpha=0, **SETTINGS):
        logits = model(**prompts("image")).logits
        stats = prefill_stats(model)
    real = prompts("image")["attention_mask"].bool()
    assert_same_output(logits[real], expected[real])
    assert stats.dense_calls == {"mask is not plain causal": 2}
    model.set_attn_implementation("sdpa")


@needs_overlays
@torch.no_grad()
def test_generate_goes_on_with_the_types_of_tokens(model):
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompts("text"), **asked)
    with patched(model, alpha=0, **SETTINGS):
        assert torch.equal(model.generate(**prompts("text"), **asked), expected)
        assert prefill_stats(model).sparse_calls == 2
