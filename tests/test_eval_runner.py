"""What all harnesses share: options, schema, statistics, resuming, several processes."""

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from eval import commands, models, needle, options, perplexity, recall, recording, ruler, schema, selection, tables, ttft
from eval.haystack import standard_library_text
from eval.runner import PartialRun
from eval.schema import SCHEMA_VERSION, Result, timeless
from eval.statistics import paired_difference, perplexity_rise
from hf_flashprefill import FlashPrefillConfig
from tests.inputs import tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options of a short run of eval.recall on a short text."""
    text = tmp_path_factory.mktemp("text") / "source.txt"
    text.write_text(standard_library_text("held_out")[:100_000])
    sizes = ["--lengths", "700", "900", "--prompts", "2", "--facts", "3", "--questions", "4", "--device", "cpu"]
    return [*sizes, "--dataset", str(text)]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run of eval.recall that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "recall.json"
    assert recall.main([*small, "--output", str(path)]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["recall.json"]
    return json.loads(path.read_text())


def test_an_interrupted_run_goes_on_and_gives_the_same_json(whole, small, tmp_path, monkeypatch):
    path, compare, calls = tmp_path / "recall.json", recall.compare, []

    def interrupting(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compare(*args)

    monkeypatch.setattr(recall, "compare", interrupting)
    monkeypatch.setattr(sys, "argv", ["recall", *small, "--output", str(path)])
    assert commands.run_command(recall.main) == 130
    assert not path.exists()
    (partial,) = tmp_path.glob("recall.*.0.partial.jsonl")
    # As if the process had been killed in the middle of a line.
    with partial.open("a") as file:
        file.write('{"task": "0/900/0", "ro')
    # Other settings share nothing with it.
    assert recall.main([*small, "--seed", "1", "--limit", "1", "--output", str(path)]) == 0
    assert len(calls) == 5
    assert partial.exists()
    # Nor does this one go on in place of that.
    assert commands.run_command(recall.main) == 2
    assert len(calls) == 5
    assert partial.exists()
    path.unlink()
    assert commands.run_command(recall.main) == 0
    assert len(calls) == 7
    assert [file.name for file in tmp_path.iterdir()] == ["recall.json"]
    assert timeless(json.loads(path.read_text())) == timeless(whole)


@torch.no_grad()
def test_weights_that_differ_anywhere_are_told_apart():
    model = tiny_model()
    found = {recording.fingerprint(model)}
    for parameter in model.parameters():
        parameter.mul_(1.5)
        found.add(recording.fingerprint(model))
    assert len(found) == 1 + len(list(model.parameters()))
    assert recording.fingerprint(model) in found
    model.register_buffer("quantised", torch.ones(8))
    found.add(recording.fingerprint(model))
    model.quantised *= -3
    assert recording.fingerprint(model) not in found
    # Other rotations with the same weights, as whoever edits config.json to read longer prompts has.
    found.add(recording.fingerprint(model))
    model.config.max_position_embeddings *= 2
    assert recording.fingerprint(model) not in found
    assert recording.fingerprint(model.half()) not in found


@pytest.fixture
def parts(small, tmp_path, monkeypatch):
    """Interrupts a harness after its first prompt and says how many runs have left rows behind so far."""

    def interrupted(harness, asks, rows, *options):
        calls = []

        def asking(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return rows

        monkeypatch.setattr(harness, asks, asking)
        with pytest.raises(KeyboardInterrupt):
            harness.main([*options, "--output", str(tmp_path / "result.json"), "--device", "cpu"])
        return len(list(tmp_path.glob("*.partial.jsonl")))

    return interrupted


OUTCOMES = (needle.Outcome([True], 1.0, None), needle.Outcome([True], 1.0, None))


@pytest.mark.parametrize(
    ("harness", "asks", "rows", "given", "runs"),
    [
        (needle, "compare", OUTCOMES, ["--trials=3"], 2),
        (selection, "measure", [], ["--prompts=4", "--times"], 2),
        (selection, "measure", [], ["--prompts=4", "--no-times"], 1),
    ],
)
def test_times_go_on_at_the_same_commit_only(harness, asks, rows, given, runs, small, parts, monkeypatch):
    options = [*given, "--lengths", "1500", *small[-2:]]
    monkeypatch.setattr(recording, "commit_of", lambda folder: "one")
    assert parts(harness, asks, rows, *options) == 1
    assert parts(harness, asks, rows, *options) == 1
    monkeypatch.setattr(recording, "commit_of", lambda folder: "other")
    assert parts(harness, asks, rows, *options) == runs


@pytest.mark.parametrize(
    ("harness", "asks", "rows", "given"),
    [
        (needle, "compare", OUTCOMES, ["--trials=3"]),
        (recall, "compare", OUTCOMES[0], ["--prompts=4"]),
        (selection, "measure", [], ["--prompts=4", "--no-times"]),
        (perplexity, "compare", OUTCOMES[0], ["--documents=4"]),
        (ruler, "compare", OUTCOMES[0], ["--samples=4", "--tasks=niah_single_2"]),
        (ruler, "compare", OUTCOMES[0], ["--samples=4", "--tasks=qa_1", "--qa-1=QUESTIONS"]),
    ],
)
def test_a_run_goes_on_with_the_same_text_only(harness, asks, rows, given, parts, tmp_path):
    questions, text = tmp_path / "questions.jsonl", tmp_path / "text.txt"
    source = questions if harness is ruler and "--tasks=qa_1" in given else text
    options = [option.replace("QUESTIONS", str(questions)) for option in given]
    options += ["--lengths", "1500", "--dataset", str(text)]
    text.write_text(standard_library_text("held_out")[:60_000])
    questions.write_text('{"question": "Who?", "documents": ["The cat."], "answers": ["The cat"]}')
    assert parts(harness, asks, rows, *options) == 1
    assert parts(harness, asks, rows, *options) == 1
    source.write_text(source.read_text().replace("The ", "the "))
    assert parts(harness, asks, rows, *options) == 2


def test_two_processes_write_one_report(whole, small, tmp_path):
    path = tmp_path / "recall.json"
    # Without --multi_gpu, accelerate starts one process where there is no GPU; what it starts here are CPU processes.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, *launch, "-m", "eval.recall", *small, "--output", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"wrote {path}") == 1
    record = json.loads(path.read_text())
    assert record["environment"]["processes"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["recall.json"]
    for row, expected in zip(record["rows"], whole["rows"], strict=True):
        assert row["questions"] == expected["questions"]
        assert row["unpatched_nll"] == pytest.approx(expected["unpatched_nll"], rel=1e-5)


def test_each_process_has_its_own_tasks_and_sees_what_others_finished(tmp_path, monkeypatch):
    done, names = [], ["a", "b", "c", "d", "e"]

    def work(i):
        done.append(names[i])
        return [{"task": names[i]}]

    monkeypatch.setattr("eval.runner._gathered", lambda own: run.finished())
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = PartialRun(tmp_path / "x.json", {})
    monkeypatch.setenv("RANK", "1")
    assert run.run(names, work, "x") is None
    assert done == ["b", "d"]
    monkeypatch.setenv("RANK", "0")
    assert [row["task"] for row in run.run(names, work, "x")] == names
    assert done == ["b", "d", "a", "c", "e"]
    # One process takes up what two have done.
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(run.run(names, work, "x")) == 5
    assert len(done) == 5
    run.remove()
    assert not list(tmp_path.iterdir())


def test_a_name_with_brackets_is_resumed_and_tidied(tmp_path):
    done = []
    run = PartialRun(tmp_path / "recall[8b].json", {})
    for _ in range(2):
        assert run.run(["a"], lambda i: done.append(i) or [{}], "x") == [{}]
    assert done == [0]
    run.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rank", "count", "before", "during"),
    [
        (0, 1, "error: wrong\n", "error: wrong\n"),
        (0, 2, "error: wrong\n", "error: process 0 of 2: wrong\n"),
        (1, 2, "", "error: process 1 of 2: wrong\n"),
    ],
)
def test_every_process_tells_of_its_own_errors(rank, count, before, during, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))

    def fail(error):
        raise error("wrong")

    def working(error):
        """As all harnesses work, which turn a ValueError into a UsageError."""
        run = schema.Result("x", {}, {"name": "x"}, {}, {}, [], [])
        recording.complete(run, tmp_path / "x.json", ["a", "b"], lambda i: fail(error), lambda rows: [])

    def printed(main):
        assert commands.run_command(main) == 2
        return capsys.readouterr().err.rpartition("\r")[2].rpartition("\x1b[A")[2]

    assert printed(lambda argv: fail(commands.UsageError)) == before
    for error in (commands.UsageError, ValueError):
        assert printed(lambda argv, error=error: working(error)).splitlines(True)[-1:] == [during]


@pytest.mark.parametrize("error", [commands.UsageError, ValueError, KeyboardInterrupt])
def test_what_ends_before_its_first_row_leaves_nothing(error, tmp_path):
    def work(i):
        raise error

    with pytest.raises(error):
        PartialRun(tmp_path / "new" / "x.json", {}).run(["a"], work, "x")
    assert not list(tmp_path.iterdir())


def test_results_are_read_back_and_others_refused(whole, tmp_path):
    path = tmp_path / "result.json"
    result = Result(**whole)
    result.write(path)
    assert Result.read(path) == result
    assert next(iter(json.loads(path.read_text()))) == "schema_version"
    for change, message in [
        ({"schema_version": SCHEMA_VERSION + 1}, "knows versions up to"),
        ({"schema_version": None}, "not a result"),
        ({"speed": 1}, "has fields"),
    ]:
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=message):
            Result.read(path)
    assert whole["model"]["name"] == "recall-4m"
    assert whole["config"]["min_seq_len"] == 1


def test_only_times_and_the_environment_are_dropped():
    times = dict.fromkeys(["patched_seconds", "seconds", "median_s", "quartile_low_ms", "ms"], 1.0)
    rest = {"runs": 5, "dense_calls": {}, "kernels": [{"launches": 2.0}], "attend": {}}
    kernels = [{"launches": 2.0, "ms": 1.0}]
    full = times | rest | {"environment": {"torch": "2"}, "attention_s": {"patched": 1.0}, "kernels": kernels, "attend": times}
    assert timeless([full]) == [rest]
    # No setting is taken for a time.
    assert timeless(FlashPrefillConfig().to_dict()) == FlashPrefillConfig().to_dict()


def test_summaries_follow_from_the_rows(whole):
    rows = [row for row in whole["rows"] if row["length"] == 900]
    summary = whole["summary"][1]
    questions = [question for row in rows for question in row["questions"]]
    assert summary["questions"] == len(questions) == 8
    assert summary["patched_recall"] == sum(q["patched_correct"] for q in questions) / 8
    differences = [row["patched_nll"] - row["unpatched_nll"] for row in rows]
    assert summary["perplexity_rise"] == pytest.approx(math.exp(sum(differences) / 2) - 1)
    for table in (summary["by_distance"], summary["by_position"]):
        assert sum(line["questions"] for line in table) == 8


def test_what_stayed_dense_is_counted(whole):
    rows = [row | {"density": None} if row["prompt"] == "0/900/1" else row for row in whole["rows"]]
    summary = recall.summarise(rows)
    assert [(entry["density"], entry["dense"]) for entry in summary] == [
        (whole["summary"][0]["density"], 0),
        (rows[2]["density"], 1),
    ]
    short, long = recall.summary_table(summary).splitlines()[1:]
    assert "dense" not in short
    assert f"{rows[2]['density']:.3f}, 1 of 2 dense" in long
    all_dense = recall.summarise([row | {"density": None} for row in rows])
    assert [entry["dense"] for entry in all_dense] == [2, 2]
    assert "of 2 dense" not in recall.summary_table(all_dense)


def test_paired_difference_by_hand():
    # 10 questions, 3 lost, 1 gained: Agresti and Min's centre is -2/12, its variance (3 + 1 + 1 - 4/12) / 144.
    before = [True] * 6 + [False] * 4
    after = [False] * 3 + [True] * 3 + [True] + [False] * 3
    estimate, low, high = paired_difference(before, after)
    half = 1.959964 * math.sqrt(5 - 4 / 12) / 12
    assert (estimate, low, high) == pytest.approx((-0.2, -2 / 12 - half, -2 / 12 + half), abs=1e-6)
    estimate, low, high = paired_difference([True] * 20, [True] * 20)
    assert (estimate, low) == (0, -high)
    assert 0.05 < high < 0.15
    with pytest.raises(ValueError, match="equally long"):
        paired_difference([True], [])


def test_perplexity_rise_by_hand():
    differences = [0.01, 0.03, 0.05]
    rise, error = perplexity_rise(differences)
    assert rise == pytest.approx(math.exp(0.03) - 1)
    assert error == pytest.approx(math.exp(0.03) * statistics.stdev(differences) / math.sqrt(3))
    assert perplexity_rise([0.01, 0.05], [3, 1]).rise == pytest.approx(math.exp(0.02) - 1)
    assert perplexity_rise([0.01]).standard_error is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./no-such-folder"], "no such folder"),
        (["--alpha", "2"], "alpha must be from 0 to 1"),
        (["--alpha", "much"], "--alpha"),
        (["--selector", "best"], "selector must be one of"),
        (["--min-seq-len", "automatic"], "min_seq_len must be"),
        (["--set", "alpha"], "--set takes FIELD=VALUE"),
        (["--set", "depth=1"], "--set takes FIELD=VALUE"),
        (["--config", "nowhere.json"], "--config nowhere.json: "),
        (["--config", "pyproject.toml"], "--config pyproject.toml: pyproject.toml is not JSON"),
        (["--set", "layer_alphas=[0.1]"], "layer_alphas must hold 4 numbers"),
        (["--set", "block_size=100"], "block_size must be one of"),
        (["--dataset", "./no-such-file.txt"], "there is no such file"),
        (["--dataset", "no-such.jsonl"], "there is no such file"),
        (["--placement", "nowhere"], "--placement"),
        (["--lengths", "100"], "--lengths: length must be at least"),
        (["--lengths", "0"], "--lengths must be from 1 to 16777216, got 0"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--prompts", "0"], "--prompts must be at least 1, got 0"),
        (["--output", "eval"], "--output must name a JSON file"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--speed"], "--speed"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recall", *arguments])
    monkeypatch.chdir(ROOT)
    assert commands.run_command(recall.main) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_random_weights_of_a_shape(small, tmp_path, monkeypatch):
    settings = {"vocab_size": 5000, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    monkeypatch.setitem(ttft.SHAPES, "small", lambda: LlamaConfig(**settings, num_attention_heads=2, num_key_value_heads=1))
    path = tmp_path / "recall.json"
    assert recall.main([*small, "--model", "shape:small", "--limit", "1", "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["model"]["name"] == "shape:small"
    assert record["summary"][0]["unpatched_nll"] == pytest.approx(math.log(5000), rel=0.05)
    with pytest.raises(commands.UsageError, match="the shapes are llama-3.1-8b"):
        models.load_model("shape:none", "cpu", None)


def test_fields_are_set_by_name():
    parser = commands.Parser("recall", "Documentation.")
    options.add_run_arguments(parser, "recall", [1024])
    args = parser.parse_args(["--alpha", "0.25", "--set", "dense_layers=[0, 2]", "backend=reference", "sink_blocks=0"])
    config = options.check_run_arguments(args)
    assert (config.alpha, config.dense_layers, config.backend, config.sink_blocks) == (0.25, (0, 2), "reference", 0)


def test_a_file_of_settings_yields_to_options(tmp_path):
    path = tmp_path / "config.json"
    written = FlashPrefillConfig(layer_alphas=(0.1, 0.2), selector="peak", min_seq_len=4096, sink_blocks=0)
    written.to_json(path)
    parser = commands.Parser("recall", "Documentation.")
    options.add_run_arguments(parser, "recall", [1024])

    def config(*given):
        return options.check_run_arguments(parser.parse_args(list(given)))

    assert config("--config", str(path)) == written
    assert "alpha 0.1 to 0.2 by layer" in tables.describe(written)
    assert config("--config", str(path), "--set", "sink_blocks=3") == replace(written, sink_blocks=3)
    assert config("--config", str(path), "--alpha", "0.5", "--min-seq-len", "7") == replace(
        written, alpha=0.5, layer_alphas=None, min_seq_len=7
    )
    assert config() == FlashPrefillConfig(min_seq_len=1)
    recorded = recording.recorded_arguments(parser.parse_args(["--config", str(path)]))
    assert recorded == {"lengths": [1024], "limit": None, "seed": 0}
