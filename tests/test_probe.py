"""What the notebooks look at agrees with what the model and the operator do."""

import pytest
import torch

from eval.probe import attention_inputs, attention_map, kept_mass
from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention, patched
from tests.inputs import tiny_model


def test_inputs_and_maps_reproduce_the_model_s_own_attention():
    model = tiny_model(implementation="eager")
    ids = torch.randint(2, 199, (90,))
    with torch.no_grad():
        wanted = model(ids[None], output_attentions=True).attentions
    with pytest.raises(ValueError, match="got 'eager'"):
        attention_inputs(model, ids)
    model.set_attn_implementation("sdpa")
    before = torch.nn.functional.scaled_dot_product_attention
    layers = attention_inputs(model, ids)
    assert len(layers) == 2
    for (query, key, value), probabilities in zip(layers, wanted, strict=True):
        assert value.shape == key.shape == (1, 2, 90, 32)
        for head in range(4):
            torch.testing.assert_close(attention_map(query, key, head), probabilities[0, head], rtol=1e-4, atol=1e-5)
    # Nothing is recorded any more afterwards.
    with torch.no_grad():
        model(ids[None])
    assert len(layers) == 2
    assert torch.nn.functional.scaled_dot_product_attention is before


def test_a_patched_model_s_inputs():
    model = tiny_model()
    ids = torch.randint(2, 199, (90,))
    plain = attention_inputs(model, ids)
    with patched(model, alpha=0, min_seq_len=1):
        again = attention_inputs(model, ids)
    torch.testing.assert_close(again[1].query, plain[1].query, rtol=1e-4, atol=1e-5)


def test_kept_mass_by_hand():
    query, key = torch.randn(1, 2, 300, 64), torch.randn(1, 1, 300, 64)
    config = FlashPrefillConfig(alpha=1, sink_blocks=0, window_blocks=1, dense_tail_blocks=0)
    index = flash_prefill_attention(query, key, key, config=config, return_index=True).index
    mask = index.to_mask()[0, 1]
    probabilities = attention_map(query, key, 1)
    kept = sum(probabilities[i, j].item() for i in range(300) for j in range(i + 1) if mask[i // 128, j // 128])
    assert abs(kept_mass(index, query, key)[1].item() - kept / 300) < 1e-4
    whole = flash_prefill_attention(query, key, key, config=FlashPrefillConfig(alpha=0), return_index=True).index
    torch.testing.assert_close(kept_mass(whole, query, key), torch.ones(2))
