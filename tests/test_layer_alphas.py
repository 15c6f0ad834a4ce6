"""One alpha per layer: which layer runs with which, eager, compiled, from a file, and who may replace it."""

import pytest
import torch

import hf_flashprefill.attention as seam
from hf_flashprefill import (
    FlashPrefillConfig,
    patch_model,
    patched,
    patched_config,
    prefill_stats,
    register_attention,
    reset_prefill_stats,
)
from tests.inputs import tiny_model
from tests.test_compile import needs_lengths_in_masks

# In an order that no sorting would give.
ALPHAS = (1.0, 0.0)
SPARSE = FlashPrefillConfig(
    layer_alphas=ALPHAS, block_size=64, sink_blocks=0, window_blocks=1, dense_tail_blocks=0, min_seq_len=32
)


def prompt() -> torch.Tensor:
    return torch.randint(2, 199, (1, 400))


@pytest.fixture
def seen(monkeypatch):
    """The settings of every call of the operator."""
    configs, operator = [], seam.flash_prefill_attention

    def recording(*args, config, **kwargs):
        configs.append(config)
        return operator(*args, config=config, **kwargs)

    monkeypatch.setattr(seam, "flash_prefill_attention", recording)
    return configs


@torch.no_grad()
def test_every_layer_runs_with_its_own_alpha(seen, tmp_path):
    path, ids = tmp_path / "config.json", prompt()
    SPARSE.to_json(path)
    model = patch_model(tiny_model(), config=path)
    assert patched_config(model) == SPARSE.resolved()
    model(ids)
    model(ids)
    assert [config.alpha for config in seen] == [*ALPHAS, *ALPHAS]
    assert all(config.layer_alphas is None for config in seen)
    # Built once, not in every call.
    assert seen[0] is seen[2]
    assert seen[1] is seen[3]
    few_blocks, all_blocks = (layer.density for layer in prefill_stats(model).layers)
    assert all_blocks == 1
    assert few_blocks < 0.5


@needs_lengths_in_masks
@torch.no_grad()
def test_a_compiled_layer_runs_with_its_own_alpha():
    ids = prompt()
    model = patch_model(tiny_model(), config=SPARSE, audit_rows=5, audit_limit=1.0)
    expected = model(ids).logits
    eager = prefill_stats(model)
    reset_prefill_stats(model)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(ids).logits, expected)
    assert prefill_stats(model) == eager
    assert eager.layers[1].density == 1
    assert eager.layers[1].dropped_mass < 1e-6 < eager.layers[0].dropped_mass


def test_one_alpha_replaces_those_of_the_layers():
    model = tiny_model()
    for arguments in ({"alpha": 0.5}, {"alpha": 0.5, "sink_blocks": 1}):
        with patched(model, config=SPARSE, **arguments):
            assert patched_config(model).layer_alphas is None
            assert patched_config(model).alpha == 0.5
    for arguments in ({"sink_blocks": 1}, {"alpha": 0.5, "layer_alphas": ALPHAS}):
        with patched(model, config=SPARSE, **arguments):
            assert patched_config(model).layer_alphas == ALPHAS


@torch.no_grad()
def test_a_layer_without_an_alpha_is_named():
    name = register_attention(FlashPrefillConfig(layer_alphas=(0.5,), min_seq_len=32))
    model = tiny_model()
    model.set_attn_implementation(name)
    with pytest.raises(ValueError, match="got 1 for layer 1"):
        model(prompt())
