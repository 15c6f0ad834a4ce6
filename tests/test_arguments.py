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
    report,
    ruler,
    selection,
    train_recall,
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


@harnesses
@pytest.mark.parametrize("name", ["/proc/result.json", "/proc/x/y/result.json", "/dev/null/result.json", "file/result.json"])
def test_a_result_that_cannot_be_written_is_not_begun(harness, name, refusal, tmp_path):
    (tmp_path / "file").write_text("")
    line = refusal(harness, ["--output", name], ["file"])
    assert line.startswith(f"error: --output {name}: ")


@pytest.mark.parametrize(
    ("command", "arguments", "output"),
    [
        (report, ["result.json"], "/proc/report.html"),
        (report, ["result.json"], "folder.html"),
        # Its pictures go to a folder of this name.
        (report, ["result.json"], "file.html"),
        (calibrate, [], "file/result.json"),
        (calibrate, [], "folder.html/result.json"),
        (train_recall, [], "/proc/folder"),
        (train_recall, [], "file"),
        (recall, [], "x" * 250 + ".json"),
    ],
)
def test_other_outputs_are_tried_first(command, arguments, output, refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "page", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(train_recall, "standard_library_text", lambda *_: pytest.fail("work began"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "folder.html" / "configs").write_text("")
    assert refusal(command, [*arguments, "--output", output], ["file", "folder.html"]).startswith("error: --output ")


def test_a_folder_may_be_made_and_a_file_replaced(tmp_path):
    common.check_writable(tmp_path / "new" / "folder" / "result.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "result.json").write_text("old")
    common.check_writable(tmp_path / "result.json")
    assert (tmp_path / "result.json").read_text() == "old"


@harnesses
@pytest.mark.parametrize("length", ["0", "-1", "999999999999"])
def test_lengths_are_checked(harness, length, refusal):
    if harness is lm_eval_adapter:
        pytest.skip("its tasks decide the lengths")
    assert refusal(harness, ["--lengths", "1024", length]).startswith("error: --lengths must be ")
