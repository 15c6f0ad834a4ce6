"""eval.selection on the bundled model: every point against an independent computation, the oracles against what they claim."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from eval import commands, report, selection
from eval.haystack import encode, standard_library_text
from eval.oracle import block_masses, index_from_masses, oracle_selection
from eval.probe import AttentionInput, attention_inputs
from eval.recall_prompts import make_prompts
from eval.schema import timeless
from eval.selection_layers import LayerObserver, sampled_rows
from eval.selection_points import DEFAULT_CURVES, parse_curves
from hf_flashprefill import FlashPrefillConfig, attention_mass, flash_prefill_attention, functional, patched, prefill_stats
from hf_flashprefill.config import SORTING_SELECTORS
from hf_flashprefill.geometry import PrefillGeometry

LENGTH, FACTS, QUESTIONS = 1500, 4, 9
CURVES = ["share:0.2,0", "flashprefill:0.3@block_size=64,correction=true", "topk:0.7", "oracle-max:0,0.3"]
BASE = FlashPrefillConfig(min_seq_len=1, dense_tail_blocks=0)
FORCED = {"sink_blocks": 1, "window_blocks": 1, "dense_tail_blocks": 1}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "source.txt"
    text.write_text(standard_library_text("held_out")[:100_000])
    sizes = ["--lengths", str(LENGTH), "--prompts", "2", "--facts", str(FACTS), "--questions", str(QUESTIONS)]
    return [*sizes, "--device", "cpu", "--dataset", str(text), "--curves", *CURVES]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A run that nothing interrupted, with its times."""
    path = tmp_path_factory.mktemp("whole") / "selection.json"
    assert selection.main([*options, "--output", str(path)]) == 0
    assert sorted(file.name for file in path.parent.iterdir()) == ["selection.json", "selection.png"]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def prompts(recall_model):
    corpus = encode(recall_model[1], standard_library_text("held_out")[:100_000])
    return make_prompts(recall_model[1], corpus, LENGTH, 2, FACTS, QUESTIONS)


@pytest.fixture(scope="module")
def layers(recall_model, prompts):
    return attention_inputs(recall_model[0], prompts[0].ids)


def answers_and_loss(model, prompt):
    """Wrong questions and mean loss of the ordinary text, from the logits of the whole prompt."""
    with torch.no_grad():
        logits = model(prompt.ids[None]).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits[:-1], prompt.ids[1:], reduction="none")
    right = logits.argmax(-1)[:-1] == prompt.ids[1:]
    wrong = [i for i, q in enumerate(prompt.questions) if not right[q.answer.start - 1 : q.answer.stop - 1].all()]
    return wrong, losses[prompt.text[1:]].mean().item()


def test_points_are_what_a_patched_model_does(whole, recall_model, prompts):
    model = recall_model[0]
    points = [("share", 0.2, {}), ("flashprefill", 0.3, {"block_size": 64, "correction": True})]
    recalls, rises = {}, {}
    for prompt in prompts:
        dense_wrong, dense_loss = answers_and_loss(model, prompt)
        for selector, alpha, fields in points:
            rule = {"selector": selector, "alpha": alpha, "min_seq_len": 1, "dense_tail_blocks": 0, **fields}
            with patched(model, **rule):
                wrong, loss = answers_and_loss(model, prompt)
                stats = prefill_stats(model)
            assert stats.sparse_calls == model.config.num_hidden_layers
            name = selector + "@block_size=64,correction=true" * bool(fields)
            (row,) = (r for r in whole["rows"] if (r["prompt"], r["selector"], r["alpha"]) == (prompt.name, name, alpha))
            assert row["density"] == pytest.approx(stats.density, abs=1e-9)
            assert row["layer_density"] == pytest.approx([layer.density for layer in stats.layers])
            assert (row["unpatched_wrong"], row["patched_wrong"]) == (dense_wrong, wrong)
            assert row["unpatched_nll"] == pytest.approx(dense_loss, rel=1e-4)
            assert row["patched_nll"] == pytest.approx(loss, rel=1e-4)
            recalls.setdefault(name, []).append(1 - len(wrong) / QUESTIONS)
            rises.setdefault(name, []).append(loss - dense_loss)
    # The sparse points must differ from dense for this to say anything.
    assert all(abs(rise) > 1e-3 for values in rises.values() for rise in values)
    assert min(sum(values) for values in recalls.values()) < 2
    for row in whole["summary"]:
        if row["selector"] in recalls and row["alpha"]:
            assert row["recall"] == pytest.approx(sum(recalls[row["selector"]]) / 2)
            mean = torch.tensor(rises[row["selector"]], dtype=torch.float64).mean()
            assert row["perplexity_rise"] == pytest.approx(mean.expm1().item(), rel=1e-2)
            assert row["recall_change_low"] < row["recall_change"] < row["recall_change_high"]


def test_thresholds_of_zero_are_dense_and_others_are_not(whole):
    rows = {(row["selector"], row["alpha"]): row for row in whole["summary"]}
    for selector in ("share", "oracle-max"):
        row = rows[selector, 0.0]
        assert row["density"] == 1
        assert row["kept_mass"] == pytest.approx(1, abs=1e-5)
        assert abs(row["perplexity_rise"]) < 1e-5
        assert row["recall"] == row["unpatched_recall"]
    assert rows["oracle-max", 0.3]["density"] < 0.9
    assert rows["oracle-max", 0.3]["kept_mass"] < 0.999
    assert rows["oracle-max", 0.3]["perplexity_rise"] != 0


def test_times_are_taken_of_what_has_stages(whole):
    for row in whole["summary"]:
        if row["selector"].startswith("oracle"):
            assert row["index_seconds"] is row["operator_seconds"] is None
        else:
            assert row["index_seconds"] > 0
            # Half, because the stages are timed one by one on a machine that others use, too.
            assert row["operator_seconds"] > 0.5 * row["index_seconds"]
    assert "operator ms" in selection.summary_table(whole["summary"])
    without = [row | {"index_seconds": None, "operator_seconds": None} for row in whole["summary"]]
    assert "operator ms" not in selection.summary_table(without)


def test_prompts_that_stayed_dense_are_counted(whole):
    rows = [row for row in whole["rows"] if row["selector"] == "topk"]
    summary = selection.summarise([rows[0], rows[1] | {"density": None}])
    assert f"{rows[0]['density']:.3f}, 1 of 2 dense" in selection.summary_table(summary)


def test_block_masses_in_float64(layers, monkeypatch):
    query, key, _ = layers[1]
    held, exact_shares, limit = [], attention_mass.exact_shares, 7 * 4 * 1536

    def counted(query, key, geometry, positions, *, scale):
        held.append(positions.numel() * 4 * geometry.key_blocks * 128)
        return exact_shares(query, key, geometry, positions, scale=scale)

    monkeypatch.setattr(attention_mass, "LOGITS_AT_ONCE", limit)
    monkeypatch.setattr(attention_mass, "exact_shares", counted)
    masses = block_masses(query, key, PrefillGeometry(1, LENGTH, LENGTH, 0, 128), 0.2, first=7, count=5)
    # Of one key-value head, whose four query heads are taken together.
    assert limit / 2 < max(held) <= limit
    rows = torch.arange(7 * 128, LENGTH)
    for head in (0, 5):
        logits = query[0, head, rows].double() @ key[0, head // 4].double().T * 0.2
        shares = logits.masked_fill(torch.arange(LENGTH) > rows[:, None], float("-inf")).softmax(-1)
        wanted = torch.stack([part.sum(-1) for part in shares.split(128, -1)], -1).split(128)
        mean = torch.stack([part.mean(0) for part in wanted])
        largest = torch.stack([part.amax(0) for part in wanted])
        torch.testing.assert_close(masses.mean[0, head].double(), mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(masses.largest[0, head].double(), largest, rtol=1e-4, atol=1e-6)


def test_kept_mass_in_float64_for_one_head(layers):
    """One head of a layer by itself, with tensors that make a point keep some blocks and not others."""
    query, key, value = (tensor[:, :1] for tensor in layers[2])
    (point,) = parse_curves(["peak:0.95@sink_blocks=0,window_blocks=1"], BASE)
    rows = sampled_rows(LENGTH, 64, seed=0)
    observer = LayerObserver([point], rows, take_times=False)
    observer(type("Layer", (), {"layer_idx": 5}), AttentionInput(query, key, value), 0.125)
    mask = flash_prefill_attention(query, key, value, config=point.config, return_index=True).index.to_mask()[0, 0]
    logits = query[0, 0].double() @ key[0, 0].double().T * 0.125
    shares = logits.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    tokens = mask.repeat_interleave(128, 0)[:LENGTH].repeat_interleave(128, 1)[:, :LENGTH]
    wanted = (shares * tokens).sum(-1)[rows].mean().item()
    assert 0.1 < wanted < 0.99
    assert observer.measurements[0].kept_mass == {5: pytest.approx(wanted, rel=1e-5)}
    assert observer.measurements[0].index_seconds == {}


def test_no_choice_of_as_many_blocks_keeps_more_than_the_oracle(layers):
    """Of all heads of a layer together, which share one threshold."""
    geometry = PrefillGeometry(1, LENGTH, LENGTH, 0, 128)
    query, key, value = layers[1]
    masses = block_masses(query, key, geometry, 0.125)
    shares = masses.mean[0]
    torch.testing.assert_close(shares.sum(-1), torch.ones(8, 12))
    assert (masses.largest >= masses.mean).all()
    forced = index_from_masses(masses.mean, geometry, alpha=2, **FORCED).to_mask()
    free = masses.mean[~forced].sort(descending=True).values
    for selector, alpha in (("share", 0.2), ("peak", 0.5), ("flashprefill", 0.5)):
        config = FlashPrefillConfig(selector=selector, alpha=alpha, **FORCED)
        probed = flash_prefill_attention(query, key, value, config=config, return_index=True).index.to_mask()
        chosen = int(probed.sum() - forced.sum())
        best = index_from_masses(masses.mean, geometry, alpha=free[chosen - 1].item(), **FORCED).to_mask()
        assert best.sum() == probed.sum() > forced.sum()
        assert (shares * best[0]).sum() > (shares * probed[0]).sum()


def test_the_oracle_in_rounds_keeps_the_same_and_leaves_nothing_behind(layers, monkeypatch):
    query, key, value = layers[3]
    config = FlashPrefillConfig(alpha=0.1, correction=False, **FORCED)
    geometry = PrefillGeometry(1, LENGTH, LENGTH, 0, 128)
    masses = block_masses(query, key, geometry, 0.125).largest
    wanted = index_from_masses(masses, geometry, alpha=0.1, **FORCED).to_mask()
    plain = flash_prefill_attention(query, key, value, config=config, return_index=True).index.to_mask()
    monkeypatch.setattr(functional, "SCRATCH_BYTES", 8 * 8 * 12 * 5)
    with oracle_selection("oracle-max"):
        output, index = flash_prefill_attention(query, key, value, config=config, return_index=True)
    assert index.to_mask().equal(wanted)
    assert not wanted.equal(plain)
    assert wanted[0, :, -1].all()
    seen = wanted[0, 6].repeat_interleave(128, 0)[:LENGTH].repeat_interleave(128, 1)[:, :LENGTH].tril()
    attended = torch.nn.functional.scaled_dot_product_attention(query[0, 6], key[0, 1], value[0, 1], attn_mask=seen)
    torch.testing.assert_close(output[0, 6], attended, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="without padding"), oracle_selection("oracle-max"):
        flash_prefill_attention(query, key, value, config=config, valid_ranges=torch.tensor([[3, LENGTH]]))
    assert flash_prefill_attention(query, key, value, config=config, return_index=True).index.to_mask().equal(plain)


@pytest.mark.parametrize("selector", SORTING_SELECTORS)
def test_an_oracle_selects_where_the_settings_have_a_selector_that_sorts(selector, layers):
    kept = []
    for base in (BASE, replace(BASE, selector=selector)):
        (point,) = parse_curves(["oracle-mean:0.05@correction=false"], base)
        with oracle_selection(point.oracle):
            kept.append(flash_prefill_attention(*layers[1], config=point.config, return_index=True).index.to_mask())
    assert kept[0].equal(kept[1])


def test_an_interrupted_run_gives_the_same_json(whole, options, tmp_path, monkeypatch):
    path, measure, calls = tmp_path / "selection.json", selection.measure, []

    def interrupting(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(selection, "measure", interrupting)
    arguments = [*options, "--no-times", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["selection", *arguments])
    assert commands.run_command(selection.main) == 130
    assert not path.exists()
    assert commands.run_command(selection.main) == 0
    assert len(calls) == 3
    again = json.loads(path.read_text())
    assert all(row["layer_operator_seconds"] == [] for row in again["rows"])
    assert again["arguments"].pop("times") is not whole["arguments"]["times"]
    wanted = timeless(whole)
    del wanted["arguments"]["times"]
    assert timeless(again) == wanted


def test_what_stays_dense_has_a_table_and_no_picture(options, tmp_path, capsys):
    path = tmp_path / "selection.json"
    dense = ["--limit", "1", "--curves", "blend:0.1", "--no-times", "--min-seq-len", "auto", "--output", str(path)]
    assert selection.main([*options, *dense]) == 0
    assert "every layer stayed dense" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["selection.json"]
    assert report.main([str(path), "--output", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    assert " dense " in text
    assert "<img" not in text


def test_default_curves_are_valid_and_hold_the_defaults():
    points = parse_curves(DEFAULT_CURVES, BASE)
    defaults = FlashPrefillConfig().resolved()
    assert any((p.curve, p.config.alpha) == (defaults.selector, defaults.alpha) for p in points)
    assert len(parse_curves(["share:0.01,0.01", "share:0.01"], BASE)) == 1
    (point,) = parse_curves(["peak:0.01@pool_size=4,query_stride=4"], BASE)
    assert (
        point.config
        == FlashPrefillConfig(
            alpha=0.01, selector="peak", pool_size=4, query_stride=4, min_seq_len=1, dense_tail_blocks=0
        ).resolved()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--curves", "share"], "--curves takes SELECTOR:ALPHA"),
        (["--curves", "best:0.1"], "SELECTOR one of blend"),
        (["--curves", "share:a"], "--curves share:a: could not convert"),
        (["--curves", "share:2"], "alpha must be from 0 to 1"),
        (["--curves", "share:0.1@pools=4"], "FIELD=VALUE with one of the fields"),
        (["--curves", "share:0.1@pool_size=5"], "pool_size must be one of"),
        (["--curves", "share:0.1@alpha=0.2"], "stand before the @"),
        (["--curves", "share:0.1@backend=reference"], "backend must be auto, triton or torch"),
        (["--set", "pool_size=5"], "pool_size must be one of"),
        (["--mass-rows", "0"], "--mass-rows must be at least 1"),
        (["--alpha", "0.1"], "unrecognized arguments"),
        (["--lengths", "100"], "--lengths: length must be at least"),
        (["--prompts", "0"], "--prompts must be at least 1, got 0"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["selection", "--device", "cpu", "--output", str(tmp_path / "s.json"), *arguments])
    assert commands.run_command(selection.main) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []
