"""Patched models in single situations: what stays dense and why, and what dense calls get. The matrix is in test_support."""

import copy

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_flashprefill.attention as seam
from hf_flashprefill import (
    FlashPrefillConfig,
    UnsupportedModelError,
    patch_model,
    patched,
    prefill_stats,
    register_attention,
    unpatch_model,
)
from hf_flashprefill.support.families import FAMILIES
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import LENGTH, PADDED, SITUATIONS, padding, prompt
from tests.inputs import tiny_model
from tests.tolerance import assert_same_output

IS_OLD = int(transformers.__version__.split(".")[0]) < 5
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4}


@torch.no_grad()
def test_sparse_settings_change_the_answer_and_say_so():
    model = tiny_model()
    ids = prompt(length=1000)
    expected = model(ids).logits
    rule = {"alpha": 1.0, "sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}
    with patched(model, **rule, **SETTINGS):
        got = model(ids).logits
        stats = prefill_stats(model)
    assert (got - expected).abs().max() > 1e-3
    assert 0.1 < stats.density < 0.5
    assert all(len(layer.head_density) == 4 for layer in stats.layers)
    assert "sparse" in str(stats)
    assert stats.to_dict()["sparse_calls"] == 2


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (2, False), (2, True)])
@torch.no_grad()
def test_only_padding_makes_valid_ranges(batch, padded, monkeypatch):
    """Without them nothing waits for the device, so an unpadded prompt must never have any."""
    operator, seen = seam.flash_prefill_attention, []

    def spy(*args, valid_ranges, **kwargs):
        seen.append(None if valid_ranges is None else valid_ranges.tolist())
        return operator(*args, valid_ranges=valid_ranges, **kwargs)

    monkeypatch.setattr(seam, "flash_prefill_attention", spy)
    model = patch_model(tiny_model(), alpha=0, **SETTINGS)
    mask = padding("left") if padded else torch.ones(batch, LENGTH, dtype=torch.long)
    model(prompt(batch), attention_mask=mask)
    model(prompt(batch), attention_mask=mask[:, -1:].expand(-1, LENGTH))
    assert seen == 2 * [[[0, LENGTH], [PADDED, LENGTH]] if padded else None] + 2 * [None]


@torch.no_grad()
def test_padding_output_stays_finite():
    model = patch_model(tiny_model(), alpha=0.1, **SETTINGS)
    assert model(prompt(2), attention_mask=padding("left")).logits.isfinite().all()


def short(model):
    return (model(prompt(length=31)).logits,)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@torch.no_grad()
def test_short_prompts_stay_dense_to_the_bit(base):
    model = tiny_model(implementation=base)
    expected = short(model)
    patch_model(model, alpha=0.5, **SETTINGS)
    torch.testing.assert_close(short(model), expected, atol=0, rtol=0)
    assert prefill_stats(model).dense_calls == {"shorter than min_seq_len": 2}
    assert "shorter than min_seq_len" in str(prefill_stats(model))


@pytest.mark.parametrize(("chunk", "sparse_calls"), [(LENGTH, 2), (LENGTH - 1, 1)])
@torch.no_grad()
def test_attention_chunks_no_shorter_than_the_prompt_are_plain_causal(chunk, sparse_calls):
    model = tiny_model("llama4", attention_chunk_size=chunk)
    ids, mask = prompt(2), padding("left")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(model(ids, attention_mask=mask).logits[mask.bool()], expected)
    assert prefill_stats(model).sparse_calls == sparse_calls


@torch.no_grad()
def test_packed_sequences_under_a_long_window_stay_apart():
    """The window alone would be plain causal; what is put around it must not be overlooked."""
    model = tiny_model("phi3")
    expected = SITUATIONS["packed_by_positions"].run(model)
    patch_model(model, alpha=0, **SETTINGS)
    torch.testing.assert_close(SITUATIONS["packed_by_positions"].run(model), expected, atol=0, rtol=0)
    assert prefill_stats(model).dense_calls == {"mask is not plain causal": 2}


@torch.no_grad()
def test_dense_layers_use_the_previous_implementation_for_padded_chunks():
    """A dense layer beside a sparse one gets the sparse call's mask and must turn it into its own kind."""
    names = ("plain", "left_padded", "padded_prefix_continuation", "static_cache_chunks", "prefix_continuation")
    for situation in (SITUATIONS[name].run for name in names):
        for base in ("sdpa", "eager"):
            model = tiny_model(implementation=base)
            expected = situation(model)
            patch_model(model, alpha=0, dense_layers=[1], **SETTINGS)
            for ours, theirs in zip(situation(model), expected, strict=True):
                assert_same_output(ours, theirs)
            stats = prefill_stats(model)
            assert stats.layers[0].sparse_calls > 0
            assert stats.layers[1].sparse_calls == 0
            assert stats.layers[1].dense_calls["dense layer"] > 0


def first_layers_calls(name, mask_function, model, is_patched=True):
    """The name and the mask that the first layer's previous implementation ``name`` sees in each call; dense if patched."""
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        if module.layer_idx == 0:
            seen.append((module.config._attn_implementation, attention_mask))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask_function)
    model.config._attn_implementation_internal = name
    if is_patched:
        patch_model(model, alpha=0, dense_layers=[0], **SETTINGS)
    for situation in ("plain", "left_padded", "padded_prefix_continuation"):
        SITUATIONS[situation].run(model)
    return seen


@torch.no_grad()
def test_flash_attention_sees_its_own_name_when_calls_stay_dense():
    """Flash attention picks its kernel by the name in the module's config, which is ours while a model is patched."""
    seen = first_layers_calls("test_flash_fake", flash_attention_mask, tiny_model())
    assert [name for name, _ in seen] == 4 * ["test_flash_fake"]


@pytest.mark.parametrize("mask_function", [sdpa_mask, eager_mask, flash_attention_mask])
@torch.no_grad()
def test_dense_layers_get_the_masks_of_the_previous_implementation(mask_function):
    """None where it needs none, as one of queries and keys of a long prompt would take gigabytes, and in the model's dtype."""
    model = tiny_model().bfloat16()
    expected = [mask for _, mask in first_layers_calls("test_fake", mask_function, model, is_patched=False)]
    got = [mask for _, mask in first_layers_calls("test_fake", mask_function, model)]
    assert [mask is None for mask in got] == [mask is None for mask in expected]
    for ours, theirs in zip(got, expected, strict=True):
        if theirs is not None:
            assert type(ours) is torch.Tensor
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_mask_of_fewer_tokens_than_the_cache_holds():
    """transformers takes what it does not tell for padding."""
    model, ids, mask = tiny_model(), prompt(), torch.ones(1, LENGTH - 30, dtype=torch.long)

    def run():
        cache = model(ids[:, :90], use_cache=True).past_key_values
        return model(ids[:, 90:], attention_mask=mask, past_key_values=cache).logits

    expected = run()
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(run(), expected)


@torch.no_grad()
def test_a_row_of_padding_alone_keeps_nobody_dense():
    model, mask = tiny_model(), padding("left")
    mask[1] = 0
    expected = model(prompt(2), attention_mask=mask).logits[0]
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(model(prompt(2), attention_mask=mask).logits[0], expected)
    assert prefill_stats(model).sparse_calls == 2


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_dropout_of_training_reaches_the_previous_implementation(base):
    model, ids = tiny_model(implementation=base, attention_dropout=0.5).train(), prompt()
    torch.manual_seed(1)
    expected = model(ids).logits
    patch_model(model, alpha=0, **SETTINGS)
    torch.manual_seed(1)
    assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_one_projection_that_needs_gradients_keeps_the_call_dense(name):
    model = tiny_model(num_hidden_layers=1).requires_grad_(False)
    weight = getattr(model.model.layers[0].self_attn, name).weight.requires_grad_(True)
    patch_model(model, alpha=0, **SETTINGS)
    model(prompt()).logits.square().sum().backward()
    assert weight.grad.abs().max() > 0
    assert prefill_stats(model).dense_calls == {"gradients needed": 1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_training_stays_dense(reentrant):
    """A reentrant checkpoint runs the layer twice, first without gradients: a sparse first run would give another loss."""
    model, ids = tiny_model(), prompt()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    inputs = {"attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
    expected = model(ids, **inputs).loss
    patch_model(model, alpha=1.0, **SETTINGS)
    loss = model(ids, **inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=0, rtol=0)
    assert prefill_stats(model).dense_calls == {"training mode": 4}


@torch.no_grad()
def test_deep_copies_keep_settings_and_start_their_own_statistics():
    model = patch_model(tiny_model(), alpha=0, **SETTINGS)
    model(prompt())
    twin = copy.deepcopy(model)
    assert prefill_stats(twin).layers == []
    assert_same_output(twin(prompt()).logits, unpatch_model(model)(prompt()).logits)
    assert prefill_stats(twin).sparse_calls == 2


def tiny_or_skip(family, implementation, **overrides):
    try:
        return tiny_model(family, implementation, **overrides)
    except ValueError as error:
        pytest.skip(f"the installed transformers has no {family}: {error}")


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@torch.no_grad()
def test_masks_that_a_model_cuts_when_it_knows_sdpa_by_name(base):
    """Gemma 4 cuts hidden states, and masks, to the queries whose logits are kept. No mask at all, as sdpa gets it, would stand
    for a prompt that begins there."""
    model = tiny_or_skip("gemma4", base)
    text = prompt(length=100).repeat(1, 2)[:, :150]

    def answers():
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(text)}
        return model(text, logits_to_keep=3).logits, model.generate(text, prompt_lookup_num_tokens=3, **options)

    expected = answers()
    for settings in ({}, {"alpha": 0, **SETTINGS}):
        with patched(model, **settings):
            logits, tokens = answers()
            assert bool(prefill_stats(model).sparse_calls) == bool(settings)
        assert_same_output(logits, expected[0])
        assert torch.equal(tokens, expected[1])


@torch.no_grad()
def test_models_that_cut_masks_want_a_base_that_can():
    model = tiny_or_skip("gemma4", "flex_attention")
    with pytest.raises(UnsupportedModelError, match="cuts masks, which flex_attention does not allow"):
        patch_model(model)
    by_name = tiny_or_skip("gemma4", register_attention(FlashPrefillConfig(), base="flex_attention"))
    with pytest.raises(UnsupportedModelError, match="cuts masks, which flex_attention does not allow"):
        by_name(prompt())


@torch.no_grad()
def test_weights_asked_for_by_the_config_stay_dense():
    model = tiny_model(implementation="eager")
    model.config.output_attentions = True
    expected = model(prompt()).attentions
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(torch.stack(model(prompt()).attentions), torch.stack(expected))
    assert prefill_stats(model).dense_calls == {"output_attentions": 2}
    assert model(prompt(), output_attentions=False).attentions is None
    assert prefill_stats(model).sparse_calls == 2


@pytest.mark.skipif(IS_OLD, reason="before transformers 5 layers are handed the flag")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("stablelm", {}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
        ("gpt2", GPT2),
    ],
)
@torch.no_grad()
def test_weights_are_given_where_layers_do_not_pass_on_that_they_are_asked_for(family, options):
    """transformers collects them from what each layer returns."""
    model = tiny_model(family, "eager", **options)
    expected = model(prompt(), output_attentions=True).attentions
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(torch.stack(model(prompt(), output_attentions=True).attentions), torch.stack(expected))
    assert prefill_stats(model).dense_calls == {"output_attentions": 2}
    asked = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2, "do_sample": False}
    weights = model.generate(prompt(), attention_mask=torch.ones_like(prompt()), **asked).attentions
    assert [len(step) for step in weights] == [2, 2]
    assert model(prompt()).attentions is None
    assert prefill_stats(model).sparse_calls == 2


@pytest.mark.skipif(IS_OLD, reason="GPT-2 makes its masks in a way of its own")
@torch.no_grad()
def test_gpt2_may_view_its_mask_as_it_is():
    """Its model does so with any mask of two dimensions, as a static cache's is, made before the model is called."""
    model = tiny_model("gpt2", **GPT2)
    options = {"cache_implementation": "static", "disable_compile": True, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(prompt(), attention_mask=torch.ones_like(prompt()), **options)
    patch_model(model, alpha=0, **SETTINGS)
    assert torch.equal(model.generate(prompt(), attention_mask=torch.ones_like(prompt()), **options), expected)
    assert prefill_stats(model).sparse_calls == 2


@pytest.mark.skipif(not hasattr(transformers, "Step3p7Config"), reason="needs a transformers with Step 3.7")
@torch.no_grad()
def test_layers_of_different_numbers_of_heads():
    """Their config refuses to name one number for all."""
    text = tiny_model().config.to_dict() | {"head_dim": 16, "num_sliding_attention_heads": 8, "sliding_window": 64}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "mlp_layer_types": ["dense", "dense"]}
    text |= {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "share_expert_dim": 32}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = transformers.Step3p7Config(text_config=text, vision_config=vision | {"patch_size": 14})
    model = transformers.Step3p7ForConditionalGeneration._from_config(config).eval()
    expected = model(input_ids=prompt()).logits
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(model(input_ids=prompt()).logits, expected)
    assert prefill_stats(model).sparse_calls == 2
    assert [len(layer.head_density) for layer in prefill_stats(model).layers] == [8, 4]


@torch.no_grad()
def test_autocast_around_a_16_bit_model():
    model, ids = tiny_model().bfloat16(), prompt(length=1000)
    rule = {"alpha": 1.0, "sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0, "audit_rows": 8, "audit_limit": 1.0}
    patch_model(model, **rule, **SETTINGS)
    model(ids)
    expected = prefill_stats(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        patch_model(model, **rule, **SETTINGS)
        assert model(ids).logits.isfinite().all()
    assert prefill_stats(model).sparse_calls == 2
    assert prefill_stats(model).density < 1
    # The first layer's inputs are the same but for what autocast does to the projections.
    assert prefill_stats(model).layers[0].dropped_mass == pytest.approx(expected.layers[0].dropped_mass, abs=0.02)


@torch.no_grad()
def test_a_position_bias_is_cut_with_a_static_caches_keys():
    model = tiny_or_skip("inkling_text", "sdpa", head_dim=32, sliding_window=64, n_routed_experts=4, num_experts_per_tok=2,
                         moe_intermediate_size=32)  # fmt: skip
    ids = prompt(length=40)
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    patch_model(model, alpha=0, **SETTINGS)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), expected)
    assert prefill_stats(model).dense_calls["position bias"] == 2


@torch.no_grad()
def test_attention_layers_subclassed_elsewhere():
    model = tiny_model(implementation="eager")
    for layer in model.model.layers:
        attention = type(layer.self_attn)
        layer.self_attn.__class__ = type("TracedAttention", (attention,), {})
    expected = model(prompt(length=31)).logits
    patch_model(model, **SETTINGS)
    assert torch.equal(model(prompt(length=31)).logits, expected)
    assert prefill_stats(model).dense_calls == {"shorter than min_seq_len": 2}


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_short_prompts_of_every_family_with_the_default_settings(family):
    """The matrix sets min_seq_len; "auto" asks the model's config for its shape, which not every one tells."""
    model = tiny_or_skip(family, "eager")
    expected = model(prompt(length=40)).logits
    try:
        patch_model(model)
    except UnsupportedModelError as error:
        pytest.skip(f"the installed transformers' {error}")
    assert_same_output(model(prompt(length=40)).logits, expected)
    assert set(prefill_stats(model).dense_calls) == {"shorter than min_seq_len"}


@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_fake_tensors_stay_dense(is_padded):
    """What counts memory and operations runs models on them."""
    mask = {"attention_mask": torch.ones(2, 150, dtype=torch.int64)} if is_padded else {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, ids = tiny_model(), torch.zeros(2, 150, dtype=torch.int64)
        try:
            expected = model(ids, **mask).logits.shape
        except DataDependentOutputException:
            pytest.skip("the unpatched model reads the mask")
        patch_model(model, **SETTINGS)
        assert model(ids, **mask).logits.shape == expected
        assert prefill_stats(model).dense_calls == {"mask is not plain causal": 2}


@torch.no_grad()
def test_tensors_without_data_stay_dense():
    model = tiny_model().to("meta")
    try:
        model(prompt().to("meta"))
    except RuntimeError as error:
        pytest.skip(f"the unpatched model raises {error}")
    patch_model(model, alpha=0, **SETTINGS)
    assert model(prompt().to("meta")).logits.shape[:2] == (1, LENGTH)
    assert prefill_stats(model).dense_calls == {"meta device": 2}
