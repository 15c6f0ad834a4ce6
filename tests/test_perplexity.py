"""The perplexity harness: both ways against losses computed by hand from whole logits, windows, text sources, command."""

import argparse
import itertools
import json
import math
import sys
from dataclasses import asdict, replace

import pytest
import torch
from transformers import DynamicCache

from eval import perplexity, ruler
from eval.commands import UsageError
from eval.haystack import encode, standard_library_text
from eval.texts import corpus_ids, documents
from hf_flashprefill import FlashPrefillConfig, patched

SPARSE = FlashPrefillConfig(alpha=0.5, min_seq_len=1, sink_blocks=1, window_blocks=1, dense_tail_blocks=0)


@pytest.fixture(scope="module")
def ids(recall_model):
    return torch.tensor(encode(recall_model[1], standard_library_text("held_out")[:60_000])[:1500])


def losses_by_hand(logits, targets):
    return [-math.log(torch.softmax(row.double(), -1)[target].item()) for row, target in zip(logits, targets, strict=True)]


def test_prefill_losses_are_those_by_hand(recall_model, ids):
    model = recall_model[0]
    row = perplexity.compare(model, ids, "name", SPARSE, continuation=100, buckets=3)
    with torch.no_grad():
        dense = model(ids[None]).logits[0]
        with patched(model, config=SPARSE):
            sparse = model(ids[None]).logits[0]
    assert [(bucket.start, bucket.end, bucket.tokens) for bucket in row.prefill] == [
        (1, 500, 499),
        (500, 1000, 500),
        (1000, 1500, 500),
    ]
    for bucket in row.prefill:
        for logits, found in ((dense, bucket.unpatched_nll), (sparse, bucket.patched_nll)):
            wanted = losses_by_hand(logits[bucket.start - 1 : bucket.end - 1], ids[bucket.start : bucket.end])
            assert found == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    assert row.density < 0.9
    assert row.prefill[2].patched_nll != row.prefill[2].unpatched_nll


def test_continuation_losses_are_those_of_decoding_token_by_token(recall_model, ids):
    model = recall_model[0]
    row = perplexity.compare(model, ids, "name", SPARSE, continuation=6, buckets=1)
    assert (row.continuation.start, row.continuation.end, row.continuation.tokens) == (1494, 1500, 6)
    for config, found in ((None, row.continuation.unpatched_nll), (SPARSE, row.continuation.patched_nll)):
        cache = DynamicCache()
        with torch.no_grad(), patched(model, config=config or FlashPrefillConfig()):
            # As generate does: the prompt, then one token at a time, which a patched model decodes densely.
            rows = [model(ids[None, :1494], past_key_values=cache, use_cache=True).logits[0, -1]]
            rows += [
                model(ids[None, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1] for i in range(1494, 1499)
            ]
        wanted = losses_by_hand(rows, ids[1494:])
        assert found == pytest.approx(sum(wanted) / 6, rel=1e-4)
    assert row.continuation.patched_nll != row.continuation.unpatched_nll


def test_each_way_has_its_density(recall_model, ids):
    """The continuation's context is shorter than the whole, here too short to run sparse."""
    rows = []
    for shortest in (1, 600, 601):
        config = replace(SPARSE, min_seq_len=shortest)
        row = perplexity.compare(recall_model[0], ids[:600], "name", config, continuation=101, buckets=1)
        rows.append(asdict(row))
    assert [row["density"] is None for row in rows] == [False, False, True]
    assert [row["continuation_density"] is None for row in rows] == [False, True, True]
    assert rows[0]["continuation_density"] != rows[0]["density"]
    (summary,) = perplexity.summarise(rows)
    prefill, continuation = perplexity.summary_table([summary]).splitlines()[1:]
    assert "1 of 3 dense" in prefill
    assert f"{rows[0]['continuation_density']:.3f}, 2 of 3 dense" in continuation
    # As in results from before it was measured.
    del summary["continuation_density"]
    assert "dense" not in perplexity.summary_table([summary]).splitlines()[2]


def test_windows_come_from_different_documents_first(recall_model):
    tokenizer = recall_model[1]
    texts = [standard_library_text("held_out")[start : start + size] for start, size in ((0, 9000), (9000, 90), (9090, 6000))]
    lengths = [len(encode(tokenizer, text)) for text in texts]
    assert lengths[1] < 500 < lengths[2] < 3 * 500 < lengths[0]
    names = [name for name, _ in perplexity.windows(iter(texts), tokenizer, 500, 4)]
    assert names == ["0/0", "2/0", "0/500", "2/500"]
    assert perplexity.windows(iter(texts), tokenizer, 500, 1)[0][1].tolist() == encode(tokenizer, texts[0])[:500]
    assert perplexity.windows(iter(texts), tokenizer, 10**6, 1) == []


def test_other_seeds_give_other_windows(recall_model):
    tokenizer = recall_model[1]
    texts = [standard_library_text("held_out")[start : start + 6000] for start in (0, 9000)]
    ids = [encode(tokenizer, text) for text in texts]
    names = set()
    for seed in range(1, 5):
        found = perplexity.windows(iter(texts), tokenizer, 500, 3, seed)
        assert [name for name, _ in found] == [name for name, _ in perplexity.windows(iter(texts), tokenizer, 500, 3, seed)]
        for name, window in found:
            number, start = map(int, name.split("/"))
            assert window.tolist() == ids[number][start : start + 500]
        assert {name.split("/")[0] for name, _ in found[:2]} == {"0", "1"}
        names |= {name for name, _ in found}
    assert len(names) == 12
    shortest = len(ids[0])
    assert [name for name, _ in perplexity.windows(iter(texts[:1]), tokenizer, shortest, 1, seed=1)] == ["0/0"]


def test_summaries_follow_from_the_rows():
    def row(*differences):
        buckets = [{"start": 0, "end": 9, "tokens": t, "unpatched_nll": 2.0, "patched_nll": 2.0 + d} for t, d in differences]
        return {"length": 9, "density": 0.5, "continuation_density": 0.5, "prefill": buckets, "continuation": buckets[0]}

    (summary,) = perplexity.summarise([row((10, 0.01), (30, 0.05)), row((10, 0.03), (30, 0.03))])
    assert summary["prefill"]["tokens"] == 80
    mean = (10 * 0.01 + 30 * 0.05 + 10 * 0.03 + 30 * 0.03) / 80
    assert summary["prefill"]["patched_nll"] == pytest.approx(2 + mean)
    assert summary["prefill"]["rise"] == pytest.approx(math.expm1(mean))
    assert summary["continuation"]["rise"] == pytest.approx(math.expm1(0.02))
    assert summary["continuation"]["rise_standard_error"] == pytest.approx(math.exp(0.02) * 0.01)
    assert [bucket["rise"] for bucket in summary["by_position"]] == pytest.approx([math.expm1(0.02), math.expm1(0.04)])


def test_the_command_on_a_local_file(tmp_path, capsys):
    text, path = tmp_path / "text.md", tmp_path / "out.json"
    text.write_text(standard_library_text("held_out")[:40_000])
    options = ["--continuation", "50", "--documents", "3", "--buckets", "4", "--alpha", "0", "--device", "cpu"]
    assert perplexity.main(["--lengths", "600", "--dataset", str(text), "--output", str(path), *options]) == 0
    assert "continuation" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["harness"] == "perplexity"
    assert len(record["rows"]) == record["summary"][0]["documents"] == 3
    # Every block kept: nothing rises.
    assert record["summary"][0]["density"] == 1
    assert record["summary"][0]["prefill"]["rise"] == pytest.approx(0, abs=1e-4)
    assert record["summary"][0]["continuation"]["rise"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--continuation", "4096"], "--continuation must be from 1 to 4094"),
        (["--documents", "0"], "--documents must be at least 1"),
        (["--buckets", "0"], "--buckets must be from 1"),
        (["--lengths", "9999999"], "no document has that many tokens"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("import os\n" * 100)
    with pytest.raises(UsageError, match=message):
        perplexity.main([*arguments, "--dataset", str(text), "--device", "cpu"])


def text_arguments(**changes):
    return argparse.Namespace(**({"dataset": None, "subset": None, "split": "test", "column": "text"} | changes))


def test_data_sets_give_their_documents(tmp_path, recall_model):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "one\ntwo", "n": 1}, {"text": "three", "n": 2}]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "test.parquet")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for dataset in ("set", "lines.jsonl"):
        args = text_arguments(dataset=str(tmp_path / dataset))
        assert list(documents(args)) == ["one\ntwo", "three"]
        assert recall_model[1].decode(corpus_ids(recall_model[1], args)) == "one\ntwo\nthree"
    with pytest.raises(UsageError, match="--column body: .*'n', 'text'"):
        list(documents(text_arguments(dataset=str(tmp_path / "set"), column="body")))
    with pytest.raises(UsageError, match="--dataset"):
        list(documents(text_arguments(dataset=str(tmp_path / "set"), split="dev")))
    assert len(list(itertools.islice(documents(text_arguments()), 2))) == 1


def test_rows_without_text_are_skipped_and_other_values_refused(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "lines.jsonl"
    rows = [{"text": None, "n": 1}, {"text": "one", "n": 2}, {"text": None, "n": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(documents(text_arguments(dataset=str(path)))) == ["one"]
    with pytest.raises(UsageError, match=r"--column n: .*lines\.jsonl has int there, not text"):
        list(documents(text_arguments(dataset=str(path), column="n")))


@pytest.mark.parametrize("name", ["lines.ndjson", "lines.JSONL", "table.CSV"])
def test_a_suffix_says_the_format_in_any_case(name, tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / name
    path.write_text("text,n\none,1\n" if "CSV" in name else '{"text": "one", "n": 1}\n')
    assert list(documents(text_arguments(dataset=str(path)))) == ["one"]
    with pytest.raises(UsageError, match="there is no such file"):
        list(documents(text_arguments(dataset=f"no-such-{name}")))


def test_what_is_missing_is_asked_for_by_the_name_of_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError) as refused:
        list(documents(text_arguments(dataset="some/set")))
    assert str(refused.value) == '--dataset needs the package datasets: pip install -e ".[eval]"'


WITHOUT_TEXT = [("empty.txt", ""), ("white.txt", " \n\t\n"), ("white.csv", 'text\n" "\n'), ("empty.jsonl", "")]


@pytest.mark.parametrize(("name", "content"), WITHOUT_TEXT)
def test_a_source_without_text_is_to_blame(name, content, tmp_path, recall_model):
    if not name.endswith(".txt"):
        pytest.importorskip("datasets")
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=f"--dataset .*{name}: there is no text in it"):
        corpus_ids(recall_model[1], text_arguments(dataset=str(path)))


@pytest.mark.parametrize("harness", [perplexity, ruler], ids=lambda harness: harness.__name__)
def test_harnesses_with_documents_of_their_own_blame_it_too(harness, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    options = ["--dataset", str(tmp_path / "empty.txt"), "--device", "cpu", "--output", str(tmp_path / "x.json")]
    with pytest.raises(UsageError, match="--dataset .*: there is no text in it"):
        harness.main(options)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
