"""The lm-evaluation-harness on a local task: both states are asked, paired by document, and the change is the right one."""

import json
import math
import sys
from random import Random

import pytest

from eval import lm_eval_adapter
from eval.commands import UsageError, run_command
from eval.haystack import random_facts, standard_library_text
from eval.schema import timeless

TASK = """
task: planted_codes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {output_type}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{code}}}}"
target_delimiter: ""
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def sample(task, document, **metrics):
    return {"doc_id": document, "filter": "none", "metrics": list(metrics), **metrics}


def test_pairs_by_hand():
    before = {"t": [sample("t", i, acc=float(i < 3), f1=0.5) for i in range(4)]}
    after = {"t": [sample("t", i, acc=float(i < 1), f1=0.25) for i in (3, 2, 1, 0)]}
    accuracy, f1 = lm_eval_adapter.pair(before, after)
    assert (accuracy.task, accuracy.metric, accuracy.samples) == ("t", "acc", 4)
    assert (accuracy.unpatched, accuracy.patched, accuracy.change) == (0.75, 0.25, -0.5)
    # Differences 0, -1, -1, 0.
    assert accuracy.change_standard_error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert (f1.change, f1.change_standard_error) == (-0.25, 0)
    assert "-0.5000 ± 0.2887" in lm_eval_adapter.table([vars(accuracy)], 0.5)


def test_missing_folder_is_refused():
    with pytest.raises(UsageError, match="--include-path ./none: there is no such folder"):
        lm_eval_adapter.main(["--tasks", "x", "--include-path", "./none"])


@pytest.fixture
def planted(tmp_path):
    """Six documents of some 1200 tokens: a fact, source, more source that no dense tail block sees, the question."""
    source, random = standard_library_text("held_out"), Random(0)
    with (tmp_path / "codes.jsonl").open("w") as file:
        for i, fact in enumerate(random_facts(random, 3)):
            text = f"{fact.statement}\n{source[9000 * i : 9000 * i + 5000]}\n{fact.question}"
            file.write(json.dumps({"text": text, "code": fact.code}) + "\n")
    return tmp_path


TYPES = [
    ("generate_until", "exact_match", "generation_kwargs:\n  max_gen_toks: 6\n  do_sample: false\n  until: []"),
    ("loglikelihood", "acc", ""),
]


@pytest.mark.parametrize(("output_type", "metric", "more"), TYPES)
def test_a_local_task_end_to_end(output_type, metric, more, planted, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    task = TASK.format(data=planted / "codes.jsonl", output_type=output_type, metric=metric, more=more)
    (planted / "planted_codes.yaml").write_text(task)
    path = planted / "out.json"
    arguments = ["--tasks", "planted_codes", "--include-path", str(planted), "--device", "cpu", "--output", str(path)]
    assert lm_eval_adapter.main([*arguments, "--limit", "2", "--alpha", "0"]) == 0
    record = json.loads(path.read_text())
    row = next(row for row in record["rows"] if row["metric"] == metric)
    assert row["samples"] == 2
    assert row["unpatched"] == row["patched"] == 1
    assert record["summary"][0]["density"] == 1
    # With next to nothing kept, the facts are out of reach: the patched state really was patched.
    few = ["--set", "sink_blocks=0", "window_blocks=1", "dense_tail_blocks=0"]
    assert lm_eval_adapter.main([*arguments, "--alpha", "1", *few]) == 0
    row = next(row for row in json.loads(path.read_text())["rows"] if row["metric"] == metric)
    assert row["patched"] < row["unpatched"]
    assert "planted_codes" in capsys.readouterr().out


@pytest.mark.parametrize(("finished", "kind"), [(1, TYPES[0]), (4, TYPES[1])], ids=["unpatched", "patched"])
def test_an_interrupted_run_keeps_what_the_unpatched_model_answered(finished, kind, planted, monkeypatch):
    """``finished`` of six calls, three a state, come before the interruption."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.models.huggingface import HFLM

    output_type, metric, more = kind
    task = TASK.format(data=planted / "codes.jsonl", output_type=output_type, metric=metric, more=more)
    (planted / "planted_codes.yaml").write_text(task)
    options = ["--tasks", "planted_codes", "--include-path", str(planted), "--device", "cpu"]
    few = [*options, "--alpha", "1", "--set", "sink_blocks=0", "window_blocks=1", "dense_tail_blocks=0"]
    assert lm_eval_adapter.main([*few, "--output", str(planted / "whole.json")]) == 0
    name = "_model_generate" if output_type == "generate_until" else "_model_call"
    ask, calls = getattr(HFLM, name), []

    def interrupting(*args, **kwargs):
        calls.append(args)
        if len(calls) == finished + 1:
            raise KeyboardInterrupt
        return ask(*args, **kwargs)

    monkeypatch.setattr(HFLM, name, interrupting)
    path = planted / "out.json"
    monkeypatch.setattr(sys, "argv", ["lm_eval_adapter", *few, "--output", str(path)])
    assert run_command(lm_eval_adapter.main) == 130
    assert not path.exists()
    assert len(list(planted.glob("out.*.unpatched_rank0.db"))) == 1
    # Answers are of one set of settings.
    assert lm_eval_adapter.main([*options, "--alpha", "0.5", "--output", str(path)]) == 0
    assert len(calls) == finished + 1 + 6
    assert run_command(lm_eval_adapter.main) == 0
    assert len(calls) == finished + 1 + 6 + 6 - min(finished, 3)
    assert timeless(json.loads(path.read_text())) == timeless(json.loads((planted / "whole.json").read_text()))
    assert not list(planted.glob("*.db*"))


def test_unknown_tasks_are_refused(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    with pytest.raises(UsageError, match="--tasks no_such_task"):
        lm_eval_adapter.main(["--tasks", "no_such_task", "--device", "cpu", "--output", str(tmp_path / "out.json")])
    assert not list(tmp_path.iterdir())
