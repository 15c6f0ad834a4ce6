"""Calibration on the bundled model: the target on unseen prompts, masses by whole attention maps, a model left alone."""

import math

import pytest
import torch

import hf_flashprefill.calibration as calibration
from eval.haystack import encode, standard_library_text
from eval.probe import AttentionInput, attention_inputs, attention_map
from hf_flashprefill import (
    BlockIndex,
    FlashPrefillConfig,
    UnsupportedModelError,
    calibrate,
    flash_prefill_attention,
    is_patched,
    patch_model,
    patched,
    patched_config,
    prefill_stats,
)
from hf_flashprefill.attention_mass import spread_positions
from hf_flashprefill.geometry import PrefillGeometry
from tests.inputs import tiny_model

CONFIG = FlashPrefillConfig(min_seq_len=1024, sink_blocks=1, window_blocks=2, dense_tail_blocks=0)
ALPHAS = (0.003, 0.01, 0.03, 0.1, 0.3)


@pytest.fixture(scope="module")
def prompts(recall_model):
    corpus = encode(recall_model[1], standard_library_text("held_out")[:200_000])
    return [corpus[start : start + 1600] for start in range(0, 9600, 1600)]


@pytest.fixture(scope="module")
def result(recall_model, prompts):
    return calibrate(recall_model[0], prompts[:4], target=0.97, config=CONFIG, alphas=ALPHAS, progress=False)


def exact_kept_mass(maps: torch.Tensor, index: BlockIndex, positions: torch.Tensor | slice) -> torch.Tensor:
    """Kept share of whole attention maps [Hq, S, S] at some rows, [Hq, R]."""
    kept, block, length = index.to_mask()[0], index.geometry.block_size, maps.shape[-1]
    tokens = kept.repeat_interleave(block, 1)[:, :length].repeat_interleave(block, 2)[:, :, :length]
    return (maps * tokens).sum(-1)[:, positions]


def attention_maps(states: AttentionInput) -> torch.Tensor:
    return torch.stack([attention_map(states.query, states.key, head) for head in range(states.query.shape[1])])


def test_the_target_is_met_on_prompts_it_has_not_seen(recall_model, prompts, result):
    """Every row of every layer of the sparse model, on prompts that played no part."""
    model = recall_model[0]
    shares, errors = [], []
    for ids in prompts[4:]:
        with patched(model, config=result.config):
            for layer, states in enumerate(attention_inputs(model, torch.tensor(ids))):
                config = FlashPrefillConfig(
                    **{**result.config.to_dict(), "alpha": result.config.layer_alphas[layer], "layer_alphas": None}
                )
                index = flash_prefill_attention(*states, config=config, return_index=True).index
                rows = exact_kept_mass(attention_maps(states), index, slice(None)).mean(0)
                shares.append(rows.mean().item())
                errors.append(rows.std().item() / math.sqrt(64))
    per_layer = torch.tensor(shares).view(2, 4).mean(0)
    # 64 sampled rows of other prompts stood for all rows of these.
    tolerance = 3 * max(errors) / math.sqrt(2)
    assert tolerance < 0.03
    assert (per_layer > 0.97 - tolerance).all(), per_layer
    assert result.held_out_mass == pytest.approx(sum(shares) / len(shares), abs=tolerance)
    assert all(layer.held_out_mass > 0.97 - tolerance for layer in result.layers)
    assert (result.prompts, result.held_out) == (3, 1)
    assert result.held_out_density < 0.95


def test_the_table_is_what_whole_attention_maps_say(recall_model, prompts):
    model, ids = recall_model[0], prompts[0][:1300]
    result = calibrate(model, [ids], target=0.9, config=CONFIG, alphas=ALPHAS, rows=20, progress=False)
    geometry = PrefillGeometry(1, 1300, 1300, 0, 128)
    positions = spread_positions(geometry, 20, torch.device("cpu"))[0]
    for layer, states in zip(result.layers, attention_inputs(model, torch.tensor(ids)), strict=True):
        masses, densities, maps = {}, {}, attention_maps(states)
        for alpha in (0, *ALPHAS):
            config = FlashPrefillConfig(**{**CONFIG.to_dict(), "alpha": alpha})
            index = flash_prefill_attention(*states, config=config, return_index=True).index
            masses[alpha] = exact_kept_mass(maps, index, positions).mean(1)
            densities[alpha] = index.density()
        best = max(alpha for alpha, mass in masses.items() if mass.mean() >= 0.9)
        assert layer.alpha == best
        assert layer.mass == pytest.approx(masses[best].mean().item(), abs=1e-5)
        assert layer.lowest_head_mass == pytest.approx(masses[best].min().item(), abs=1e-5)
        assert layer.density == pytest.approx(densities[best])
        assert layer.held_out_mass is None
    assert result.config.layer_alphas == tuple(layer.alpha for layer in result.layers)
    assert f"{result.layers[2].mass:.4f}" in str(result)


def test_a_lower_target_costs_less_and_every_head_costs_more(recall_model, prompts, result):
    options = {"config": CONFIG, "alphas": ALPHAS, "progress": False, "held_out": []}
    low = calibrate(recall_model[0], prompts[:2], target=0.8, **options)
    heads = calibrate(recall_model[0], prompts[:2], target=0.97, every_head=True, **options)
    density = [sum(layer.density for layer in each.layers) for each in (low, result, heads)]
    assert density == sorted(density)
    assert len(set(density)) == 3
    assert all(layer.lowest_head_mass >= 0.97 for layer in heads.layers)
    assert any(layer.lowest_head_mass < 0.97 for layer in result.layers)


@pytest.mark.parametrize("selector", ["peak", "flashprefill"])
def test_other_selectors_meet_the_target_too(selector, recall_model, prompts):
    config = FlashPrefillConfig(**{**CONFIG.to_dict(), "selector": selector})
    found = calibrate(recall_model[0], prompts[:1], target=0.95, config=config, alphas=ALPHAS, rows=16, progress=False)
    assert found.config.selector == selector
    assert all(layer.mass >= 0.95 for layer in found.layers)
    assert any(layer.alpha > 0 for layer in found.layers)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("is_patched_before", [False, True])
def test_the_model_is_left_as_it_was(implementation, is_patched_before, monkeypatch):
    model = tiny_model(implementation=implementation)
    ids = torch.randint(2, 199, (1, 700))
    before = {"alpha": 0.5, "min_seq_len": 32, "block_size": 64}
    with torch.no_grad():
        if is_patched_before:
            patch_model(model, **before)
        expected, name = model(ids).logits, model.config._attn_implementation
    stats = prefill_stats(model).to_dict()
    config = FlashPrefillConfig(min_seq_len=32, block_size=64)

    def is_as_before():
        assert model.config._attn_implementation == name
        assert is_patched(model) == is_patched_before
        assert patched_config(model) == (FlashPrefillConfig(**before).resolved() if is_patched_before else None)
        assert prefill_stats(model).to_dict() == stats

    assert len(calibrate(model, [ids, ids], config=config, alphas=[0.1], progress=False).layers) == 2
    is_as_before()

    def interrupting(*args, **kwargs):
        raise KeyboardInterrupt

    for stage in ("exact_shares", "_with_audit"):
        monkeypatch.setattr(calibration, stage, interrupting)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, [ids, ids], config=config, alphas=[0.1], progress=False)
        monkeypatch.undo()
        is_as_before()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_layers_that_stay_dense_keep_all():
    model = tiny_model()
    config = FlashPrefillConfig(min_seq_len=32, block_size=64, dense_layers=(0,), alpha=0.3)
    result = calibrate(model, [list(range(2, 199)) * 4], target=0.5, config=config, progress=False)
    assert [layer.layer for layer in result.layers] == [1]
    assert result.config.layer_alphas[0] == 0
    assert result.config.layer_alphas[1] > 0
    assert result.config.dense_layers == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": 1.0}, ValueError, "target must be a number above 0 and below 1, got 1.0"),
        ({"target": 0}, ValueError, "target"),
        ({"alphas": [2]}, ValueError, "alphas must be numbers from 0 to 1"),
        ({"rows": 0}, ValueError, "rows must be a whole number >= 1"),
        ({"prompts": []}, ValueError, "prompts must hold at least one prompt"),
        ({"prompts": [[3] * 500]}, ValueError, "at least 1024 tokens, the longest has 500"),
        ({"prompts": [[3] * 1200], "config": None}, ValueError, "reach min_seq_len='auto' of config, the longest has 1200"),
        ({"prompts": "text"}, TypeError, "prompts must be a sequence"),
        ({"prompts": ["text"]}, TypeError, "integer tensors"),
        ({"prompts": [torch.ones(2, 2000).long()]}, TypeError, "integer tensors"),
        ({"config": 0.1}, TypeError, "config must be a FlashPrefillConfig"),
        ({"config": FlashPrefillConfig(min_seq_len=1, dense_layers=(0, 1))}, UnsupportedModelError, "dense layer"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    model = tiny_model()
    with pytest.raises(error, match=message):
        calibrate(model, **{"prompts": [[3] * 2000], "config": CONFIG, "progress": False} | arguments)
    assert not is_patched(model)


@pytest.mark.parametrize("least", [8192, 0])
def test_prompts_that_are_too_short_are_not_run_in_vain(least, monkeypatch):
    """By the model's config, or, where that does not say it, after the longest."""
    run = []
    if not least:
        monkeypatch.setattr(calibration, "min_seq_len_of_model", lambda *_: 0)
    model = tiny_model()
    model.register_forward_pre_hook(lambda module, args, kwargs: run.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    with pytest.raises(ValueError, match="reach min_seq_len='auto' of config, the longest has 1400"):
        calibrate(model, [[3] * length for length in (1200, 1400, 1300)], held_out=[], progress=False)
    assert run == ([] if least else [1400])
    assert not is_patched(model)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="PreTrainedModel"):
        calibrate(torch.nn.Linear(2, 2), [[3] * 20_000], progress=False)


@pytest.mark.parametrize(("dtype", "hint"), [(torch.float32, ""), (torch.bfloat16, "; float32 may help")])
@torch.no_grad()
def test_attention_that_is_no_number_is_refused(dtype, hint):
    model, config = tiny_model().to(dtype), FlashPrefillConfig(min_seq_len=32, block_size=64)
    model.model.layers[1].self_attn.k_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=f"layer 1 is not a number in b?float[0-9]+{hint}$"):
        calibrate(model, [list(range(2, 199)) * 4], config=config, progress=False)
    assert not is_patched(model)
