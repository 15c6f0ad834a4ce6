"""What the source of an attention layer says about it: which layers fit the seam and which are refused."""

import pytest
import torch

from hf_flashprefill import UnsupportedModelError, fitting, patch_model
from tests.inputs import tiny_model


@pytest.mark.parametrize(
    ("source", "fits"),
    [
        ("attention_mask=attention_mask, attention_mask: torch.Tensor, attention_mask)", True),
        ("attention_mask = encoder_attention_mask", True),
        ("is_cross_attention and attention_mask is not None", True),
        # In GPT-2 only where it computes eager attention in a way of its own.
        ("scores = bias + attention_mask", True),
        ("    - attention_mask: of all tokens\n    * attention_mask: of all tokens", True),
        ("attention_mask = attention_mask", False),
        ("scores = attention_mask + bias", False),
        ("scores = attention_mask * scores", False),
        ("keep = attention_mask & seen", False),
        ("keep = attention_mask | seen", False),
        ("scores = scores * attention_mask", False),
        ("keep = seen & attention_mask", False),
        ("keep = seen | attention_mask", False),
        ("keep = (\n    seen\n    & attention_mask\n)", False),
        ("hidden = 1.0 - attention_mask", False),
        ("hidden = ~attention_mask", False),
        ("attention_mask &= seen", False),
        ("cut = attention_mask[:, :, -1:]", False),
        ("attention_mask.to(query.dtype)", False),
        ("attend(query, indices=chosen)", False),
        ("attend(query, block_indices=chosen)", False),
    ],
)
def test_what_a_layer_may_do_with_its_mask_and_an_index(source, fits, monkeypatch):
    monkeypatch.setattr(fitting, "source_of", lambda cls: source)
    assert (fitting.misfit_of_layer(tiny_model().model.layers[0].self_attn, "sdpa") is None) == fits


def test_models_with_their_own_sparse_index_are_refused():
    model = tiny_model()

    class IndexedAttention(type(model.model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            # Goes through ALL_ATTENTION_FUNCTIONS with an index of its own.
            return super().forward(*args, **kwargs, block_indices=None)

    model.model.layers[0].self_attn.__class__ = IndexedAttention
    with pytest.raises(UnsupportedModelError, match="IndexedAttention brings its own sparse index"):
        patch_model(model)
    assert model.config._attn_implementation == "sdpa"


def test_models_that_calculate_with_their_mask_are_refused():
    model = tiny_model()

    class MaskingAttention(type(model.model.layers[0].self_attn)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            # Goes through ALL_ATTENTION_FUNCTIONS with a longer mask.
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1))
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)

    model.model.layers[0].self_attn.__class__ = MaskingAttention
    with pytest.raises(UnsupportedModelError, match="MaskingAttention changes the attention mask"):
        patch_model(model)
    assert patch_model(tiny_model("gpt2", n_embd=64, n_head=4, n_layer=1)) is not None
