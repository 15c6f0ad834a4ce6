"""eval.vllm_ttft around real engines on the CPU: which engines it starts, what it asks them, and what it writes."""

import json

import pytest
from transformers import LlamaConfig

from eval import common, vllm_ttft

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


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(common.UsageError, match="an NVIDIA GPU is needed"):
        vllm_ttft.main(["--lengths", "32768", "--output", str(tmp_path / "ttft.json")])
