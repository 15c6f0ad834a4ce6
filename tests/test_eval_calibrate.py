"""``python -m eval.calibrate``: what it writes, that other harnesses take it, and its mistakes."""

import json
import sys

import pytest
import torch

from eval import calibrate, commands, ttft
from eval.haystack import standard_library_text
from eval.schema import Result
from hf_flashprefill import FlashPrefillConfig, patched, prefill_stats

SMALL = ["--lengths", "900", "--prompts", "1", "--rows", "16", "--kind", "text", "--device", "cpu", "--target", "0.9"]
SETTINGS = ["--selector", "peak", "--set", "sink_blocks=0", "window_blocks=1", "dense_tail_blocks=0"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Options, the result file and the settings file of a small run."""
    folder = tmp_path_factory.mktemp("calibrate")
    text = folder / "source.txt"
    text.write_text(standard_library_text("held_out")[:60_000])
    options = [*SMALL, *SETTINGS, "--dataset", str(text)]
    assert calibrate.main([*options, "--output", str(folder / "found.json")]) == 0
    return options, folder / "found.json", folder / "configs" / "found.json"


def test_it_writes_the_settings_and_the_table(written, recall_model):
    _, output, settings = written
    result, config = Result.read(output), FlashPrefillConfig.from_json(settings)
    assert result.config == config.to_dict()
    assert (config.selector, config.sink_blocks, config.min_seq_len) == ("peak", 0, 1)
    assert [row["alpha"] for row in result.rows] == list(config.layer_alphas)
    assert all(row["mass"] >= 0.9 for row in result.rows)
    assert any(row["alpha"] > 0 for row in result.rows)
    (summary,) = result.summary
    assert summary["held_out_prompts"] == summary["prompts"] == 1
    assert summary["lowest_held_out_mass"] == min(row["held_out_mass"] for row in result.rows)
    assert f"{summary['lowest_held_out_mass']:.4f}" in calibrate.layer_table(result.rows)
    with torch.no_grad(), patched(recall_model[0], config=settings):
        recall_model[0](torch.randint(3, 4000, (1, 800)))
        assert prefill_stats(recall_model[0]).sparse_calls == len(config.layer_alphas)


def test_it_repeats(written, tmp_path):
    options, output, _ = written
    assert calibrate.main([*options, "--output", str(tmp_path / "again.json")]) == 0
    again, first = json.loads((tmp_path / "again.json").read_text()), json.loads(output.read_text())
    del again["environment"], first["environment"]
    assert again == first


def test_it_replaces_a_result_of_the_same_settings_alone(written, monkeypatch):
    options, output, settings = written
    before = output.read_bytes(), settings.read_bytes()
    assert calibrate.main([*options, "--output", str(output)]) == 0
    assert settings.read_bytes() == before[1]
    again = output.read_bytes()
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("work began"))
    for change in (["--rows", "17"], ["--set", "sink_blocks=1", "window_blocks=1", "dense_tail_blocks=0"]):
        with pytest.raises(commands.UsageError, match=r"holds another run \(calibrate of 20"):
            calibrate.main([*options, *change, "--output", str(output)])
    assert (output.read_bytes(), settings.read_bytes()) == (again, before[1])


def test_ttft_takes_the_settings(written, tmp_path):
    path = tmp_path / "ttft.json"
    options = ["--lengths", "300", "--repeats", "1", "--device", "cpu", "--config", str(written[2])]
    assert ttft.main([*options, "--output", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["settings"] == FlashPrefillConfig.from_json(written[2]).to_dict()
    with pytest.raises(commands.UsageError, match="layer_alphas must hold 4 numbers"):
        ttft.main([*options, "--set", "layer_alphas=[0.5]", "--output", str(tmp_path / "other.json")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "1"], "--target must be above 0 and below 1, got 1.0"),
        (["--prompts", "0"], "--prompts must be at least 1"),
        (["--held-out", "-1"], "--held-out must be at least 0"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--lengths", "300"], "--lengths: prompts must hold one of at least 641 tokens, the longest has 300"),
        (["--kind", "none"], "--kind"),
        (["--selector", "best"], "selector must be one of"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments, message, monkeypatch, capsys, tmp_path):
    # What comes last counts.
    monkeypatch.setattr(sys, "argv", ["calibrate", *SMALL, *arguments, "--output", str(tmp_path / "found.json")])
    assert commands.run_command(calibrate.main) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())
