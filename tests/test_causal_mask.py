"""The mask of a patched model stands for a causal one: it can be moved and its rows chosen, but not calculated with."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from hf_flashprefill import FlashPrefillConfig, UnsupportedModelError, patch_model, patched, prefill_stats, register_attention
from hf_flashprefill.causal_mask import CausalMask
from hf_flashprefill.masking import _TAKES_CACHE_POSITION, prefill_mask
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import padding, prompt
from tests.inputs import tiny_model
from tests.tolerance import assert_same_output


def mask_of(attention_mask, window=None) -> CausalMask:
    length = prompt().shape[1]
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    call = {"batch_size": 2, "kv_length": length, "kv_offset": 0, "mask_function": function, "local_size": window}
    if _TAKES_CACHE_POSITION:
        call["cache_position"] = torch.arange(length)
    else:
        call |= {"q_length": length, "q_offset": 0, "device": torch.device("cpu")}
    return prefill_mask("sdpa", FlashPrefillConfig(min_seq_len=32), attention_mask=attention_mask, **call)


ROWS = {
    "clone": (lambda mask: mask.clone(), [0, 1]),
    "contiguous": (lambda mask: mask.contiguous(), [0, 1]),
    "detach": (lambda mask: mask.detach(), [0, 1]),
    "slice": (lambda mask: mask[1:], [1]),
    "indices": (lambda mask: mask[torch.tensor([1, 1, 0])], [1, 1, 0]),
    "index_select": (lambda mask: mask.index_select(0, torch.tensor([1, 0])), [1, 0]),
    "torch.index_select": (lambda mask: torch.index_select(mask, dim=0, index=torch.tensor([1])), [1]),
    "repeat_interleave": (lambda mask: mask.repeat_interleave(2, dim=0), [0, 0, 1, 1]),
}


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("how", ROWS)
def test_rows_may_be_chosen_and_repeated(how, window):
    function, rows = ROWS[how]
    real = padding("left").bool()
    got = function(mask_of(real, window))
    assert isinstance(got, CausalMask)
    assert type(got).sliding_window == window
    assert torch.equal(got.padding(), real[rows])
    unpadded = function(mask_of(None, window))
    assert unpadded.shape == (len(rows), real.shape[1])
    ranges = unpadded.valid_ranges()
    assert ranges is None or ranges.tolist() == [[0, real.shape[1]]] * len(rows)


def written_to(mask):
    mask[..., 100:110] = False


CALCULATIONS = {
    "added": lambda mask: torch.zeros(1, 4, 2, 160) + mask,
    "adding": lambda mask: mask + torch.zeros(1, 4, 2, 160),
    "times": lambda mask: torch.zeros(2, 160, 8) * mask[:, :, None],
    "and": lambda mask: mask & torch.ones(160, dtype=torch.bool),
    "not": lambda mask: ~mask,
    "where": lambda mask: torch.where(mask, 0.0, -1.0),
    "filled": lambda mask: torch.zeros(2, 160).masked_fill(mask, 1.0),
    "in place": lambda mask: mask.clone().logical_not_(),
    "all": lambda mask: mask.all(),
    "numbers": lambda mask: mask.sum(-1),
    "compared": lambda mask: mask == 1,
    "cast": lambda mask: mask.float(),
    "columns": lambda mask: mask[:, 10:],
    "4-D": lambda mask: mask[:, None, None, :],
    "ellipsis": lambda mask: mask[..., :-10],
    "columns selected": lambda mask: mask.index_select(1, torch.arange(9)),
    "repeated whole": lambda mask: mask.repeat_interleave(2),
    "written to": written_to,
    "in sdpa": lambda mask: torch.nn.functional.scaled_dot_product_attention(
        torch.ones(1, 2, 8), *torch.ones(2, 1, 160, 8), attn_mask=mask
    ),
}


@pytest.mark.parametrize("attention_mask", [None, padding("left").bool()], ids=["whole", "padded"])
@pytest.mark.parametrize("how", CALCULATIONS)
def test_whoever_calculates_with_it_is_refused(how, attention_mask):
    with pytest.raises(UnsupportedModelError, match="is none to calculate with"):
        CALCULATIONS[how](mask_of(attention_mask))


OUTSIDE = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
    "gpt_neox_japanese": {"num_hidden_layers": 2, "num_attention_heads": 4},
}


@pytest.mark.skipif(_TAKES_CACHE_POSITION, reason="before transformers 5 these families make masks of their own")
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("family", OUTSIDE)
@torch.no_grad()
def test_models_outside_the_interface_are_refused_when_loaded_by_name(family, is_compiled):
    """They never ask for our attention, only for its mask; added to their scores, it let every token see all others."""
    settings = FlashPrefillConfig(alpha=0, **SETTINGS)
    config = AutoConfig.for_model(family, vocab_size=200, hidden_size=64, **OUTSIDE[family])
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention(settings)).eval()
    except (ValueError, KeyError) as error:
        pytest.skip(f"the installed transformers does not load it by name: {error}")
    if is_compiled:
        torch.compiler.reset()
        model = torch.compile(model, backend="eager")
    # Short prompts as well: what sdpa gets, None above all, is no mask for an attention of another kind.
    for length in (20, 160):
        for attention_mask in (None, torch.ones(1, length, dtype=torch.long)):
            with pytest.raises(UnsupportedModelError, match="does not go through transformers' AttentionInterface"):
                model(prompt(length=length), attention_mask=attention_mask)


@pytest.mark.skipif(_TAKES_CACHE_POSITION, reason="transformers 4 cannot be traced, unpatched as well")
@torch.no_grad()
def test_a_traced_model_is_dense_and_right_with_other_padding():
    model = tiny_model().requires_grad_(False)
    ids, ones = prompt(2), torch.ones(2, 160, dtype=torch.long)
    mask = padding("left")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    patch_model(model, alpha=0, **SETTINGS)

    def logits(ids, attention_mask):
        return model(ids, attention_mask=attention_mask, use_cache=False).logits

    traced = torch.jit.trace(logits, (ids, ones), check_trace=False)
    assert_same_output(traced(ids, mask)[mask.bool()], expected)
    assert prefill_stats(model).sparse_calls == 0


def test_forward_mode_tangents_stay_dense():
    """A dual tensor requires no gradient, and no kernel takes its tangent along."""
    from torch.autograd import forward_ad

    model = tiny_model(implementation="eager").requires_grad_(False)
    embeds = model.get_input_embeddings()(prompt())
    direction = torch.randn_like(embeds)

    def tangent():
        with forward_ad.dual_level():
            logits = model(inputs_embeds=forward_ad.make_dual(embeds, direction), use_cache=False).logits
            return forward_ad.unpack_dual(logits).tangent.clone()

    expected = tangent()
    with patched(model, alpha=0, backend="reference", **SETTINGS):
        assert_same_output(tangent(), expected)
        assert prefill_stats(model).dense_calls == {"gradients needed": 2}
        with torch.no_grad():
            model(inputs_embeds=embeds)
        assert prefill_stats(model).sparse_calls == 2


@torch.no_grad()
def test_vmap_stays_dense():
    model = tiny_model()
    embeds = torch.randn(3, 1, 160, model.config.hidden_size)

    def logits(embeds):
        return model(inputs_embeds=embeds, use_cache=False).logits

    expected = torch.func.vmap(logits)(embeds)
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(torch.func.vmap(logits)(embeds), expected)
    assert prefill_stats(model).dense_calls == {"torch.vmap": 2}
