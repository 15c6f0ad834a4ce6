"""Mistakes in a command's options: one line that names the option, status 2, no work, and nothing written."""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from eval import (
    calibrate,
    commands,
    layout_speed,
    lm_eval_adapter,
    models,
    needle,
    operator_speed,
    options,
    perplexity,
    recall,
    report,
    ruler,
    selection,
    ttft,
    vllm_ttft,
)
from eval.runner import PartialRun
from eval.train_recall import __main__ as train_recall
from hf_flashprefill import functional
from tests.parsers import all_commands, parser_of

# Those that write a JSON file.
HARNESSES = [needle, recall, perplexity, ruler, lm_eval_adapter, selection, calibrate]
HARNESSES += [ttft, vllm_ttft, operator_speed, layout_speed]
harnesses = pytest.mark.parametrize("harness", HARNESSES, ids=lambda harness: harness.__name__)


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder and returns the one line that it refuses with; no model may be loaded for that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(PartialRun, "run", lambda *_: pytest.fail("work began"))

    def refused(command, arguments, allowed=()):
        required = ["--tasks", "x"] if command is lm_eval_adapter else []
        monkeypatch.setattr(sys, "argv", ["command", *required, *arguments])
        assert commands.run_command(command.main) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(allowed)
        return line

    return refused


@pytest.mark.parametrize("command", all_commands())
def test_every_default_is_in_the_help(command):
    parser = parser_of(command)
    assert parser.prog == f"python -m {command}"
    assert "(default: " in parser.format_help()
    untold = (None, False, argparse.SUPPRESS)
    for option in parser._actions:
        # By identity: 0 is a default as well.
        if not any(option.default is nothing for nothing in untold):
            assert re.search(r"\(default: [^)]+", option.help or ""), option.option_strings


@harnesses
def test_a_command_is_copied_from_the_source_as_from_the_help(harness):
    assert harness.__doc__ in Path(harness.__file__).read_text(encoding="utf-8")


def test_every_harness_is_a_command():
    names = {harness.__name__ for harness in HARNESSES} | {"eval.report", "eval.train_recall"}
    assert {command for command in all_commands() if command.startswith("eval.")} == names


@harnesses
def test_a_result_lies_outside_what_git_tracks_unless_asked_for(harness):
    output = harness.build_parser().get_default("output")
    assert output.parent == Path("results")
    assert "/results/" in (Path(__file__).parent.parent / ".gitignore").read_text(encoding="utf-8").splitlines()


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
    options.check_writable(tmp_path / "new" / "folder" / "result.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "result.json").write_text("old")
    options.check_writable(tmp_path / "result.json")
    assert (tmp_path / "result.json").read_text() == "old"


@pytest.mark.parametrize("length", ["0", "-1", "999999999999"])
@pytest.mark.parametrize("harness", [h for h in HARNESSES if h is not lm_eval_adapter], ids=lambda harness: harness.__name__)
def test_lengths_are_checked(harness, length, refusal):
    assert refusal(harness, ["--lengths", "1024", length]).startswith("error: --lengths must be ")


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (operator_speed, ["--head-dims", "64", "0"], "--head-dims must be at least 1, got 0"),
        (operator_speed, ["--batches", "0"], "--batches must be at least 1, got 0"),
        (operator_speed, ["--densities", ".1", ".1", "nan"], "--densities must be above 0 and at most 1, got nan"),
        (operator_speed, ["--densities", "2", ".1", ".1"], "--densities must be above 0 and at most 1, got 2.0"),
        (operator_speed, ["--dense-tail-blocks", "-1"], "--dense-tail-blocks must be at least 0, got -1"),
        (operator_speed, ["--seconds", "nan"], "--seconds must be from 0 to 3600, got nan"),
        (operator_speed, ["--seconds", "inf"], "--seconds must be from 0 to 3600, got inf"),
        (operator_speed, ["--heads", "-8"], "--heads must be at least 1, got -8"),
        (operator_speed, ["--backend", "triton"], '--backend triton: backend "triton" cannot run here: no GPU'),
        (operator_speed, ["--baselines", "sdpa_cudnn"], "--baselines sdpa_cudnn must come with a GPU, got --device cpu"),
        (
            operator_speed,
            ["--peer", "=peers/file.py"],
            "--peer must be NAME=FILE.py with a file that exists, got '=peers/file.py'",
        ),
        (
            operator_speed,
            ["--peer", "a=peers/file.py"],
            "--peer a=peers/file.py: the file must define prepare(query, key, value, index)",
        ),
        (operator_speed, ["--peer", "a=peers/bad.py"], "--peer a=peers/bad.py: SyntaxError: "),
        (operator_speed, ["--seconds", "-0.1"], "--seconds must be from 0 to 3600, got -0.1"),
        (layout_speed, ["--seconds", "nan"], "--seconds must be from 0 to 3600, got nan"),
        (layout_speed, ["--head-dim", "0"], "--head-dim must be at least 1, got 0"),
        (layout_speed, ["--seconds", "-1"], "--seconds must be from 0 to 3600, got -1.0"),
        (layout_speed, ["--density", "nan"], "--density must be above 0 and at most 1, got nan"),
        (layout_speed, ["--backend", "triton"], '--backend triton: backend "triton" cannot run here: no GPU'),
        (vllm_ttft, ["--chunks", "-1"], "--chunks must be at least 0, got -1"),
        (vllm_ttft, ["--memory", "0"], "--memory must be above 0 and at most 1, got 0.0"),
        (ttft, ["--repeats", "0"], "--repeats must be at least 1, got 0"),
    ],
)
def test_what_times_says_what_it_takes(command, arguments, message, refusal, monkeypatch, tmp_path):
    monkeypatch.setattr(functional, "triton_obstacle", lambda query: "no GPU")
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "file.py").write_text("")
    (tmp_path / "peers" / "bad.py").write_text("def")
    device = [] if command is vllm_ttft else ["--device", "cpu"]
    assert refusal(command, [*device, *arguments], ["peers"]).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --output"),
        (["--packages", "torch", "nope"], "--packages must be installed packages with Python sources, got nope"),
        # A module of the standard library is trained on anyway.
        (["--packages", "json"], "--packages must be installed packages with Python sources, got json"),
        (["--heads", "3", "--kv-heads", "2"], "--kv-heads must divide --heads 3, got 2"),
        (["--kv-heads", "0"], "--kv-heads must be at least 1, got 0"),
        (["--head-dim", "7"], "--head-dim must be even and at least 2, got 7"),
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--vocab-size", "10"], "--vocab-size must be at least 258, got 10"),
        (["--tokens-per-step", "0"], "--tokens-per-step must be at least 1, got 0"),
        (["--learning-rate", "-1"], "--learning-rate must be above 0 and at most 1, got -1.0"),
        (["--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["--stages", "0:5"], "argument --stages: stages are WINDOW:STEPS pairs of at least 1, got '0:5'"),
        (["--recall-lengths", "1024", "10"], "--recall-lengths must be from 380 to 16777216, got 10"),
        (["--recall-prompts", "0"], "--recall-prompts must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--device", "nowhere"], "--device nowhere: "),
    ],
)
def test_training_says_what_it_takes(arguments, message, refusal, monkeypatch):
    monkeypatch.setattr(train_recall, "standard_library_text", lambda *_: pytest.fail("work began"))
    output = ["--output", "folder"] if arguments else []
    assert refusal(train_recall, [*output, *arguments]).startswith(f"error: {message}")


QUESTIONS = "--facts and --questions must be at most 512 together for that --lengths, got 100048"


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (perplexity, ["--lengths", "4096", "2"], "--lengths must be from 3 to 16777216, got 2"),
        (perplexity, ["--lengths", "100"], "--continuation must be from 1 to 98 for prompts of 100 tokens, got 512"),
        (needle, ["--depths", "nan"], "--depths must be from 0 to 1, got nan"),
        (recall, ["--facts", "100000", "--lengths", "512"], QUESTIONS),
        (recall, ["--facts", "100001"], "--facts must be from 1 to 100000, got 100001"),
        (recall, ["--prompts", "0"], "--prompts must be at least 1, got 0"),
        (selection, ["--facts", "0"], "--facts must be from 1 to 100000, got 0"),
        (selection, ["--questions", "0"], "--questions must be at least 1, got 0"),
        (calibrate, ["--rows", "0"], "--rows must be at least 1, got 0"),
        (calibrate, ["--target", "nan"], "--target must be above 0 and below 1, got nan"),
    ],
)
def test_what_asks_says_what_it_takes(command, arguments, message, refusal):
    assert refusal(command, arguments) == f"error: {message}"


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(commands.UsageError, match="there is no model in this folder, it has no config.json"):
        models.load_model(str(tmp_path), "cpu", None)
    shutil.copy(models.BUNDLED_MODEL / "config.json", tmp_path)
    with pytest.raises(commands.UsageError, match="tokenizer from one of: .*\\(1\\)"):
        models.load_model(str(tmp_path), "cpu", None)


def _edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def _cut_weights(folder):
    os.truncate(folder / "model.safetensors", 1000)


def _empty_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_weights, "SafetensorError: Error while deserializing header"),
        (_edit_config(hidden_size=128), "RuntimeError: "),
        (_edit_config(hidden_act="nope"), "KeyError: "),
        (_edit_config(num_attention_heads=0), ""),
        (_edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), ""),
        (_empty_tokenizer, ""),
    ],
    ids=["weights", "sizes", "activation", "heads", "package", "tokenizer"],
)
def test_a_model_that_does_not_load_is_named(damage, message, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models.BUNDLED_MODEL, folder)
    damage(folder)
    with pytest.raises(commands.UsageError) as refused:
        models.load_model(str(folder), "cpu", None)
    assert str(refused.value).startswith(f"--model {folder}: {message}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("device", ["meta", "hpu", "nowhere"])
def test_a_device_that_does_not_compute_is_refused(device):
    with pytest.raises(commands.UsageError, match=f"--device {device}: "):
        models.usable_device(device)
