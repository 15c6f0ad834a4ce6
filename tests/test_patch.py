"""patch_model and its relatives: what they accept, refuse, restore and leave behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, MambaConfig, MambaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_flashprefill import (
    FlashPrefillConfig,
    UnsupportedModelError,
    calibrate,
    is_patched,
    patch_model,
    patched,
    patched_config,
    prefill_stats,
    register_attention,
    reset_prefill_stats,
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


@torch.no_grad()
def test_layers_that_do_not_say_which_they_are_have_no_number():
    model = patch_model(tiny_model(), alpha=0, min_seq_len=1)
    model.model.layers[0].self_attn.layer_idx = None
    model(ids(), use_cache=False)
    stats = prefill_stats(model)
    assert [layer.layer for layer in stats.layers] == [None, 1]
    assert [line.split()[0] for line in str(stats).splitlines()[:3]] == ["layer", "-", "1"]


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


def test_models_with_the_same_settings_keep_their_own_base():
    first, second = (patch_model(tiny_model(implementation=base), alpha=0) for base in ("eager", "sdpa"))
    assert unpatch_model(first).config._attn_implementation == "eager"
    assert unpatch_model(second).config._attn_implementation == "sdpa"


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
        ({"layer_alphas": [0.1, 0.2, 0.3]}, ValueError, "layer_alphas must hold 2 numbers, one a layer, got 3"),
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
    for function in (prefill_stats, reset_prefill_stats):
        with pytest.raises(TypeError, match="model must be a torch module, got NoneType"):
            function(None)


def test_models_without_attention_layers_are_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM: its attention does not go through"):
        patch_model(model)
    assert not is_patched(model)


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


@pytest.mark.parametrize("base", ["nonsense", "block_sparse_prefill", None])
def test_an_unknown_base_is_named(base):
    register_attention(base="eager")
    with pytest.raises(ValueError, match=f"base must be one of .*'eager'.*'sdpa'.*got {base!r}"):
        register_attention(base=base)
    assert "nonsense" not in ALL_ATTENTION_FUNCTIONS.valid_keys()


@torch.no_grad()
def test_models_loaded_by_name_that_do_not_fit_are_refused_at_the_first_call():
    model = tiny_model("gpt2", "eager", n_embd=64, n_layer=2, n_head=4, reorder_and_upcast_attn=True)
    model.set_attn_implementation(register_attention(base="eager"))
    with pytest.raises(UnsupportedModelError, match="GPT2Attention computes eager attention in a way of its own"):
        model(ids())


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


@torch.no_grad()
def test_sub_configs_of_a_text_config_keep_their_own_implementation():
    """Phi-4-multimodal's own config is that of its text part."""
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    vision |= {"patch_size": 8, "crop_size": 32}
    audio = {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2, "input_size": 16}
    audio |= {"ext_pw_out_channel": 32, "nemo_conv_channels": 32}
    config = transformers.Phi4MultimodalConfig(**text, vision_config=vision, audio_config=audio)
    chosen = {"": "sdpa", "vision_config": "eager", "audio_config": "sdpa"}
    model = transformers.Phi4MultimodalForCausalLM._from_config(config, attn_implementation=chosen).eval()

    def implementations():
        config = model.config
        return [part._attn_implementation for part in (config, config.vision_config, config.audio_config)]

    assert implementations() == ["sdpa", "eager", "sdpa"]
    patch_model(model, alpha=0, min_seq_len=1)
    assert implementations()[1:] == ["eager", "sdpa"]
    assert is_patched(model)
    unpatch_model(model)
    assert implementations() == ["sdpa", "eager", "sdpa"]


def test_eager_attention_of_a_models_own_is_refused():
    model = tiny_model("gpt2", "eager", n_embd=64, n_layer=2, n_head=4, reorder_and_upcast_attn=True)
    with pytest.raises(UnsupportedModelError, match="GPT2Attention computes eager attention in a way of its own"):
        patch_model(model)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert is_patched(patch_model(model))


def test_layers_that_do_not_say_which_they_are_get_no_settings_of_their_own():
    """Zamba2's layers share attention modules."""
    model, message = tiny_model(), "LlamaAttention does not say which layer it is"
    for layer in model.model.layers:
        layer.self_attn.layer_idx = -1
    for settings in ({"dense_layers": [1]}, {"layer_alphas": [0.1, 0.2]}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must not be set here: {message}"):
            patch_model(model, **settings)
    assert not is_patched(model)
    with pytest.raises(UnsupportedModelError, match=message):
        calibrate(model, [list(range(3, 153)) * 3], config=FlashPrefillConfig(block_size=64, min_seq_len=1), progress=False)
    assert not is_patched(model)
    assert is_patched(patch_model(model, alpha=0))
