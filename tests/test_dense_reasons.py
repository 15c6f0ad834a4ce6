"""Which arguments of a layer's call keep it dense, asked of dense_reason itself."""

import pytest
import torch

import hf_flashprefill.attention as seam
from hf_flashprefill import FlashPrefillConfig
from hf_flashprefill.attention import PrefillSettings, dense_reason
from hf_flashprefill.causal_mask import mask_class
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import LENGTH
from tests.inputs import tiny_model


def reason(
    model=None, key_len=LENGTH, dtype=torch.float32, mask_len=LENGTH, is_of_buffer=False, value_dim=32, dropout=0.0, **arguments
):
    """Of a call of the first layer that would run sparse but for what is named."""
    model, settings = model or tiny_model(), PrefillSettings(FlashPrefillConfig(**SETTINGS), "sdpa")
    query, key = torch.zeros(1, 4, LENGTH, 32, dtype=dtype), torch.zeros(1, 2, key_len, 32, dtype=dtype)
    mask, layer = torch.ones(1, mask_len, dtype=torch.bool), model.model.layers[0].self_attn
    mask = mask.as_subclass(mask_class(None, is_of_buffer))
    return dense_reason(settings, layer, query, key, key[..., :value_dim], mask, dropout, arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, None),
        ({"sinks": torch.zeros(LENGTH)}, "attention sinks"),
        ({"s_aux": torch.zeros(LENGTH)}, "attention sinks"),
        ({"s_aux": torch.zeros(4)}, None),
        ({"softcap": 50.0}, "softcap"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"cu_seq_lens_q": torch.tensor([0, LENGTH])}, "packed sequences"),
        ({"indices": torch.zeros(1)}, "the model's own sparse index"),
        ({"block_indices": torch.zeros(1)}, "the model's own sparse index"),
        ({"cache": object()}, "continuous batching"),
        ({"is_causal": False}, "not causal"),
        ({"is_causal": True}, None),
        ({"output_attentions": True}, "output_attentions"),
        ({"dropout": 0.1}, "dropout"),
        ({"mask_len": LENGTH + 1}, "keys are not those of the mask"),
        ({"key_len": LENGTH + 1}, "keys are not those of the mask"),
        ({"key_len": LENGTH + 1, "is_of_buffer": True}, None),
        ({"is_of_buffer": True}, "keys are not those of the mask"),
        ({"value_dim": 16}, "value head_dim differs"),
        ({"sliding_window": LENGTH - 1}, "the layer's window is not the mask's"),
        ({"sliding_window": LENGTH}, None),
        ({"dtype": torch.float64}, "unsupported dtype"),
    ],
    ids=lambda case: "-".join(case) or "plain" if isinstance(case, dict) else str(case),
)
@torch.no_grad()
def test_what_changes_the_attention_keeps_the_call_dense(arguments, expected):
    assert reason(**arguments) == expected


@torch.no_grad()
def test_what_no_kernel_takes_stays_dense(monkeypatch):
    asked = []
    monkeypatch.setattr(seam, "lacks_kernel", lambda *kind: asked.append(kind) or True)
    assert reason() == "no GPU kernel"
    assert asked == [("auto", torch.device("cpu"), torch.float32, 32)]


@torch.no_grad()
def test_the_layers_own_word_on_causality_holds_unless_the_call_says_otherwise():
    model = tiny_model()
    model.model.layers[0].self_attn.is_causal = False
    assert reason(model) == "not causal"
    assert reason(model, is_causal=True) is None
    assert reason(model, is_causal=None) == "not causal"
