"""Layers with a sliding window or with attention sinks in patched models: they run in the operator, and exactly."""

import itertools

import pytest
import torch

import hf_flashprefill.attention as seam
from hf_flashprefill import patch_model, patched, prefill_stats, reset_prefill_stats
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import LENGTH, PADDED, SITUATIONS, padding, prompt
from tests.inputs import tiny_model
from tests.tolerance import assert_same_output

# No multiple of the block size.
WINDOW = 61
ONE_OF_TWO = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# What makes each family slide, and the layers that do.
WINDOWED = {
    "mistral": ({"sliding_window": WINDOW}, (0, 1)),
    "ministral3": ({"sliding_window": WINDOW}, (0, 1)),
    "phi3": ({"sliding_window": WINDOW}, (0, 1)),
    "qwen2": (ONE_OF_TWO | {"use_sliding_window": True, "max_window_layers": 1}, (0,)),
    "gemma3": (ONE_OF_TWO, (0,)),
    "cohere2": (ONE_OF_TWO, (0,)),
    "olmo3": (ONE_OF_TWO, (0,)),
    "gpt_oss": (ONE_OF_TWO, (0,)),
}
# The fewest blocks a selector can keep; what a window sees must not depend on it.
SPARSEST = SETTINGS | {"alpha": 1.0, "sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}
CALLS = (
    "plain",
    "left_padded",
    "right_padded",
    "padded_prefix_continuation",
    "static_cache",
    "static_cache_chunks",
    "generate",
)


def windowed_model(family: str, base: str = "sdpa"):
    try:
        model = tiny_model(family, "eager" if family == "gpt_oss" else base, **WINDOWED[family][0])
    except (ValueError, AttributeError) as error:
        pytest.skip(f"the installed transformers does not know {family}: {error}")
    if family == "gpt_oss":
        # Random ones are so close to zero that a forgotten head would hardly show.
        for layer, value in zip(model.model.layers, (2.0, -1.0), strict=True):
            layer.self_attn.sinks.data = value + torch.arange(4.0)
    return model


@pytest.fixture
def operator_calls(monkeypatch):
    """The arguments of every call of the operator."""
    operator, calls = seam.flash_prefill_attention, []

    def spy(query, key, value, **options):
        calls.append(options | {"query_len": query.shape[2], "key_len": key.shape[2]})
        return operator(query, key, value, **options)

    monkeypatch.setattr(seam, "flash_prefill_attention", spy)
    return calls


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "base"), [*itertools.product(WINDOWED, ["sdpa"]), ("mistral", "eager"), ("gemma3", "eager")]
)
@torch.no_grad()
def test_windowed_layers_are_exact_in_the_operator_whatever_the_selector(family, base, operator_calls):
    model, (_, windowed) = windowed_model(family, base), WINDOWED[family]
    full = [layer for layer in (0, 1) if layer not in windowed]
    for name in CALLS:
        expected = SITUATIONS[name].run(model)
        operator_calls.clear()
        with patched(model, dense_layers=full, **SPARSEST):
            got = SITUATIONS[name].run(model)
            stats = {layer.layer: layer for layer in prefill_stats(model).layers}
        for ours, theirs in zip(got, expected, strict=True):
            assert_same_output(ours, theirs)
        cut = [call for call in operator_calls if call["sliding_window"] is not None]
        assert cut, name
        assert {call["sliding_window"] for call in cut} == {WINDOW}
        assert all(call["key_len"] > WINDOW for call in cut)
        # A static cache's first chunk of 60 tokens lies in the window and is left to the selector.
        assert all(call["key_len"] <= WINDOW for call in operator_calls if call["sliding_window"] is None)
        for layer in windowed:
            assert stats[layer].sparse_calls > 0
            assert set(stats[layer].dense_calls) <= {"decode", "shorter than min_seq_len"}
        assert all(stats[layer].sparse_calls == 0 for layer in full)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 63, 64, 65, LENGTH - 1])
@torch.no_grad()
def test_every_window_that_cuts_is_exact(window, base, operator_calls):
    model = tiny_model("mistral", base, sliding_window=window)
    ids, mask = prompt(2), padding("left")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    patch_model(model, **SPARSEST)
    assert_same_output(model(ids, attention_mask=mask).logits[mask.bool()], expected)
    assert [call["sliding_window"] for call in operator_calls] == [window, window]
    assert (prefill_stats(model).sparse_calls, prefill_stats(model).dense_calls) == (2, {})
    reset_prefill_stats(model)
    model(ids[:1])
    # Of the 6 blocks that 3 query blocks see, a window of 1, up to 65, or more tokens reaches into 3, 5, or all.
    assert prefill_stats(model).density == {1: 3, 63: 5, 64: 5, 65: 5}.get(window, 6) / 6


@torch.no_grad()
def test_windows_no_shorter_than_the_prompt_leave_the_choice_to_the_selector(operator_calls):
    model = tiny_model("mistral", sliding_window=LENGTH)
    expected = model(prompt()).logits
    with patched(model, alpha=0, **SETTINGS):
        assert_same_output(model(prompt()).logits, expected)
    with patched(model, **SPARSEST):
        assert (model(prompt()).logits - expected).abs().max() > 1e-3
        assert prefill_stats(model).density < 1
    assert [call["sliding_window"] for call in operator_calls] == 4 * [None]


@torch.no_grad()
def test_chunks_over_a_cropped_cache_see_shifted_keys(operator_calls):
    """From the third chunk on the cache starts behind the first token, and in row 1 the padding has partly left it."""
    model, mask, ids = windowed_model("mistral"), padding("left"), prompt(2)
    steps = [(0, 50), (50, 100), (100, LENGTH)]

    def run():
        cache, logits = None, []
        for first, end in steps:
            output = model(ids[:, first:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[mask[:, first:end].bool()])
        return logits

    expected = run()
    patch_model(model, **SPARSEST)
    # The first chunk lies in the window, where the sparsest selector would not be exact; one block holds all of it.
    for ours, theirs in zip(run(), expected, strict=True):
        assert_same_output(ours, theirs)
    seen = [(call["query_len"], call["key_len"], call["sliding_window"]) for call in operator_calls[::2]]
    assert seen == [(50, 50, None), (50, 100, WINDOW), (60, 60 + WINDOW - 1, WINDOW)]
    ranges = [call["valid_ranges"].tolist() for call in operator_calls[::2]]
    assert ranges[2] == [[0, 120], [PADDED - 40, 120]]


@torch.no_grad()
def test_dense_layers_get_the_windowed_mask_of_the_previous_implementation():
    names = ("plain", "left_padded", "padded_prefix_continuation", "static_cache_chunks", "generate_in_chunks")
    for family, base in (("mistral", "sdpa"), ("mistral", "eager"), ("gemma3", "sdpa"), ("gpt_oss", "eager")):
        model = windowed_model(family, base)
        for name in names:
            expected = SITUATIONS[name].run(model)
            with patched(model, alpha=0, dense_layers=[0], **SETTINGS):
                for ours, theirs in zip(SITUATIONS[name].run(model), expected, strict=True):
                    assert_same_output(ours, theirs)
                stats = prefill_stats(model)
            assert stats.layers[0].sparse_calls == 0
            assert stats.layers[0].dense_calls["dense layer"] > 0


@pytest.mark.parametrize(("layer", "window"), [(0, None), (0, WINDOW - 1), (1, WINDOW)])
@torch.no_grad()
def test_a_layer_whose_window_is_not_the_masks_stays_dense(layer, window):
    """sdpa goes by the mask alone, so that is what the answer must be."""
    model = windowed_model("gemma3")
    model.model.layers[layer].self_attn.sliding_window = window
    ids, mask = prompt(2), padding("right")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(model(ids, attention_mask=mask).logits[mask.bool()], expected)
    stats = prefill_stats(model)
    assert stats.layers[layer].dense_calls == {"the layer's window is not the mask's": 1}
    assert stats.layers[1 - layer].sparse_calls == 1


@torch.no_grad()
def test_sinks_reach_the_operator_and_matter(operator_calls):
    model = windowed_model("gpt_oss")
    expected = model(prompt()).logits
    with patched(model, alpha=0, **SETTINGS):
        assert_same_output(model(prompt()).logits, expected)
        assert (prefill_stats(model).sparse_calls, prefill_stats(model).dense_calls) == (2, {})
    assert [call["sinks"].tolist() for call in operator_calls] == [[2, 3, 4, 5], [-1, 0, 1, 2]]
    for layer in model.model.layers:
        layer.self_attn.sinks.data -= 1
    assert (model(prompt()).logits - expected).abs().max() > 1e-3


def test_sinks_that_need_gradients_keep_the_call_dense():
    model = windowed_model("gpt_oss").requires_grad_(False)
    model.model.layers[1].self_attn.sinks.requires_grad_(True)
    patch_model(model, alpha=0, **SETTINGS)
    model(prompt()).logits.sum().backward()
    assert model.model.layers[1].self_attn.sinks.grad.abs().max() > 0
    assert [layer.dense_calls for layer in prefill_stats(model).layers] == [{}, {"gradients needed": 1}]
