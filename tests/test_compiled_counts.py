"""What compiled graphs count, and where it is kept."""

import ast
import copy
import inspect
import textwrap

import pytest
import torch
from torch._dynamo.utils import counters

from hf_flashprefill import FlashPrefillConfig, patch_model, prefill_stats, register_attention, reset_prefill_stats
from hf_flashprefill import attention as seam
from hf_flashprefill.compiled_counts import DENSE_REASONS, CompiledCounts
from hf_flashprefill.stats import ATTRIBUTE
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import prompt
from tests.inputs import tiny_model

SPARSE = FlashPrefillConfig(alpha=1.0, block_size=64, sink_blocks=0, window_blocks=1, dense_tail_blocks=0, min_seq_len=32)

# Padding stays dense in a graph, whatever the version of transformers.
PADDED = torch.ones(1, 160, dtype=torch.long)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counts_of(model) -> list[CompiledCounts]:
    return [getattr(layer.self_attn, ATTRIBUTE).compiled for layer in model.model.layers]


def test_every_dense_reason_has_its_place():
    given = set(seam.FOREIGN_ARGUMENTS.values()) | {seam.COMPILED_MASK}
    tree = ast.parse(textwrap.dedent(inspect.getsource(seam.dense_reason)))
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Return):
            given |= {
                node.value for node in ast.walk(statement) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
    assert sorted(given - {"decode"}) == sorted(DENSE_REASONS)


@torch.no_grad()
def test_a_patched_model_counts_where_it_did_at_first():
    """As a CUDA graph wants it, which adds to the same memory in every replay."""
    model = patch_model(tiny_model(), config=SPARSE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    places = [tensor.data_ptr() for counts in counts_of(model) for tensor in counts.tensors()]
    for calls in (1, 2, 3):
        compiled(prompt())
        assert prefill_stats(model).sparse_calls + sum(prefill_stats(model).dense_calls.values()) == 2 * calls
    assert [tensor.data_ptr() for counts in counts_of(model) for tensor in counts.tensors()] == places


@torch.no_grad()
def test_calls_inside_and_outside_of_graphs_are_summed():
    model = patch_model(tiny_model(), config=SPARSE, audit_rows=4)
    model(prompt())
    plain = prefill_stats(model)
    reset_prefill_stats(model)
    assert prefill_stats(model).layers == []
    model(prompt())
    torch.compile(model, backend="aot_eager")(prompt())
    both = prefill_stats(model)
    for once, twice in zip(plain.layers, both.layers, strict=True):
        inside = sum(twice.dense_calls.values())
        assert twice.sparse_calls + inside == 2
        assert twice.head_density == once.head_density
        assert twice.dropped_mass == pytest.approx(once.dropped_mass)
        assert twice.largest_dropped_mass == pytest.approx(once.largest_dropped_mass)


@torch.no_grad()
def test_counting_goes_on_after_a_reset_without_another_graph():
    model = patch_model(tiny_model(), config=SPARSE)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(prompt())
    counters.clear()
    for _ in range(2):
        reset_prefill_stats(model)
        compiled(prompt())
        assert prefill_stats(model).sparse_calls + sum(prefill_stats(model).dense_calls.values()) == 2
    assert counters["stats"]["unique_graphs"] == 0


@torch.no_grad()
def test_copies_count_for_themselves():
    model = patch_model(tiny_model(), config=SPARSE)
    torch.compile(model, backend="aot_eager")(prompt(), attention_mask=PADDED)
    before = prefill_stats(model)
    twin = copy.deepcopy(model)
    assert prefill_stats(twin).layers == []
    for calls in (1, 2):
        torch.compile(twin, backend="aot_eager")(prompt(), attention_mask=PADDED)
        assert sum(prefill_stats(twin).dense_calls.values()) == 2 * calls
    assert prefill_stats(model) == before


@torch.no_grad()
def test_other_heads_than_the_config_names_are_counted():
    """As those of one part of a tensor-parallel layer."""
    model = patch_model(tiny_model(), config=SPARSE)
    expected = tiny_model()
    patch_model(expected, config=SPARSE)
    for counts, layer in zip(counts_of(model), model.model.layers, strict=True):
        getattr(layer.self_attn, ATTRIBUTE).compiled = CompiledCounts.lasting(2 * counts.kept.shape[0], counts.kept.device)
    for each in (model, expected):
        compiled = torch.compile(each, backend="aot_eager")
        compiled(prompt(), attention_mask=PADDED)
        compiled(prompt())
        compiled(prompt())
    assert prefill_stats(model) == prefill_stats(expected)


@pytest.mark.parametrize("how", ["patched", "by name"])
def test_counts_begun_under_inference_mode_go_on_without(how):
    settings = FlashPrefillConfig(alpha=0, **SETTINGS)
    model = tiny_model() if how == "patched" else tiny_model(implementation=register_attention(settings))
    if how == "patched":
        with torch.inference_mode():
            patch_model(model, config=settings)
    compiled = torch.compile(model, backend="eager")
    for length in (20, 160):
        with torch.inference_mode():
            compiled(prompt(length=length))
        for _ in range(2):
            with torch.no_grad():
                compiled(prompt(length=length))
    stats = prefill_stats(model)
    assert stats.dense_calls["shorter than min_seq_len"] == 6
    assert stats.sparse_calls + sum(stats.dense_calls.values()) == 12


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graphs_of_a_compiled_model_count_every_prefill():
    """``mode="reduce-overhead"``: what a graph writes outside of itself must be where it was when it was captured."""
    model = patch_model(tiny_model(head_dim=64).cuda(), alpha=0.5, min_seq_len=64, audit_rows=4)
    prompts = torch.randint(3, 199, (4, 1, 400), device="cuda")
    expected = [model(ids).logits for ids in prompts]
    plain = prefill_stats(model)
    reset_prefill_stats(model)
    counters.clear()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for turn in (1, 2):
        for ids, logits in zip(prompts, expected, strict=True):
            torch.testing.assert_close(compiled(ids).logits.clone(), logits, atol=1e-4, rtol=1e-4)
        stats = prefill_stats(model)
        assert (stats.sparse_calls, stats.dense_calls) == (2 * len(prompts) * turn, {})
        for graph, layer in zip(stats.layers, plain.layers, strict=True):
            assert graph.head_density == layer.head_density
            assert graph.dropped_mass == pytest.approx(layer.dropped_mass, rel=1e-4)
    reset_prefill_stats(model)
    compiled(prompts[0])
    assert prefill_stats(model).sparse_calls == 2
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1
