"""torch.compile: the operator as a custom op, and whole models whose compiled prefill stays sparse and counted."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

import hf_flashprefill.functional as functional
from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention, patch_model, prefill_stats, register_attention
from hf_flashprefill.audit import RowAudit
from hf_flashprefill.custom_op import config_to_json, sparse_prefill
from hf_flashprefill.masking import _TAKES_CACHE_POSITION
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import SITUATIONS, padding, prompt
from tests.inputs import tiny_model
from tests.tolerance import assert_same_output

SPARSE = FlashPrefillConfig(alpha=1.0, block_size=64, sink_blocks=0, window_blocks=1, dense_tail_blocks=0)

needs_lengths_in_masks = pytest.mark.skipif(
    _TAKES_CACHE_POSITION, reason="before transformers 5.4 mask functions get positions as a tensor, which a graph cannot read"
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def tensors(query_len: int = 300, kv_len: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = torch.randn(2, query_len, 4, 64).transpose(1, 2)
    key, value = torch.randn(2, 2, 2, kv_len, 64).unbind(0)
    return query, key, value


@pytest.mark.parametrize(("window", "sinks"), [(None, None), (100, None), (None, torch.arange(4.0)), (100, torch.arange(4.0))])
def test_the_op_is_the_operator(window, sinks):
    query, key, value = tensors()
    options = {"scale": 0.2, "sliding_window": window, "sinks": sinks}
    expected, index = flash_prefill_attention(query, key, value, config=SPARSE, return_index=True, **options)
    output, kept, visible, dropped = sparse_prefill(query, key, value, None, config_to_json(SPARSE), **options)
    assert torch.equal(output, expected.transpose(1, 2))
    assert output.is_contiguous()
    assert kept.tolist() == index.counts.sum((0, 2)).tolist()
    assert int(visible) == int(index.visible_total())
    assert kept.sum() < visible * 4
    assert dropped.tolist() == [0, 0, 0]


def test_the_op_adds_up_what_its_rounds_keep(monkeypatch):
    query, key, value = tensors()
    index = flash_prefill_attention(query, key, value, config=SPARSE, scale=0.2, return_index=True).index
    # Lists come one query block at a time.
    monkeypatch.setattr(functional, "SCRATCH_BYTES", 1)
    _, kept, visible, _ = sparse_prefill(query, key, value, None, config_to_json(SPARSE), 0.2)
    assert kept.tolist() == index.counts.sum((0, 2)).tolist()
    assert int(visible) == int(index.visible_total())


@pytest.mark.parametrize("sinks", [None, torch.arange(4.0)])
def test_the_op_audits_what_the_uncompiled_call_audits(sinks):
    query, key, value = tensors()
    audit = RowAudit(query, key, rows=9, scale=0.2, sinks=sinks)
    flash_prefill_attention(query, key, value, config=SPARSE, scale=0.2, sinks=sinks, on_index=audit.add_index)
    settings = config_to_json(replace(SPARSE, audit_rows=9))
    dropped = sparse_prefill(query, key, value, None, settings, 0.2, None, sinks)[3]
    assert torch.equal(dropped, audit.dropped())
    assert 0 < dropped[0] < dropped[2] < 1


def test_the_op_keeps_the_rules_of_custom_ops():
    torch.library.opcheck(sparse_prefill, (*tensors(), None, config_to_json(SPARSE), 0.125))
    torch.library.opcheck(sparse_prefill, (*tensors(), None, config_to_json(SPARSE), 0.125, 100, torch.arange(4.0)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_takes_the_op():
    settings = config_to_json(SPARSE)

    def layer(query, key, value):
        return sparse_prefill(query, key, value, None, settings, 0.125)[0] * 2

    inputs = tensors()
    assert_same_output(torch.compile(layer, fullgraph=True)(*inputs), layer(*inputs))


@needs_lengths_in_masks
@pytest.mark.parametrize(("family", "base"), [("llama", "sdpa"), ("qwen3_moe", "sdpa"), ("gpt_oss", "eager")])
@torch.no_grad()
def test_compiled_prefill_is_sparse_at_every_length_with_one_dynamic_graph(family, base):
    model = patch_model(tiny_model(family, base), config=SPARSE, min_seq_len=32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    lengths = (160, 200, 250, 330, 411)
    for length in lengths:
        ids = prompt(length=length)
        got = compiled(ids).logits
        recorded = prefill_stats(model).sparse_calls
        assert_same_output(got, model(ids).logits)
        assert prefill_stats(model).sparse_calls == recorded + 2
    # The first length compiles with its own number, the second with any number.
    assert counters["stats"]["unique_graphs"] == 2
    stats = prefill_stats(model)
    assert (stats.sparse_calls, stats.dense_calls) == (4 * len(lengths), {})
    assert 0 < stats.density < 1
    assert all(len(layer.head_density) == 4 for layer in stats.layers)


@needs_lengths_in_masks
@torch.no_grad()
def test_compiled_windows_are_exact_on_both_sides_of_their_length():
    model = tiny_model("mistral", sliding_window=200)
    lengths = (160, 250, 201, 200)
    expected = [model(prompt(length=length)).logits for length in lengths]
    patch_model(model, alpha=0, **SETTINGS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length, theirs in zip(lengths, expected, strict=True):
        assert_same_output(compiled(prompt(length=length)).logits, theirs)
    stats = prefill_stats(model)
    assert (stats.sparse_calls, stats.dense_calls) == (2 * len(lengths), {})


@needs_lengths_in_masks
@torch.no_grad()
def test_a_compiled_layer_keeps_its_own_scale_and_a_window_has_no_audit():
    model = tiny_model("gemma3", query_pre_attn_scalar=2)
    expected = model(prompt()).logits
    patch_model(model, alpha=0, audit_rows=4, **SETTINGS)
    assert_same_output(torch.compile(model, backend="eager", fullgraph=True)(prompt()).logits, expected)
    stats = prefill_stats(model)
    assert (stats.sparse_calls, stats.dense_calls) == (2, {})
    assert stats.layers[0].dropped_mass is None
    assert stats.layers[1].dropped_mass < 1e-6


@needs_lengths_in_masks
@torch.no_grad()
def test_compiled_packed_sequences_under_a_window_stay_apart():
    model, packed = tiny_model("mistral"), SITUATIONS["packed_by_positions"].run
    (expected,) = packed(model)
    assert (expected - model(prompt(), use_cache=False).logits).abs().max() > 1e-3
    patch_model(model, alpha=0, **SETTINGS)
    (got,) = packed(torch.compile(model, backend="eager"))
    assert_same_output(got, expected)


@needs_lengths_in_masks
@torch.no_grad()
def test_a_compiled_chunk_over_a_cropped_cache():
    model, ids = tiny_model("mistral"), prompt()

    def run(second):
        cache = DynamicCache(config=model.config)
        model(ids[:, :90], past_key_values=cache, use_cache=True)
        return second(ids[:, 90:], past_key_values=cache, use_cache=True).logits

    expected = run(model)
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(run(torch.compile(model, backend="eager")), expected)


@needs_lengths_in_masks
@torch.no_grad()
def test_compiled_chunked_attention_is_not_taken_for_a_window():
    """Its mask functions look the same to a graph."""
    model = tiny_model("llama4")
    expected = model(prompt()).logits
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(torch.compile(model, backend="eager", fullgraph=True)(prompt()).logits, expected)
    assert prefill_stats(model).dense_calls == {"mask unknown while compiling": 1}


@torch.no_grad()
def test_graphs_take_masks_of_windows_made_outside():
    """As generate makes them for a static cache."""
    model = patch_model(tiny_model("mistral"), config=SPARSE, min_seq_len=32)
    ids, mask, seen = prompt(2), padding("left"), []
    layer = model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    handle.remove()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same_output(compiled(ids, attention_mask=seen[0]).logits[mask.bool()], expected)
    stats = prefill_stats(model)
    assert (stats.sparse_calls, stats.dense_calls) == (4, {})


@needs_lengths_in_masks
@torch.no_grad()
def test_compiled_and_uncompiled_calls_count_the_same():
    model = patch_model(tiny_model(), config=SPARSE, min_seq_len=32)
    model(prompt())
    eager = prefill_stats(model)
    patch_model(model, config=SPARSE, min_seq_len=32)
    torch.compile(model, backend="eager", fullgraph=True)(prompt())
    assert prefill_stats(model) == eager


@needs_lengths_in_masks
@torch.no_grad()
def test_a_compiled_model_follows_unpatching_and_new_settings():
    model = tiny_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = compiled(prompt()).logits
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(compiled(prompt()).logits, expected)
    assert prefill_stats(model).sparse_calls == 2
    patch_model(model, alpha=0, dense_layers=[0], **SETTINGS)
    assert_same_output(compiled(prompt()).logits, expected)
    assert (prefill_stats(model).sparse_calls, prefill_stats(model).dense_calls) == (1, {"dense layer": 1})


@needs_lengths_in_masks
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exported_models_give_the_numbers_of_the_unpatched(strict):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids).logits

    model = tiny_model()
    expected = model(prompt()).logits
    exported = torch.export.export(Logits(patch_model(model, alpha=0, **SETTINGS)), (prompt(),), strict=strict)
    assert_same_output(exported.module()(prompt()), expected)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@torch.no_grad()
def test_compiled_short_prompts_stay_dense_in_one_graph(base, monkeypatch):
    model = tiny_model(implementation=base)
    expected = model(prompt(length=40)).logits
    patch_model(model)
    for found in (None, {}):
        if found is not None:
            # As in a fresh process that unpickles the model.
            monkeypatch.setattr("hf_flashprefill.fitting._EAGER_ATTENTION", found)
            torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_same_output(compiled(prompt(length=40)).logits, expected)
    assert prefill_stats(model).dense_calls == {"shorter than min_seq_len": 4}


@torch.no_grad()
def test_compiled_padding_stays_dense_and_counted():
    model = patch_model(tiny_model(), alpha=0, **SETTINGS)
    ids, mask = prompt(2), padding("left")
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        got = compiled(ids, attention_mask=mask).logits[mask.bool()]
    assert prefill_stats(model).dense_calls == {"mask unknown while compiling": 6}
    assert_same_output(got, model(ids, attention_mask=mask).logits[mask.bool()])


@needs_lengths_in_masks
@torch.no_grad()
def test_models_loaded_under_the_registered_name_count_while_compiling():
    model = tiny_model(implementation=register_attention(FlashPrefillConfig(alpha=0, **SETTINGS)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        compiled(prompt())
    assert prefill_stats(model).sparse_calls == 6
