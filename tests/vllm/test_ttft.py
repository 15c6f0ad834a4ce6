"""eval.vllm_ttft around real engines on the CPU: which engines it starts, what it asks them, and what it writes."""

import json
import sys
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from eval import commands, vllm_ttft

from .engines import VOCABULARY, engine

pytestmark = pytest.mark.vllm


@pytest.fixture
def engines(monkeypatch, model_folder, reference_model):
    """(chunk, settings) of every engine that the command starts, each replaced by one on the CPU."""
    started = []

    def in_engine(folder, longest, chunk, memory, config, work):
        settings = None
        if config is not None:
            # The prompts of this test are short.
            settings = config.to_dict() | {"min_seq_len": 1024, "min_query_len": 64}
        started.append((chunk, config))
        with engine(model_folder, chunk or longest, settings) as llm:
            return work(llm)

    monkeypatch.setattr(vllm_ttft, "in_engine", in_engine)
    small = LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4)
    monkeypatch.setitem(vllm_ttft.SHAPES, "llama-3.1-8b", lambda: small)
    return started


def test_each_length_is_measured_in_chunks_and_at_once(engines, tmp_path, capsys):
    path = tmp_path / "ttft.json"
    lengths = ["--lengths", "1500", "3000", "--density", "0.4", "--set", "dense_tail_blocks=0"]
    assert vllm_ttft.main([*lengths, "--chunks", "1024", "0", "--repeats", "1", "--output", str(path)]) == 0
    assert [(chunk, config is not None) for chunk, config in engines] == [
        *((1024, False), (1024, True), (1024, True)),
        *((0, False), (0, True), (0, True)),
    ]
    record = json.loads(path.read_text())
    assert record["harness"] == "vllm_ttft"
    assert [(row["length"], row["chunk"]) for row in record["rows"]] == [(1500, 1024), (3000, 1024), (1500, 1500), (3000, 3000)]
    for row in record["rows"]:
        # Two prompts, two layers; every chunk ends at 1024 tokens or later, so all are long.
        chunks = -(-row["length"] // row["chunk"])
        assert row["sparse_calls"] == 2 * 2 * chunks
        assert 0.3 < row["density"] < 0.6
        assert row["speedup"] == pytest.approx(row["unpatched"]["median_s"] / row["patched"]["median_s"])
    assert "FlashAttention s" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["ttft.json"]
    assert set(record["arguments"]) == {"lengths", "chunks", "density", "repeats", "memory", "limit"}
    assert record["environment"]["vllm"]


@pytest.fixture
def asked(monkeypatch):
    """(chunk, ours or not, longest, lengths asked) of every engine that the command starts; none of them is one."""
    started = []

    def in_engine(folder, longest, chunk, memory, config, work):
        lengths = []
        started.append((chunk, config is not None, longest, lengths))
        counted = {"density": 0.4, "sparse_calls": 2, "layers": [{"dense_calls": {}}]}
        return work(SimpleNamespace(collective_rpc=lambda name: [counted], lengths=lengths))

    def first_token_seconds(llm, length, vocabulary, repeats):
        if len(started) == 3:
            raise KeyboardInterrupt
        llm.lengths.append(length)
        return [1.0] * (repeats + 1)

    monkeypatch.setattr(vllm_ttft, "in_engine", in_engine)
    monkeypatch.setattr(vllm_ttft, "first_token_seconds", first_token_seconds)
    small = LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    monkeypatch.setitem(vllm_ttft.SHAPES, "llama-3.1-8b", lambda: small)
    return started


def test_an_interrupted_run_starts_the_engines_that_are_left(asked, tmp_path, monkeypatch):
    path = tmp_path / "ttft.json"
    options = ["--lengths", "3000", "1500", "--chunks", "1024", "0", "--density", "0.4", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["vllm_ttft", *options])
    assert commands.run_command(vllm_ttft.main) == 130
    assert asked == [(1024, False, 3000, [3000, 1500]), (1024, True, 3000, [3000]), (1024, True, 3000, [])]
    assert not path.exists()
    assert commands.run_command(vllm_ttft.main) == 0
    assert asked[3:] == [
        *((1024, False, 3000, [1500]), (1024, True, 3000, [1500])),
        *((0, False, 3000, [3000, 1500]), (0, True, 3000, [3000]), (0, True, 3000, [1500])),
    ]
    rows = json.loads(path.read_text())["rows"]
    assert [(row["length"], row["chunk"]) for row in rows] == [(3000, 1024), (1500, 1024), (3000, 3000), (1500, 1500)]
    assert [file.name for file in tmp_path.iterdir()] == ["ttft.json"]


def test_limit_takes_the_first_lengths_of_each_chunk_size(asked, tmp_path):
    path = tmp_path / "ttft.json"
    # The third engine would be interrupted.
    options = ["--lengths", "1500", "3000", "--chunks", "1024", "--density", "0.4", "--limit", "1", "--output", str(path)]
    assert vllm_ttft.main(options) == 0
    assert asked == [(1024, False, 1500, [1500]), (1024, True, 1500, [1500])]


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(commands.UsageError, match="an NVIDIA GPU is needed"):
        vllm_ttft.main(["--lengths", "32768", "--output", str(tmp_path / "ttft.json")])


def test_the_backend_of_another_plugin_is_not_timed_as_ours(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_ttft, "register", lambda: False)
    with pytest.raises(commands.UsageError, match="CUSTOM must be ours"):
        vllm_ttft.main(["--lengths", "32768", "--output", str(tmp_path / "ttft.json")])
    assert not asked
