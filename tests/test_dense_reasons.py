"""Which arguments of a layer's call keep it dense, asked of dense_reason itself."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_flashprefill.attention as seam
from hf_flashprefill import FlashPrefillConfig, patch_model, prefill_stats
from hf_flashprefill.attention import PrefillSettings, dense_reason
from hf_flashprefill.causal_mask import mask_class
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import LENGTH
from tests.inputs import tiny_model
from tests.tolerance import assert_same_output


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


@pytest.mark.parametrize("place", ["registry", "instance", "torch"])
@torch.no_grad()
def test_an_attention_put_in_the_place_of_transformers_own_is_the_one_that_is_called(place, monkeypatch):
    """As sequence parallelism does, whose layers hold a part of the prompt each."""
    model, ids = tiny_model(), torch.randint(3, 150, (1, LENGTH))
    patch_model(model, alpha=0, **SETTINGS)
    called, own = [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def attention(*args, **kwargs):
        called.append("attention")
        return own(*args, **kwargs)

    def kernel(*args, **kwargs):
        called.append("kernel")
        return sdpa(*args, **kwargs)

    if place == "registry":
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attention)
    elif place == "instance":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", attention)
    else:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    replaced = model(ids).logits
    assert len(called) == 2
    assert prefill_stats(model).dense_calls == {"attention replaced": 2}
    monkeypatch.undo()
    assert_same_output(replaced, model(ids).logits)
    assert prefill_stats(model).sparse_calls == 2


@torch.no_grad()
def test_tensors_of_another_kind_stay_dense():
    model, settings = tiny_model(), PrefillSettings(FlashPrefillConfig(**SETTINGS), "sdpa")
    query = torch.zeros(1, 4, LENGTH, 32)
    wrapped = TwoTensor(query, query)
    mask = torch.ones(1, LENGTH, dtype=torch.bool).as_subclass(mask_class(None, False))
    layer = model.model.layers[0].self_attn
    assert dense_reason(settings, layer, wrapped, wrapped, wrapped, mask, 0.0, {}) == "tensor subclass"


@torch.no_grad()
def test_the_layers_own_word_on_causality_holds_unless_the_call_says_otherwise():
    model = tiny_model()
    model.model.layers[0].self_attn.is_causal = False
    assert reason(model) == "not causal"
    assert reason(model, is_causal=True) is None
    assert reason(model, is_causal=None) == "not causal"
