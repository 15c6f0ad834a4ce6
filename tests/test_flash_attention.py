"""Models whose attention before patching is flash attention, which looks at what other bases do not: positions, and a mask
of two dimensions that says how much of a static cache is filled. All but the package's kernels is transformers' own code."""

import pytest
import torch
import transformers
from transformers import modeling_flash_attention_utils as flash

from hf_flashprefill import patch_model, prefill_stats
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import LENGTH, padding, prompt
from tests.inputs import tiny_model
from tests.tolerance import assert_same_output

NAME = "flash_attention_2"
IS_OLD = int(transformers.__version__.split(".")[0]) < 5
WITH_STATIC_CACHE = pytest.mark.skipif(IS_OLD, reason="transformers 4 attends unused keys there")


def attention(query, key, value, softmax_scale=None, causal=False, window_size=(-1, -1), s_aux=None):
    """[B, S, H, D] -> [B, S, H, D]; the last query stands at the last key."""
    query_len, key_len, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    seen = torch.ones(query_len, key_len, dtype=torch.bool)
    if causal:
        seen = seen.tril(key_len - query_len)
    if window_size[0] >= 0:
        seen = seen.triu(key_len - query_len - window_size[0])
    key, value = (tensor.repeat_interleave(group, 2) for tensor in (key, value))
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * softmax_scale
    logits = logits.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux[None, :, None, None].expand(len(query), -1, query_len, 1)], -1)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1)[..., :key_len], value)


# transformers asks this one's signature which arguments the package knows.
def varlen_attention(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    softmax_scale=None, causal=False, window_size=(-1, -1), s_aux=None,
):  # fmt: skip
    """Of sequences one after the other, [T, H, D] -> [T, H, D]."""
    ends = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
    parts = [tensor.tensor_split(end[1:-1].tolist()) for tensor, end in zip((query, key, value), ends, strict=True)]
    options = (softmax_scale, causal, window_size, s_aux)
    return torch.cat([attention(*(part[None] for part in row), *options)[0] for row in zip(*parts, strict=True)])


@pytest.fixture
def flash_model(monkeypatch):
    """Builds tiny models with flash attention; the same family has the same weights each time."""
    functions = (attention, varlen_attention, *(() if IS_OLD else (None,)), flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(flash, name, None, raising=False)
    for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(flash, name, None, raising=False)

    def build(family="llama", **options):
        model = tiny_model(family, "eager", **options)
        model.config._attn_implementation_internal = NAME
        return model

    return build


def answers(model, ids, mask=None, **options):
    """The logits of eight generated tokens."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(output.logits)


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_the_kernels_in_torch_answer_as_sdpa_does(flash_model, family):
    assert_same_output(answers(flash_model(family), prompt()), answers(tiny_model(family), prompt()))


@pytest.mark.parametrize(
    ("length", "options", "patch", "sparse_calls"),
    [
        (LENGTH, {}, {}, 2),
        pytest.param(LENGTH, STATIC, {}, 2, marks=WITH_STATIC_CACHE),
        pytest.param(LENGTH, {**STATIC, "prefill_chunk_size": 60}, {}, 6, marks=WITH_STATIC_CACHE),
        pytest.param(LENGTH, STATIC, {"dense_layers": [0, 1]}, 0, marks=WITH_STATIC_CACHE),
        pytest.param(20, STATIC, {}, 0, marks=WITH_STATIC_CACHE),
    ],
    ids=["dynamic", "static", "static in chunks", "static, dense layers", "static, short"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_generate_answers_as_before(flash_model, family, length, options, patch, sparse_calls):
    """``generate`` drops a mask of ones, unless it sees that flash attention needs it to tell how full a static cache is."""
    expected = answers(flash_model(family), prompt(length=length), **options)
    model = patch_model(flash_model(family), alpha=0, **SETTINGS, **patch)
    assert_same_output(answers(model, prompt(length=length), **options), expected)
    assert prefill_stats(model).sparse_calls == sparse_calls


@torch.no_grad()
def test_padded_rows_of_a_static_cache(flash_model):
    ids, mask = prompt(2), padding("left")
    expected = answers(flash_model(), ids, mask, **STATIC)
    model = patch_model(flash_model(), alpha=0, **SETTINGS)
    assert_same_output(answers(model, ids, mask, **STATIC), expected)
    assert prefill_stats(model).sparse_calls == 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3", "gpt_oss"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_sequences_packed_by_positions_stay_apart(flash_model, family, use_cache):
    """With a cache transformers' masks do not look for them; flash attention does, in every layer."""
    positions = torch.cat([torch.arange(70), torch.arange(LENGTH - 70)])[None]
    options = {"position_ids": positions, "use_cache": use_cache}
    model = flash_model(family)
    expected = model(prompt(), **options).logits
    together = model(prompt(), use_cache=use_cache).logits
    assert (expected - together).abs().max() > 1e-3, "nothing was packed"
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(model(prompt(), **options).logits, expected)
    assert prefill_stats(model).sparse_calls == 0
    # A plain prompt is not taken for one that is packed.
    assert_same_output(model(prompt(), use_cache=use_cache).logits, together)
    if use_cache or not IS_OLD:
        assert prefill_stats(model).sparse_calls == 2


@torch.no_grad()
def test_layers_that_keep_different_numbers_of_keys(flash_model):
    """Whoever evicts keys from some layers' caches: a mask has the first layer's length, and flash attention needs none."""

    def run(model, kept_keys):
        ids = prompt(length=200)
        cache = model(ids[:, :150], use_cache=True).past_key_values
        for layer, kept in zip(cache.layers, kept_keys, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        return model(ids[:, 150:], past_key_values=cache, position_ids=torch.arange(150, 200)[None]).logits

    for kept_keys, reason in (((60, 150), {"keys are not those of the mask": 1}), ((60, 60), {})):
        expected = run(flash_model(), kept_keys)
        model = patch_model(flash_model(), alpha=0, **SETTINGS)
        assert_same_output(run(model, kept_keys), expected)
        assert prefill_stats(model).dense_calls == reason
        with pytest.raises(RuntimeError) if reason else torch.no_grad():
            run(patch_model(tiny_model(), alpha=0, **SETTINGS), kept_keys)
