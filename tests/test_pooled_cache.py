"""A PooledCache spares chunks of ``generate`` their pooling, and never lends pools of keys that are no longer there."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_flashprefill import FlashPrefillConfig, KeptPools, PooledCache, flash_prefill_attention, patch_model, prefill_stats
from hf_flashprefill.backends import torch as torch_backend
from hf_flashprefill.pooled_cache import pools_of
from hf_flashprefill.support.situations import padding, prompt
from tests.inputs import tiny_model
from tests.test_kept_pools import counted_tokens

# Keeps so little that wrong pools show.
RULE = {"alpha": 0.3, "block_size": 64, "sink_blocks": 1, "window_blocks": 1, "dense_tail_blocks": 0, "min_seq_len": 8}
CHUNK = 128


def generated(model, cache, ids, mask=None, chunk=CHUNK):
    """Tokens and logits of a few steps."""
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk, max_new_tokens=3, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_chunks_of_generate_pool_only_their_own(monkeypatch):
    model, ids = patch_model(tiny_model(), **RULE), prompt(length=600)
    tokens = counted_tokens(monkeypatch, torch_backend)
    expected = generated(model, DynamicCache(config=model.config), ids)
    sparse, density = prefill_stats(model).sparse_calls, prefill_stats(model).density
    # Two layers. transformers before 5 leaves the last token to the first step of decode.
    assert tokens[::2] in ([128, 256, 384, 512, 600], [128, 256, 384, 512, 599])
    assert (sparse, density < 0.7) == (10, True)
    last = tokens[-1] - 512
    tokens.clear()
    assert_same(generated(model, PooledCache(model.config), ids), expected)
    assert tokens == [128] * 8 + [last] * 2
    assert prefill_stats(model).sparse_calls == 2 * sparse


def test_an_unpatched_model_does_not_notice():
    model, ids = tiny_model(), prompt(length=600)
    assert_same(generated(model, PooledCache(model.config), ids), generated(model, DynamicCache(config=model.config), ids))


@torch.no_grad()
def step(model, cache, ids, **options):
    return model(ids, past_key_values=cache, use_cache=True, **options).logits


def test_a_conversation_goes_on_from_what_was_pooled(monkeypatch):
    """Decoded tokens in between were pooled by nobody."""
    model, outcomes = patch_model(tiny_model(), **RULE), []
    for cache in (DynamicCache(config=model.config), PooledCache(model.config)):
        step(model, cache, prompt(length=200))
        for token in range(130):
            step(model, cache, torch.tensor([[token]]))
        tokens = counted_tokens(monkeypatch, torch_backend)
        outcomes.append(step(model, cache, prompt(length=240).flip(1)))
        monkeypatch.undo()
    assert torch.equal(*outcomes)
    # What stands in the first prompt's last, broken block is pooled again.
    assert tokens[::2] == [570 - 192]


def crop(cache):
    cache.crop(-80)
    return cache


def write(cache):
    for layer in cache.layers:
        layer.keys[:, :, 3:200].normal_(generator=torch.Generator().manual_seed(5))
    return cache


def write_values(cache):
    for layer in cache.layers:
        layer.values[:, :, 3:200].normal_(generator=torch.Generator().manual_seed(5))
    return cache


def reorder(cache):
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache


def select(cache):
    cache.batch_select_indices(torch.tensor([1, 1]))
    return cache


def repeat(cache):
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    return cache


def replace(cache):
    for layer in cache.layers:
        layer.keys = layer.keys.flip(2)
    return cache


def replace_values(cache):
    for layer in cache.layers:
        layer.values = layer.values.flip(2)
    return cache


def reset(cache):
    cache.reset()
    return cache


KEEP_POOLS = {"nothing": lambda cache: cache, "copy": copy.copy}
LOSE_POOLS = [crop, write, write_values, reorder, select, repeat, replace, replace_values, reset, copy.deepcopy]


@pytest.mark.parametrize("change", [*KEEP_POOLS.values(), *LOSE_POOLS], ids=[*KEEP_POOLS, *(f.__name__ for f in LOSE_POOLS)])
def test_what_happened_to_the_cache_is_noticed(change, monkeypatch):
    model = patch_model(tiny_model(), **RULE)
    ids, more = prompt(2, 400), prompt(2, 128).flip(1)
    logits, pooled = [], []
    for cache in (DynamicCache(config=model.config), PooledCache(model.config)):
        step(model, cache, ids)
        cache = change(cache)
        tokens = counted_tokens(monkeypatch, torch_backend)
        logits.append(step(model, cache, more))
        pooled.append(tokens[0])
        monkeypatch.undo()
    assert torch.equal(*logits)
    # 400 tokens leave a quarter of a block to be pooled again.
    assert pooled[1] == (144 if change in KEEP_POOLS.values() else pooled[0])


def test_caches_that_share_tensors_go_apart():
    model, caches = patch_model(tiny_model(), **RULE), {}
    ids, one, other = prompt(1, 256), prompt(1, 192).flip(1), prompt(1, 300)[:, 40:232]
    for kind in (partial(DynamicCache, config=model.config), partial(PooledCache, model.config)):
        first = kind()
        step(model, first, ids)
        second = copy.copy(first)
        second.layers = [copy.copy(layer) for layer in first.layers]
        steps = [(first, one), (second, other), (first, other), (second, one)]
        caches[kind] = [step(model, cache, new) for cache, new in steps]
    for found, expected in zip(*caches.values(), strict=True):
        assert torch.equal(found, expected)


def test_other_settings_start_anew(monkeypatch):
    model, ids, more = tiny_model(), prompt(1, 400), prompt(1, 128).flip(1)
    outcomes = []
    for cache in (DynamicCache(config=model.config), PooledCache(model.config)):
        patch_model(model, **RULE)
        step(model, cache, ids)
        patch_model(model, **RULE | {"block_size": 128, "correction": False})
        tokens = counted_tokens(monkeypatch, torch_backend)
        outcomes.append([step(model, cache, more), step(model, cache, ids)])
        monkeypatch.undo()
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))
    assert tokens[::2] == [528, 928 - 512]


def test_inference_mode_pools_everything_anew(monkeypatch):
    """Torch does not count writes there, so nothing shows that the keys are what they were."""
    model, ids = patch_model(tiny_model(), **RULE), prompt(1, 100)
    cache = PooledCache(model.config)
    with torch.inference_mode():
        tokens = counted_tokens(monkeypatch, torch_backend)
        for _ in range(3):
            model(ids, past_key_values=cache, use_cache=True)
    assert tokens[::2] == [100, 200, 300]


def test_padded_batches_pool_their_own(monkeypatch):
    model = patch_model(tiny_model(), **RULE)
    ids, mask = prompt(2), padding("left")
    expected = generated(model, DynamicCache(config=model.config), ids, mask)
    assert prefill_stats(model).sparse_calls
    assert_same(generated(model, PooledCache(model.config), ids, mask), expected)


def test_only_layers_that_hold_every_key_have_pools():
    config = tiny_model("gemma3").config
    kinds = [type(layer).__name__ for layer in PooledCache(config).layers]
    plain = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    assert "DynamicSlidingWindowLayer" in plain
    assert kinds == ["_PooledLayer" if name == "DynamicLayer" else name for name in plain]


def test_pools_die_with_the_keys():
    from hf_flashprefill.pooled_cache import _NOTES

    model = patch_model(tiny_model(), **RULE)
    before, cache = len(_NOTES), PooledCache(model.config)
    for _ in range(3):
        step(model, cache, prompt(1, 100))
        assert len(_NOTES) == before + len(cache.layers)
    del cache
    assert len(_NOTES) == before


def test_wrong_config_is_refused():
    with pytest.raises(TypeError, match="config must be a model's PretrainedConfig, got Linear"):
        PooledCache(torch.nn.Linear(1, 1))


CONFIG = FlashPrefillConfig(alpha=0.3, block_size=64, sink_blocks=1, window_blocks=1, dense_tail_blocks=0, backend="torch")
CHANGES = ("crop", "write", "deepcopy", "branch", "switch", "replace")
STEPS = st.sampled_from(["sparse"] * 3 + ["other", "dense", *CHANGES])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(STEPS, st.integers(1, 200)), min_size=2, max_size=9), st.integers(0, 1000))
def test_random_lives_of_a_cache(steps, seed):
    """Every sparse call, whatever happened to its cache before, gives the bits of a call that pools everything."""
    generator = torch.Generator().manual_seed(seed)
    template = PooledCache(tiny_model().config).layers[0]
    layers = [copy.copy(template), copy.copy(template)]
    for kind, size in steps:
        layer = layers[0]
        if kind in ("sparse", "other", "dense"):
            keys, values = layer.update(*torch.randn(2, 1, 2, size, 8, generator=generator))
            if kind == "dense":
                continue
            config = CONFIG if kind == "sparse" else FlashPrefillConfig(**CONFIG.to_dict() | {"block_size": 128})
            query = torch.randn(1, 4, size, 8, generator=generator)
            pools = pools_of(keys, values, kind)
            assert pools is not None
            anew = KeptPools()
            found = flash_prefill_attention(query, keys, values, config=config, kept_pools=pools)
            assert torch.equal(found, flash_prefill_attention(query, keys, values, config=config, kept_pools=anew))
            # An output may not depend on a pool; the next one's will.
            assert pools.tokens == anew.tokens
            assert all(torch.equal(*pair) for pair in zip(pools._pools, anew._pools, strict=True))
        elif kind == "switch":
            layers.reverse()
        elif kind == "branch":
            layers[1] = copy.copy(layer)
        elif layer.get_seq_length() > size:
            if kind == "crop":
                layer.crop(-size)
            elif kind == "write":
                (layer.keys if size % 2 else layer.values)[:, :, :size].normal_(generator=generator)
            elif kind == "replace":
                layer.values = layer.values.clone().normal_(generator=generator)
            else:
                layers[0] = copy.deepcopy(layer)
