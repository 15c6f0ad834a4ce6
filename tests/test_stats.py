"""What prefill_stats makes of the layers' records, and what becomes of these when a model is unpatched."""

import threading

import pytest
import torch

from hf_flashprefill import FlashPrefillConfig, patch_model, prefill_stats, reset_prefill_stats, unpatch_model, unpatched
from hf_flashprefill.attention import prefill_attention
from hf_flashprefill.patch import attention_replaced
from hf_flashprefill.stats import LayerStats, PrefillStats
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import prompt
from tests.inputs import tiny_model


def test_threads_of_one_model_lose_no_counts():
    model = patch_model(tiny_model(), alpha=0, **SETTINGS)
    ids, mask = torch.randint(3, 150, (2, 150)), torch.ones(2, 150, dtype=torch.int64)
    mask[1, :40] = 0

    def prefill():
        with torch.no_grad():
            for _ in range(30):
                model(ids, attention_mask=mask)

    threads = [threading.Thread(target=prefill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = prefill_stats(model)
    assert [layer.sparse_calls for layer in stats.layers] == [120, 120]
    assert [layer.density for layer in stats.layers] == [1.0, 1.0]


def test_density_is_the_mean_over_the_layers_that_ran_sparse():
    dense, sparse = LayerStats(1, 0, {"dense layer": 3}, None, []), LayerStats(4, 2, {"decode": 5}, 0.3, [0.5, 0.1, 0.3])
    stats = PrefillStats([dense, sparse])
    assert stats.density == 0.3
    assert stats.dense_calls == {"dense layer": 3, "decode": 5}
    assert PrefillStats([dense]).density is None
    _, *rows = (line.split() for line in str(stats).splitlines())
    assert rows[:2] == [["1", "0", "3", "-", "-"], ["4", "2", "5", "0.300", "0.100-0.500"]]


@torch.no_grad()
def test_densities_of_a_model_are_means_beside_the_numbers_of_its_layers():
    model = tiny_model(num_hidden_layers=3)
    for layer in model.model.layers:
        # Its first head knows what it looks for.
        layer.self_attn.q_proj.weight.data[:32] *= 20
    rule = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0, "layer_alphas": (0.0, 0.2, 0.15)}
    patch_model(model, dense_layers=[0], **rule, **SETTINGS)
    model(prompt(length=700))
    stats = prefill_stats(model)
    assert [layer.layer for layer in stats.layers] == [0, 1, 2]
    _, second, third = stats.layers
    assert second.density != third.density
    for layer in (second, third):
        assert len(set(layer.head_density)) > 1
        assert layer.density == pytest.approx(sum(layer.head_density) / 4)
    assert stats.density == pytest.approx((second.density + third.density) / 2)


@torch.no_grad()
def test_statistics_go_on_after_a_while_unpatched():
    model = patch_model(tiny_model(), alpha=0, **SETTINGS)
    model(prompt())
    with unpatched(model):
        model(prompt())
        assert prefill_stats(model).sparse_calls == 2
    model(prompt())
    assert prefill_stats(model).sparse_calls == 4
    unpatch_model(model)
    assert prefill_stats(model).sparse_calls == 4
    reset_prefill_stats(model)
    assert prefill_stats(model).layers == []


@torch.no_grad()
def test_another_attention_for_a_while_leaves_the_statistics_alone():
    model = patch_model(tiny_model(), alpha=0, **SETTINGS)
    model(prompt())
    before = prefill_stats(model)
    with attention_replaced(model, FlashPrefillConfig(**SETTINGS), prefill_attention) as inner:
        assert prefill_stats(inner).layers == []
        inner(prompt())
        inner(prompt())
    assert prefill_stats(model) == before
