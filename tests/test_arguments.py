"""Mistakes in a command's options: one line that names the option, status 2, no work, and nothing written."""

import sys

import pytest

from eval import (
    calibrate,
    common,
    layout_speed,
    lm_eval_adapter,
    needle,
    operator_speed,
    perplexity,
    recall,
    ruler,
    selection,
    ttft,
    vllm_ttft,
)
from eval.runner import PartialRun

# Those that write a JSON file.
HARNESSES = [needle, recall, perplexity, ruler, lm_eval_adapter, selection, calibrate]
HARNESSES += [ttft, vllm_ttft, operator_speed, layout_speed]
harnesses = pytest.mark.parametrize("harness", HARNESSES, ids=lambda harness: harness.__name__)


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder and returns the one line that it refuses with; no model may be loaded for that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(PartialRun, "run", lambda *_: pytest.fail("work began"))

    def refused(command, arguments, allowed=()):
        required = ["--tasks", "x"] if command is lm_eval_adapter else []
        monkeypatch.setattr(sys, "argv", ["command", *required, *arguments])
        assert common.run_command(command.main) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(allowed)
        return line

    return refused


@harnesses
@pytest.mark.parametrize("name", ["result.png", "result", "result.json.txt"])
def test_a_result_is_a_json_file(harness, name, refusal):
    """Under another name the picture would take its place."""
    assert refusal(harness, ["--output", name]) == f"error: --output must end in .json, got {name}"
