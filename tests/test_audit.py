"""The audit of production calls: dropped mass by a whole attention map, padding, parts of a prompt, one warning, the table."""

import warnings

import pytest
import torch

import hf_flashprefill.attention as seam
import hf_flashprefill.functional as functional
from eval.probe import attention_inputs
from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention, patch_model, prefill_stats, reset_prefill_stats
from hf_flashprefill.attention_mass import exact_shares, kept_shares, spread_positions
from hf_flashprefill.audit import RowAudit
from hf_flashprefill.functional import select_in_rounds
from hf_flashprefill.geometry import PrefillGeometry
from hf_flashprefill.integrations.vllm.config import settings_from
from hf_flashprefill.support.situations import prompt
from tests.inputs import UGLY_CASES, Case, tiny_model

SPARSE = FlashPrefillConfig(
    alpha=1.0, block_size=64, sink_blocks=0, window_blocks=1, dense_tail_blocks=0, min_seq_len=32, audit_rows=7
)
PADDED = Case(3, 4, 2, 300, 500, 64, ranges=((100, 500), (0, 460), (490, 500)))


def dropped_by_hand(case, query, key, ranges, index, rows, scale, sinks=None):
    """Dropped share of sampled queries [B, Hq, rows] from float64 attention, query by query."""
    mask, block = index.to_mask(), index.geometry.block_size
    positions = spread_positions(index.geometry, rows, query.device)
    dropped = torch.zeros(case.batch, case.heads, rows, dtype=torch.float64)
    for row in range(case.batch):
        start, end = (0, case.kv_len) if ranges is None else ranges[row].tolist()
        first_query = max(case.offset, start)
        if min(end, case.offset + case.query_len) <= first_query:
            continue
        for head in range(case.heads):
            for r, position in enumerate(positions[row].tolist()):
                at = start + position
                assert first_query <= at < end
                keys = key[row, head * case.key_heads // case.heads, start : at + 1].double()
                logits = keys @ query[row, head, at - case.offset].double() * scale
                if sinks is not None:
                    logits = torch.cat([logits, sinks[head : head + 1].double()])
                shares = logits.softmax(-1)[: len(keys)]
                kept = mask[row, head, position // block - (first_query - start) // block].repeat_interleave(block)
                dropped[row, head, r] = (shares * ~kept[: len(keys)]).sum()
    return dropped


@pytest.mark.parametrize("case", [case for case in UGLY_CASES if case.kv_len > 128] + [PADDED], ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_dropped_mass_equals_float64_attention(case, with_sinks, monkeypatch):
    query, key, value, ranges = case.tensors(torch.device("cpu"))
    sinks = torch.randn(case.heads) if with_sinks else None
    # Lists come two query blocks at a time, logits one key-value head at a time.
    monkeypatch.setattr(functional, "SCRATCH_BYTES", 2 * 8 * case.batch * case.heads * -(-case.kv_len // 64))
    monkeypatch.setattr("hf_flashprefill.attention_mass.LOGITS_AT_ONCE", 1)
    audit = RowAudit(query, key, rows=7, scale=0.3, sinks=sinks)
    options = {"scale": 0.3, "query_offset": case.query_offset, "valid_ranges": ranges, "sinks": sinks}
    index = flash_prefill_attention(
        query, key, value, config=SPARSE, on_index=audit.add_index, return_index=True, **options
    ).index
    expected = dropped_by_hand(case, query, key, ranges, index, 7, 0.3, sinks)
    mean, calls, largest = audit.dropped().tolist()
    valid = case.batch if ranges is None else sum(end > max(first, case.offset) for first, end in ranges.tolist())
    assert expected.amax() > 0.05
    assert mean == pytest.approx((expected.sum() / (valid * case.heads * 7)).item(), abs=1e-5)
    assert largest == pytest.approx(expected.amax().item(), abs=1e-5)
    assert calls == 1


def test_lists_alone_are_those_of_the_operator():
    query, key, value, _ = Case(1, 4, 2, 500, 700, 64).tensors(torch.device("cpu"))
    geometry = PrefillGeometry(1, 500, 700, 200, 64)
    for backend in ("torch", "reference"):
        config = FlashPrefillConfig(alpha=0.02, block_size=64, backend=backend)
        index = flash_prefill_attention(query, key, value, config=config, return_index=True).index
        (alone,) = select_in_rounds(query, key, geometry, config, 64**-0.5)
        assert torch.equal(alone.to_mask(), index.to_mask())


def test_rows_are_spread_and_do_not_hit_one_place_of_the_blocks():
    positions = spread_positions(PrefillGeometry(1, 8192, 8192, 0, 128), 64, torch.device("cpu"))[0]
    assert torch.equal(positions // 128, torch.arange(64))
    places = (positions % 128) // 16
    assert places.bincount(minlength=8).min() >= 4
    assert 0.05 < ((positions + 1) % 8 == 0).double().mean() < 0.25


@pytest.mark.parametrize("lengths", [(400, 100), (100, 400)])
@torch.no_grad()
def test_stats_report_what_the_layers_dropped(lengths):
    model, expected = patch_model(tiny_model(), config=SPARSE, audit_limit=1.0), ([], [])
    for calls, length in enumerate(lengths, 1):
        for states, dropped in zip(attention_inputs(model, prompt(length=length)[0]), expected, strict=True):
            index = flash_prefill_attention(*states, config=SPARSE, return_index=True).index
            positions = spread_positions(index.geometry, 7, states.query.device)
            shares = exact_shares(states.query, states.key, index.geometry, positions, scale=states.query.shape[-1] ** -0.5)
            dropped.append(1 - kept_shares(shares, positions, index))
        stats = prefill_stats(model)
        assert stats.sparse_calls == 2 * calls
        for layer, dropped in zip(stats.layers, expected, strict=True):
            assert layer.dropped_mass == pytest.approx(sum(each.mean().item() for each in dropped) / calls, abs=1e-6)
            assert layer.largest_dropped_mass == pytest.approx(max(each.amax().item() for each in dropped), abs=1e-6)
            assert 0.05 < layer.dropped_mass < layer.largest_dropped_mass
            assert f"{layer.dropped_mass:.4f}, {layer.largest_dropped_mass:.4f}" in str(stats)
    assert stats.to_dict()["layers"][1]["dropped_mass"] == stats.layers[1].dropped_mass
    assert all(first.amax() != second.amax() for first, second in expected)


@pytest.mark.parametrize(("family", "change"), [("gemma3", {"query_pre_attn_scalar": 2}), ("gpt_oss", {})])
@torch.no_grad()
def test_the_audit_sees_a_layers_scale_sinks_and_window(family, change, monkeypatch):
    model, operator, expected = tiny_model(family, "eager", **change), seam.flash_prefill_attention, []
    if family == "gpt_oss":
        for layer in model.model.layers:
            layer.self_attn.sinks.data = torch.arange(4.0)

    def audited(query, key, value, *, on_index, **options):
        audit = RowAudit(query, key, rows=7, scale=options["scale"], sinks=options["sinks"])

        def both(index):
            audit.add_index(index)
            on_index(index)

        output = operator(query, key, value, on_index=both, **options)
        expected.append(None if options["sliding_window"] else audit.dropped()[0].item())
        return output

    monkeypatch.setattr(seam, "flash_prefill_attention", audited)
    patch_model(model, config=SPARSE, audit_limit=1.0)
    model(prompt(length=400))
    windowed, full = prefill_stats(model).layers
    assert windowed.sparse_calls == full.sparse_calls == 1
    assert windowed.dropped_mass is expected[0] is None
    assert full.dropped_mass == pytest.approx(expected[1], abs=1e-6)
    assert full.dropped_mass > 0.01


@torch.no_grad()
def test_nothing_is_dropped_at_alpha_zero_and_nothing_is_audited_unasked(monkeypatch):
    model, ids = tiny_model(), torch.randint(2, 199, (2, 400))
    mask = torch.ones_like(ids)
    mask[0, :130] = 0
    patch_model(model, config=SPARSE, alpha=0)
    model(ids, attention_mask=mask)
    layers = prefill_stats(model).layers
    assert [layer.sparse_calls for layer in layers] == [1, 1]
    assert all(abs(layer.largest_dropped_mass) < 1e-6 for layer in layers)
    patch_model(model, config=SPARSE, audit_rows=0)
    monkeypatch.setattr(RowAudit, "__init__", None)
    model(ids)
    stats = prefill_stats(model)
    assert stats.sparse_calls == 2
    assert stats.layers[0].dropped_mass is None
    assert "dropped" not in str(stats)


def warnings_of(call) -> int:
    with pytest.warns(UserWarning, match="above audit_limit=0.05") as caught:
        call()
    return len(caught)


@torch.no_grad()
def test_it_warns_once_when_a_later_call_or_the_stats_see_it():
    model, ids = patch_model(tiny_model(), config=SPARSE), torch.randint(2, 199, (1, 400))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The first call's numbers are on their way to the host.
        model(ids)
    assert warnings_of(lambda: (model(ids), model(ids), model(ids), prefill_stats(model))) == 1
    reset_prefill_stats(model)
    model(ids)
    assert warnings_of(lambda: (prefill_stats(model), prefill_stats(model), model(ids))) == 1
    patch_model(model, config=SPARSE, audit_limit=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
        model(ids)
        prefill_stats(model)


@torch.no_grad()
def test_reading_the_stats_warns_by_itself():
    model = patch_model(tiny_model(), config=SPARSE)
    model(prompt(length=400))
    assert warnings_of(lambda: prefill_stats(model)) == 1


@torch.no_grad()
def test_it_warns_of_calls_that_follow_harmless_ones():
    model, ids = patch_model(tiny_model(), config=SPARSE), prompt(length=400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            # One block: nothing can be dropped.
            model(ids[:, :64])
        model(ids)
    assert warnings_of(lambda: (model(ids), model(ids))) == 1


@pytest.mark.parametrize("field", [{"audit_rows": 4}, {"layer_alphas": [0.1, 0.2]}])
def test_vllm_refuses_what_it_does_not_have(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))} .*not in vLLM"):
        settings_from({"flashprefill": field})
