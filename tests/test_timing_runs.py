"""Harnesses that measure time, interrupted, limited and split over processes: their rows are those of one whole run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval import commands, layout_speed, lm_eval_adapter, operator_speed, recording, ttft, vllm_ttft
from eval.schema import timeless

ROOT = Path(__file__).parent.parent
LENGTHS = ["--lengths", "256", "384", "512"]
OPTIONS = {
    ttft: [*LENGTHS, "--device", "cpu", "--repeats", "1"],
    operator_speed: [*LENGTHS, "--device", "cpu", "--seconds", "0", "--selectors", "flashprefill"],
    layout_speed: [*LENGTHS, "--device", "cpu", "--seconds", "0"],
}
ARGUMENTS = {
    ttft: {"lengths", "density", "chunk", "repeats", "kernels", "limit"},
    operator_speed: {"lengths", "densities", "head_dims", "batches", "heads", "kv_heads", "dense_tail_blocks", "selectors"}
    | {"audit_rows", "baselines", "portable", "seconds", "limit"},
    layout_speed: {"lengths", "density", "chunk", "heads", "kv_heads", "head_dim", "seconds", "kernels", "limit"},
}
harnesses = pytest.mark.parametrize("harness", OPTIONS, ids=lambda harness: harness.__name__)


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine threads of so small a calculation mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def interrupted(monkeypatch):
    """Makes a harness's second measurement an interruption; returns the calls of its measuring function."""

    def interrupt(harness, output, options):
        measure, calls = harness.measure, []

        def interrupting(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return measure(*args)

        monkeypatch.setattr(harness, "measure", interrupting)
        monkeypatch.setattr(sys, "argv", ["harness", *options, "--output", str(output)])
        assert commands.run_command(harness.main) == 130
        assert not output.exists()
        assert len(list(output.parent.glob("*.0.partial.jsonl"))) == 1
        return calls

    return interrupt


@pytest.fixture
def layouts(monkeypatch):
    """eval.layout_speed without its work: one row a length, of 1 ms."""
    row = {"layout": "batch", "density": 0.5, "blocks": 8, "median_ms": 1.0, "overhead": 0.25}
    monkeypatch.setattr(layout_speed, "measure", lambda length, density, args: [{"length": length} | row])
    return OPTIONS[layout_speed]


@harnesses
def test_an_interrupted_run_goes_on(harness, interrupted, tmp_path, capsys):
    path = tmp_path / "times.json"
    calls = interrupted(harness, path, OPTIONS[harness])
    assert "1 of 3 " in capsys.readouterr().out
    (partial,) = tmp_path.glob("*.partial.jsonl")
    first = json.loads(partial.read_text())["rows"]
    assert commands.run_command(harness.main) == 0
    assert len(calls) == 4
    record = json.loads(path.read_text())
    assert record["rows"][: len(first)] == first
    assert list(dict.fromkeys(row["length"] for row in record["rows"])) == [256, 384, 512]
    assert set(record["arguments"]) == ARGUMENTS[harness]
    assert not list(tmp_path.glob("*.partial.jsonl"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])


@harnesses
def test_limit_takes_the_first_lengths(harness, tmp_path):
    path = tmp_path / "times.json"
    assert harness.main([*OPTIONS[harness], "--limit", "1", "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    assert {row["length"] for row in record["rows"]} == {256}
    assert (record["arguments"]["lengths"], record["arguments"]["limit"]) == ([256, 384, 512], 1)


# What harnesses of speed work out from times.
FROM_TIMES = ("speedup", "ceiling", "overhead", "attend_tflops", "index_share", "runs")


@harnesses
def test_two_runs_differ_in_times_and_what_follows_from_them(harness, tmp_path):
    records = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.json"
        assert harness.main([*OPTIONS[harness], "--limit", "1", "--output", str(path)]) == 0
        whole = json.loads(path.read_text())
        records.append(timeless(whole))
        assert records[-1] != whole
        for row in records[-1]["rows"]:
            for part in [row, *(value for value in row.values() if isinstance(value, dict))]:
                for key in [key for key in part if key.startswith(FROM_TIMES)]:
                    del part[key]
    assert records[0] == records[1]
    assert "median" not in json.dumps(records)


def test_limit_is_of_each_head_dim_and_batch(tmp_path):
    path = tmp_path / "times.json"
    shapes = ["--head-dims", "32", "64", "--batches", "1", "2", "--limit", "1", "--output", str(path)]
    assert operator_speed.main([*OPTIONS[operator_speed], *shapes]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["length"], row["head_dim"], row["batch"]) for row in rows] == [
        (256, head_dim, batch) for head_dim in (32, 64) for batch in (1, 2)
    ]


@pytest.mark.parametrize("harness", [*OPTIONS, vllm_ttft], ids=lambda harness: harness.__name__)
def test_limit_and_output_are_checked(harness, tmp_path):
    with pytest.raises(commands.UsageError, match="--limit must be at least 1, got 0"):
        harness.main(["--limit", "0"])
    with pytest.raises(commands.UsageError, match="--output must name a JSON file"):
        harness.main(["--output", str(tmp_path)])


@pytest.mark.parametrize("harness", [ttft, operator_speed, layout_speed], ids=lambda harness: harness.__name__)
def test_an_unknown_device_is_refused(harness):
    with pytest.raises(commands.UsageError, match="--device nowhere"):
        harness.main(["--device", "nowhere"])


@pytest.mark.parametrize("field", ["device", "threads", "processes", "torch", "triton", "hf_flashprefill", "commit"])
def test_rows_of_another_environment_are_not_taken_up(field, layouts, interrupted, tmp_path, monkeypatch):
    path, environment = tmp_path / "times.json", recording.environment
    calls = interrupted(layout_speed, path, layouts)
    monkeypatch.setattr(recording, "environment", lambda device: environment(device) | {field: "another"})
    assert commands.run_command(layout_speed.main) == 0
    assert len(calls) == 5
    assert json.loads(path.read_text())["environment"][field] == "another"
    assert len(list(tmp_path.glob("*.partial.jsonl"))) == 1


def test_the_time_of_a_resumed_run_is_its_end(layouts, interrupted, tmp_path, monkeypatch):
    path, times = tmp_path / "times.json", iter("abcdefgh")
    monkeypatch.setattr(recording, "_now", lambda: next(times))
    calls = interrupted(layout_speed, path, layouts)
    assert commands.run_command(layout_speed.main) == 0
    assert len(calls) == 4
    assert json.loads(path.read_text())["environment"]["time"] == "c"


@pytest.mark.parametrize("change", [["--heads", "4"], ["--seconds", "1"], ["--density", "0.5"], ["--selector", "peak"]])
def test_rows_of_other_settings_are_not_taken_up(change, layouts, interrupted, tmp_path):
    calls = interrupted(layout_speed, tmp_path / "times.json", layouts)
    assert layout_speed.main([*layouts, *change, "--output", str(tmp_path / "times.json")]) == 0
    assert len(calls) == 5


def test_two_shapes_do_not_share_a_result(layouts, tmp_path):
    path = tmp_path / "times.json"
    assert layout_speed.main([*layouts, "--output", str(path)]) == 0
    assert layout_speed.main([*layouts, "--output", str(path)]) == 0
    with pytest.raises(commands.UsageError, match=r"times\.json holds another run \(layout_speed of 20"):
        layout_speed.main([*layouts, "--head-dim", "128", "--output", str(path)])
    assert json.loads(path.read_text())["arguments"]["head_dim"] == 64


def test_rows_of_another_peer_are_not_taken_up(interrupted, tmp_path):
    peer, path = tmp_path / "peer.py", tmp_path / "times.json"
    peer.write_text("def prepare(query, key, value, index):\n    return lambda: query + 1\n")
    calls = interrupted(operator_speed, path, [*OPTIONS[operator_speed], "--peer", f"mine={peer}"])
    peer.write_text("def prepare(query, key, value, index):\n    return lambda: query + 2\n")
    assert commands.run_command(operator_speed.main) == 0
    assert len(calls) == 5
    assert str(peer) not in path.read_text()


def test_the_gate_comes_first_on_a_resumed_run_too(interrupted, tmp_path, monkeypatch, capsys):
    path = tmp_path / "times.json"
    calls = interrupted(operator_speed, path, OPTIONS[operator_speed])
    with monkeypatch.context() as patch:
        patch.setattr(operator_speed, "passes_gate", lambda *_: False)
        assert commands.run_command(operator_speed.main) == 1
    assert len(calls) == 2
    assert not path.exists()
    assert "speedup" not in capsys.readouterr().out
    assert commands.run_command(operator_speed.main) == 0
    assert len(calls) == 4


def test_two_processes_share_the_rows(tmp_path):
    path = tmp_path / "times.json"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, *launch, "-m", "eval.operator_speed", *OPTIONS[operator_speed], "--output", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [entry["length"] for entry in json.loads(done.stdout.splitlines()[-1])] == [256, 384, 512]
    record = json.loads(path.read_text())
    assert [row["length"] for row in record["rows"]] == [256, 384, 512]
    assert record["environment"]["processes"] == 2
    assert not list(tmp_path.glob("*.partial.jsonl"))


@pytest.mark.parametrize("arguments", [(vllm_ttft, []), (lm_eval_adapter, ["--tasks", "x"])], ids=["vllm_ttft", "lm_eval"])
def test_what_has_no_rows_to_split_runs_in_one_process(arguments, monkeypatch):
    harness, options = arguments
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(commands.UsageError, match="runs in one process; start it without accelerate launch"):
        harness.main(options)
