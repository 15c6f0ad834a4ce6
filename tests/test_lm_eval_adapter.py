"""The lm-evaluation-harness on a local task: both states are asked, paired by document, and the change is the right one."""

import json
import math
import sys
from argparse import Namespace
from random import Random
from types import ModuleType

import pytest
from transformers import BloomConfig, BloomForCausalLM

from eval import lm_eval_adapter, models
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


def state(samples, **aggregates):
    """What lm_eval returns for one task without filters."""
    return {"samples": {"t": samples}, "results": {"t": {f"{name},none": value for name, value in aggregates.items()}}}


def state_of(metric, values, aggregate):
    return state([sample("t", i, **{metric: value}) for i, value in enumerate(values)], **{metric: aggregate})


def test_pairs_by_hand():
    before = state([sample("t", i, acc=float(i < 3), f1=0.5) for i in range(4)], acc=0.75, f1=0.5)
    after = state([sample("t", i, acc=float(i < 1), f1=0.25) for i in (3, 2, 1, 0)], acc=0.25, f1=0.25)
    (accuracy, f1), unpaired = lm_eval_adapter.pair(before, after)
    assert (accuracy.task, accuracy.metric, accuracy.samples, accuracy.paired) == ("t", "acc", 4, True)
    assert (accuracy.unpatched, accuracy.patched, accuracy.change) == (0.75, 0.25, -0.5)
    # Differences 0, -1, -1, 0.
    assert accuracy.change_standard_error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert (f1.change, f1.change_standard_error) == (-0.25, 0)
    assert not unpaired
    assert "-0.5000 ± 0.2887" in lm_eval_adapter.table([vars(accuracy)], 0.5)


def test_perplexity_of_log_likelihoods_by_hand():
    before = state_of("perplexity", [-1.0, -2.0, -3.0], math.exp(2))
    after = state_of("perplexity", [-1.5, -2.5, -4.0], math.exp(8 / 3))
    (perplexity, paired), unpaired = lm_eval_adapter.pair(before, after)
    assert (perplexity.metric, perplexity.paired, perplexity.change_standard_error) == ("perplexity", False, None)
    assert (perplexity.unpatched, perplexity.patched) == (math.exp(2), math.exp(8 / 3))
    assert perplexity.change > 0 > paired.change
    assert (paired.metric, paired.paired) == ("perplexity (log-likelihood per sample)", True)
    assert (paired.unpatched, paired.patched, paired.change) == pytest.approx((-2, -8 / 3, -2 / 3))
    # Differences -1/2, -1/2, -1.
    assert paired.change_standard_error == pytest.approx(1 / 6)
    assert not unpaired


def test_log_likelihoods_with_weights_by_hand():
    before, after = [(-10.0, 10), (-60.0, 30)], [(-12.0, 10), (-64.0, 30)]
    means = -70 / 40, -76 / 40
    for metric, formula in (("word_perplexity", lambda m: math.exp(-m)), ("bits_per_byte", lambda m: -m / math.log(2))):
        states = [state_of(metric, v, formula(m)) for v, m in zip((before, after), means, strict=True)]
        (aggregate, paired), unpaired = lm_eval_adapter.pair(*states)
        assert (aggregate.metric, aggregate.unpatched, aggregate.patched) == (metric, *map(formula, means))
        assert paired.metric == f"{metric} (log-likelihood per unit of weight)"
        assert (paired.unpatched, paired.patched, paired.change) == pytest.approx((*means, -6 / 40))
        # Beyond 10 and 30 times the change: -1/2 and 1/2, in units of the mean weight, 20.
        assert paired.change_standard_error == pytest.approx(math.sqrt(0.5) / 20 / math.sqrt(2))
        assert not unpaired


def test_an_aggregate_of_another_kind_has_rows_of_its_own():
    (median, paired), _ = lm_eval_adapter.pair(state_of("m", [0.0, 0.0, 1.0], 0.0), state_of("m", [0.0, 1.0, 1.0], 1.0))
    assert (median.metric, median.unpatched, median.patched, median.paired) == ("m", 0, 1, False)
    assert (paired.metric, paired.change) == ("m (values per sample)", pytest.approx(1 / 3))


NAN = float("nan")
UNPAIRED = [
    ([("a", "b"), ("c", "d")], 12.5, "its values per sample are not numbers"),
    ([(1, 0), (1, 1)], 0.5, "its values per sample are not numbers"),
    ([(1, 1), (2, 1)], 0.5, "its values per sample are not log-likelihoods with weights"),
    ([[1.0], [2.0]], None, "its values per sample are not numbers"),
    ([NAN, 1.0], NAN, "the model's answers are not numbers (NaN or infinite: 1 unpatched and 1 patched of 2 samples)"),
    ([-math.inf, -1.0], math.inf, "the model's answers are not numbers"),
    ([(NAN, 3), (-1.0, 2)], NAN, "the model's answers are not numbers"),
]


@pytest.mark.parametrize(("values", "aggregate", "reason"), UNPAIRED)
def test_what_cannot_be_paired_is_named(values, aggregate, reason):
    both = state_of("m", values, aggregate)
    rows, (line,) = lm_eval_adapter.pair(both, both)
    assert line.startswith(f"t m: {reason}")
    assert [row.metric for row in rows] == (["m"] if aggregate is not None and math.isfinite(aggregate) else [])


def test_a_metric_of_some_samples_is_named():
    both = state([sample("t", 0, acc=1.0, late=1.0), sample("t", 1, acc=1.0)][::-1], acc=1.0)
    rows, unpaired = lm_eval_adapter.pair(both, both)
    assert [row.metric for row in rows] == ["acc"]
    assert unpaired == ["t late: not every sample has it"]


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """A stand-in for lm_eval: set ``answers`` to what each state's evaluation returns; the first leaves a cache."""
    fake = Namespace(answers=[], output=tmp_path / "out.json")
    fake.arguments = ["--tasks", "t", "--device", "cpu", "--output", str(fake.output)]

    def evaluate(model, tokenizer, manager, args, cache=None):
        if cache:
            cache.with_name(f"{cache.name}_rank0.db").touch()
        return fake.answers.pop(0)

    tasks = ModuleType("lm_eval.tasks")
    tasks.TaskManager = lambda include_path: None
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setattr(lm_eval_adapter, "evaluate", evaluate)
    return fake


def test_answers_are_kept_where_nothing_can_be_compared(harness, tmp_path):
    harness.answers = [state_of("m", ["a", "b"], None)] * 2
    with pytest.raises(UsageError, match="--tasks t: nothing to compare: t m: its values per sample are not numbers"):
        lm_eval_adapter.main(harness.arguments)
    assert not harness.output.exists()
    assert len(list(tmp_path.glob("*.db"))) == 1


def test_answers_are_kept_where_nothing_can_be_paired(harness, tmp_path, capsys):
    harness.answers = [state_of("bleu", [("a", "b"), ("c", "d")], 12.5)] * 2
    assert lm_eval_adapter.main(harness.arguments) == 0
    assert json.loads(harness.output.read_text())["rows"][0]["unpatched"] == 12.5
    assert "not paired: t bleu: its values per sample are not numbers" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.db"))) == 1


def test_another_run_is_refused_before_it_asks(harness):
    harness.answers = [state_of("m", [1.0, 1.0], 1.0)] * 2
    assert lm_eval_adapter.main(harness.arguments) == 0
    before = harness.output.read_bytes()
    with pytest.raises(UsageError, match=r"holds another run \(lm_eval of 20"):
        lm_eval_adapter.main([*harness.arguments, "--alpha", "0.5"])
    assert harness.output.read_bytes() == before


def test_answers_that_are_not_numbers_are_told(harness, tmp_path, capsys):
    samples = [sample("t", i, acc=1.0, perplexity=NAN if i else -1.0) for i in range(2)]
    harness.answers = [state(samples, acc=1.0, perplexity=NAN)] * 2
    assert lm_eval_adapter.main(harness.arguments) == 0
    assert "not paired: t perplexity: the model's answers are not numbers (NaN or infinite: 1 unp" in capsys.readouterr().out
    assert [row["metric"] for row in json.loads(harness.output.read_text())["rows"]] == ["acc"]
    assert not list(tmp_path.glob("*.db"))


def test_a_model_that_cannot_be_patched_is_refused_before_it_is_asked(harness, monkeypatch, tmp_path):
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    monkeypatch.setattr(models, "load_model", lambda *_: (model, None))
    with pytest.raises(UsageError, match="--model some-bloom: "):
        lm_eval_adapter.main([*harness.arguments, "--model", "some-bloom"])
    assert not list(tmp_path.iterdir())


MISSING = [
    (ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval"), r'is not installed: pip install -e "\.\[lm-eval\]"'),
    (ModuleNotFoundError("No module named 'sacrebleu'", name="sacrebleu"), "lm_eval cannot be imported: No module.*sacrebleu"),
    (ImportError("cannot import name 'x'", name="lm_eval"), "lm_eval cannot be imported: cannot import name 'x'"),
]


@pytest.mark.parametrize(("error", "message"), MISSING)
def test_a_broken_harness_is_not_a_missing_one(error, message, monkeypatch):
    class Failing(ModuleType):
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", Failing("lm_eval.tasks"))
    with pytest.raises(UsageError, match=message):
        lm_eval_adapter.main(["--tasks", "x", "--device", "cpu"])


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
    few = ["--set", "sink_blocks=0", "window_blocks=1", "dense_tail_blocks=0", "selector=share"]
    path.unlink()
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
    path.unlink()
    assert run_command(lm_eval_adapter.main) == 0
    assert len(calls) == finished + 1 + 6 + 6 - min(finished, 3)
    assert timeless(json.loads(path.read_text())) == timeless(json.loads((planted / "whole.json").read_text()))
    assert not list(planted.glob("*.db*"))


def test_unknown_tasks_are_refused(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    with pytest.raises(UsageError, match="--tasks no_such_task"):
        lm_eval_adapter.main(["--tasks", "no_such_task", "--device", "cpu", "--output", str(tmp_path / "out.json")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output_type", "metric", "aggregation", "unit"),
    [
        ("loglikelihood", "perplexity", "perplexity", "sample"),
        ("loglikelihood_rolling", "word_perplexity", "weighted_perplexity", "unit of weight"),
        ("loglikelihood_rolling", "bits_per_byte", "bits_per_byte", "unit of weight"),
    ],
)
def test_a_perplexity_end_to_end(output_type, metric, aggregation, unit, planted):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    task = TASK.format(data=planted / "codes.jsonl", output_type=output_type, metric=metric, more="")
    task = task.replace("aggregation: mean", f"aggregation: {aggregation}").replace("is_better: true", "is_better: false")
    if output_type == "loglikelihood_rolling":
        task = task.replace('doc_to_text: "{{text}}"', 'doc_to_text: ""').replace("{{code}}", "{{text}}")
    (planted / "planted_codes.yaml").write_text(task)
    options = ["--tasks", "planted_codes", "--include-path", str(planted), "--device", "cpu", "--limit", "2", "--alpha", "1"]
    few = ["--set", "sink_blocks=0", "window_blocks=1", "dense_tail_blocks=0"]
    assert lm_eval_adapter.main([*options, *few, "--output", str(planted / "out.json")]) == 0
    aggregate, paired = json.loads((planted / "out.json").read_text())["rows"]
    assert (aggregate["metric"], paired["metric"]) == (metric, f"{metric} (log-likelihood per {unit})")
    assert aggregate["unpatched"] > 0 > paired["unpatched"]
    assert aggregate["change"] * paired["change"] < 0
    assert not list(planted.glob("*.db*"))
