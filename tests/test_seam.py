"""Patched models against unpatched ones: with alpha=0 every situation must give the same numbers, on the sparse path."""

import copy

import pytest
import torch
from transformers import StaticCache

from hf_flashprefill import patch_model, patched, prefill_stats, unpatch_model
from tests.inputs import MODEL_CONFIGS, tiny_model
from tests.tolerance import assert_same_output

LENGTH = 200
SETTINGS = {"min_seq_len": 32, "block_size": 64}


def prompt(batch: int = 1, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 199, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> torch.Tensor:
    """Row 0 whole, row 1 padded by 77 tokens on the given side."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if side == "left":
        mask[1, :77] = 0
    else:
        mask[1, -77:] = 0
    return mask


def plain(model):
    return model(prompt()).logits


def embeddings(model):
    return model(inputs_embeds=model.get_input_embeddings()(prompt())).logits


def left_padded(model):
    mask = padding("left")
    return model(prompt(2), attention_mask=mask).logits[mask.bool()]


def right_padded(model):
    mask = padding("right")
    return model(prompt(2), attention_mask=mask).logits[mask.bool()]


def prefix_continuation(model):
    ids = prompt()
    cache = model(ids[:, :90], use_cache=True).past_key_values
    return model(ids[:, 90:], past_key_values=cache).logits


def padded_prefix_continuation(model):
    ids, mask = prompt(2), padding("left")
    cache = model(ids[:, :120], attention_mask=mask[:, :120], use_cache=True).past_key_values
    return model(ids[:, 120:], attention_mask=mask, past_key_values=cache).logits


def static_cache(model):
    return model(prompt(), past_key_values=StaticCache(config=model.config, max_cache_len=300), use_cache=True).logits


def static_cache_chunks(model):
    ids, cache = prompt(), StaticCache(config=model.config, max_cache_len=300)
    # transformers before 5.4 wants to be told where a static cache continues; later versions ignore it.
    steps = [(0, 70), (70, 140), (140, LENGTH)]
    parts = [
        model(ids[:, a:b], past_key_values=cache, use_cache=True, cache_position=torch.arange(a, b)).logits for a, b in steps
    ]
    return torch.cat(parts, 1)


def generated(model, **kwargs):
    ids, mask = prompt(2), padding("left")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    return model.generate(ids, **(settings | kwargs))


def generate(model):
    return generated(model)


def generate_in_chunks(model):
    return generated(model, prefill_chunk_size=70)


def generate_static(model):
    return generated(model, cache_implementation="static", disable_compile=True)


def beams(model):
    return generated(model, num_beams=3)


def return_sequences(model):
    return generated(model, num_beams=2, num_return_sequences=2)


def assisted(model):
    draft = tiny_model("llama", num_hidden_layers=1)
    return model.generate(
        prompt(), attention_mask=torch.ones(1, LENGTH), assistant_model=draft, max_new_tokens=8, do_sample=False, pad_token_id=0
    )


def prompt_lookup(model):
    ids = prompt().repeat(1, 2)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False, pad_token_id=0
    )


SITUATIONS = [
    plain,
    embeddings,
    left_padded,
    right_padded,
    prefix_continuation,
    padded_prefix_continuation,
    static_cache,
    static_cache_chunks,
    generate,
    generate_in_chunks,
    generate_static,
    beams,
    return_sequences,
    assisted,
    prompt_lookup,
]
EVERY_FAMILY = [plain, left_padded, right_padded, prefix_continuation, generate]
CELLS = [(situation, "llama", base) for situation in SITUATIONS for base in ("sdpa", "eager")]
CELLS += [(situation, family, "sdpa") for situation in EVERY_FAMILY for family in MODEL_CONFIGS if family != "llama"]


@pytest.mark.parametrize(("situation", "family", "base"), CELLS, ids=lambda value: getattr(value, "__name__", value))
@torch.no_grad()
def test_alpha_zero_equals_the_unpatched_model(situation, family, base):
    model = tiny_model(family, base)
    expected = situation(model)
    patch_model(model, alpha=0, **SETTINGS)
    got = situation(model)
    stats = prefill_stats(model)
    assert len(stats.layers) == model.config.num_hidden_layers
    assert all(layer.sparse_calls > 0 and layer.density == 1 for layer in stats.layers)
    if expected.is_floating_point():
        assert_same_output(got, expected)
    else:
        assert torch.equal(got, expected)
    assert set(stats.dense_calls) <= {"decode", "shorter than min_seq_len"}


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


@torch.no_grad()
def test_padding_output_stays_finite():
    model = patch_model(tiny_model(), alpha=0.1, **SETTINGS)
    assert model(prompt(2), attention_mask=padding("left")).logits.isfinite().all()


def user_mask(model):
    ids = prompt()
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:, :, 50:, :20] = False
    return model(ids, attention_mask=mask).logits


def holes_in_padding(model):
    mask = padding("left")
    mask[1, 120:130] = 0
    return model(prompt(2), attention_mask=mask).logits[mask.bool()]


def packed(model):
    positions = torch.cat([torch.arange(80), torch.arange(LENGTH - 80)])[None]
    return model(prompt(), position_ids=positions, use_cache=False).logits


def output_attentions(model):
    return model(prompt(), output_attentions=True).logits


def short(model):
    return model(prompt(length=31)).logits


def sliding_window(model):
    return model(prompt()).logits


@pytest.mark.parametrize(
    ("situation", "reason", "overrides"),
    [
        (user_mask, "mask is not plain causal", {}),
        (holes_in_padding, "mask is not plain causal", {}),
        (packed, "mask is not plain causal", {}),
        (output_attentions, "output_attentions", {}),
        (short, "shorter than min_seq_len", {}),
        (sliding_window, "sliding window", {"family": "mistral", "sliding_window": 50}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("base", ["sdpa", "eager"])
@torch.no_grad()
def test_dense_with_a_counted_reason(situation, reason, overrides, base):
    model = tiny_model(implementation=base, **overrides)
    expected = situation(model)
    patch_model(model, alpha=0.5, **SETTINGS)
    got = situation(model)
    stats = prefill_stats(model)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    assert stats.sparse_calls == 0
    assert stats.dense_calls == {reason: 2}
    assert reason in str(stats)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_training_stays_dense_and_its_gradients_are_the_same(base):
    model = tiny_model(implementation=base).train()
    grads = []
    for attempt in range(2):
        if attempt:
            patch_model(model, alpha=0.5, **SETTINGS)
        model.zero_grad()
        model(prompt(), labels=prompt()).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert prefill_stats(model).dense_calls == {"gradients needed": 2}


@torch.no_grad()
def test_dense_layers_use_the_previous_implementation_for_padded_chunks():
    """A dense layer beside a sparse one gets the sparse call's mask and must turn it into its own kind."""
    for situation in (plain, left_padded, padded_prefix_continuation, static_cache_chunks, prefix_continuation):
        for base in ("sdpa", "eager"):
            model = tiny_model(implementation=base)
            expected = situation(model)
            patch_model(model, alpha=0, dense_layers=[1], **SETTINGS)
            assert_same_output(situation(model), expected)
            stats = prefill_stats(model)
            assert stats.layers[0].sparse_calls > 0
            assert stats.layers[1].sparse_calls == 0
            assert stats.layers[1].dense_calls["dense layer"] > 0


@torch.no_grad()
def test_flash_attention_sees_its_own_name_when_calls_stay_dense(monkeypatch):
    """Flash attention picks its kernel by the name in the module's config, which is ours while a model is patched."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def fake_flash(module, query, key, value, attention_mask, **kwargs):
        seen.append(
            (module.config._attn_implementation, module.layer_idx, None if attention_mask is None else attention_mask.dim())
        )
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    AttentionInterface.register("test_flash_fake", fake_flash)
    AttentionMaskInterface.register("test_flash_fake", flash_attention_mask)
    model = tiny_model()
    model.config._attn_implementation_internal = "test_flash_fake"
    patch_model(model, alpha=0, dense_layers=[0], **SETTINGS)
    model(prompt())
    left_padded(model)
    assert seen == [("test_flash_fake", 0, None), ("test_flash_fake", 0, 2)]


@torch.no_grad()
def test_deep_copies_keep_settings_and_start_their_own_statistics():
    model = patch_model(tiny_model(), alpha=0, **SETTINGS)
    plain(model)
    twin = copy.deepcopy(model)
    assert prefill_stats(twin).layers == []
    assert_same_output(plain(twin), plain(unpatch_model(model)))
    assert prefill_stats(twin).sparse_calls == 2
