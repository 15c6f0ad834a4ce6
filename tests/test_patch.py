"""patch_model and its relatives: what they accept, refuse, restore and leave behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from hf_flashprefill import (
    FlashPrefillConfig,
    UnsupportedModelError,
    is_patched,
    patch_model,
    patched,
    patched_config,
    prefill_stats,
    register_attention,
    unpatch_model,
    unpatched,
)
from tests.inputs import tiny_model
from tests.tolerance import assert_same_output


def ids() -> torch.Tensor:
    return torch.arange(3, 153)[None]


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_unpatch_gives_back_the_previous_implementation(base):
    model = tiny_model(implementation=base)
    assert patch_model(model) is model
    assert is_patched(model)
    assert unpatch_model(model) is model
    assert model.config._attn_implementation == base
    assert not is_patched(model)
    unpatch_model(model)
    assert model.config._attn_implementation == base


def test_patching_again_replaces_the_settings():
    model = patch_model(tiny_model(), alpha=0.1, min_seq_len=1)
    with torch.no_grad():
        model(ids())
    patch_model(model, config=FlashPrefillConfig(sink_blocks=3), alpha=0.2)
    assert patched_config(model) == FlashPrefillConfig(sink_blocks=3, alpha=0.2).resolved()
    assert prefill_stats(model).layers == []
    assert unpatch_model(model).config._attn_implementation == "sdpa"


def test_two_models_keep_their_own_settings():
    first, second = patch_model(tiny_model(), alpha=0.1), patch_model(tiny_model(), alpha=0.3)
    assert (patched_config(first).alpha, patched_config(second).alpha) == (0.1, 0.3)


def fail_inside(context, check) -> None:
    with context:
        assert check()
        raise RuntimeError("inside")


def test_context_managers_restore_after_an_exception():
    model = tiny_model(implementation="eager")
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside(patched(model, alpha=0.1), lambda: is_patched(model))
    assert model.config._attn_implementation == "eager"
    patch_model(model, alpha=0.2)
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside(unpatched(model), lambda: not is_patched(model))
    assert patched_config(model).alpha == 0.2
    with patched(model, alpha=0.7):
        assert patched_config(model).alpha == 0.7
    assert patched_config(model).alpha == 0.2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": -0.1}, ValueError, "alpha"),
        ({"alpha": 1.1}, ValueError, "alpha"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"alphas": 0.1}, TypeError, "alphas"),
        ({"config": {"alpha": 0.1}}, TypeError, "config"),
        ({"dense_layers": [2]}, ValueError, "dense_layers must lie from 0 to 1"),
        ({"layer_alphas": [0.1]}, ValueError, "layer_alphas must hold 2 numbers, one a layer, got 1"),
        ({"config": "nowhere.json"}, OSError, "nowhere.json"),
    ],
)
def test_bad_settings_change_nothing(arguments, error, message):
    model = tiny_model()
    with pytest.raises(error, match=message):
        patch_model(model, **arguments)
    assert model.config._attn_implementation == "sdpa"


def test_unsupported_models_are_named_and_left_alone():
    config = FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = FalconForCausalLM(config)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match="FalconForCausalLM.*AttentionInterface"):
        patch_model(model)
    assert model.config._attn_implementation == before
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        patch_model(torch.nn.Linear(2, 2))


def test_models_with_their_own_sparse_index_are_refused(monkeypatch):
    model = tiny_model()

    class IndexedAttention(type(model.model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            # Goes through ALL_ATTENTION_FUNCTIONS with an index of its own.
            return super().forward(*args, **kwargs, block_indices=None)

    model.model.layers[0].self_attn.__class__ = IndexedAttention
    with pytest.raises(UnsupportedModelError, match="IndexedAttention brings its own sparse index"):
        patch_model(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_does_not_take_the_name_is_restored(monkeypatch):
    model = tiny_model()
    original = type(model).set_attn_implementation
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(UnsupportedModelError, match="did not take"):
        patch_model(model)
    monkeypatch.setattr(type(model), "set_attn_implementation", original)
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_saved_models_know_nothing_of_us(tmp_path):
    model = patch_model(tiny_model(), alpha=0.1, min_seq_len=1)
    model.save_pretrained(tmp_path)
    assert "block_sparse" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_patched(loaded)
    assert_same_output(loaded(ids()).logits, unpatch_model(model)(ids()).logits)


@torch.no_grad()
def test_from_pretrained_takes_the_registered_name(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    name = register_attention(FlashPrefillConfig(alpha=0, min_seq_len=1))
    assert name == "block_sparse_prefill"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    assert_same_output(loaded(ids()).logits, model(ids()).logits)
    assert prefill_stats(loaded).sparse_calls == 2
    assert unpatch_model(loaded).config._attn_implementation == "sdpa"


@torch.no_grad()
def test_peft_models_are_patched_inside():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = model(ids()).logits
    assert patch_model(model, alpha=0, min_seq_len=1) is model
    assert_same_output(model(ids()).logits, expected)
    assert prefill_stats(model).sparse_calls == 2
    merged = model.merge_and_unload()
    assert is_patched(merged)
    assert_same_output(merged(ids()).logits, expected)
    assert not is_patched(unpatch_model(merged))


@torch.no_grad()
def test_only_the_text_part_of_a_multimodal_model_is_patched():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "type": "default"},
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    expected = model(ids()).logits
    before = model.config.vision_config._attn_implementation
    patch_model(model, alpha=0, min_seq_len=1)
    assert model.config.vision_config._attn_implementation == before
    assert_same_output(model(ids()).logits, expected)
    assert prefill_stats(model).sparse_calls == 2
    unpatch_model(model)
    assert model.config.text_config._attn_implementation == "sdpa"
