"""The plugin's rows inside real engines: vLLM's CPU build, float32, a tiny Llama."""

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from hf_flashprefill import FlashPrefillConfig, patched, prefill_stats

from .engines import (
    NEW_TOKENS,
    SETTINGS,
    answers,
    assert_same_answers,
    engine,
    free_port,
    server,
    server_command,
    stats,
)

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
MIN_QUERY_LEN = 64
DENSE = {"alpha": 0, "min_seq_len": 1024, "min_query_len": MIN_QUERY_LEN}
SPARSE = SETTINGS | {"min_query_len": MIN_QUERY_LEN}
WHOLE = 8192


def greedy(model, prompt: list[int]) -> list[int]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.fixture
def batches(monkeypatch):
    """(query, sequence) lengths of every batch the builder divides, and its plan."""
    from hf_flashprefill.integrations.vllm import backend

    seen, divide = [], backend.plan_rows

    def watching(query_start_loc, seq_lens, **kwargs):
        plan = divide(query_start_loc, seq_lens, **kwargs)
        queries = query_start_loc.diff().tolist()
        seen.append((list(zip(queries, seq_lens.tolist(), strict=True)), plan))
        return plan

    monkeypatch.setattr(backend, "plan_rows", watching)
    return seen


def expected_counts(batches) -> Counter:
    """The row rule once more, in plain Python."""
    counts = Counter()
    for rows, _ in batches:
        for queries, tokens in rows:
            if queries >= MIN_QUERY_LEN:
                counts["sparse" if tokens >= 1024 else "shorter than min_seq_len"] += 1
            elif queries:
                counts["decode" if queries == 1 else "shorter than min_query_len"] += 1
    return counts


def test_stock_answers_as_transformers(stock, reference_model, prompts, continuations):
    first, repeated, continued = stock
    assert [answer.tokens for answer in first] == [greedy(reference_model, prompt) for prompt in prompts]
    assert [answer.tokens for answer in continued] == [greedy(reference_model, prompt) for prompt in continuations]
    assert_same_answers(repeated, first)


@pytest.mark.parametrize("chunk", [300, 1024, WHOLE])
def test_alpha_zero_answers_as_stock(stock, model_folder, prompts, continuations, batches, chunk):
    with engine(model_folder, chunk, DENSE) as llm:
        assert_same_answers(answers(llm, prompts), stock[0])
        first = list(batches)
        repeated, continued = answers(llm, prompts), answers(llm, continuations)
        counted = stats(llm)
    assert_same_answers(repeated, stock[1])
    assert_same_answers(continued, stock[2])
    assert [answer.cached for answer in continued] == [answer.cached for answer in stock[2]]
    assert min(answer.cached for answer in continued) > 1000

    # Every prompt token that was not cached, and every answered token but the last, was a query once.
    given = sum(len(prompt) - answer.cached for prompt, answer in zip(continuations, continued, strict=True))
    given += sum(2 * len(prompt) - answer.cached for prompt, answer in zip(prompts, repeated, strict=True))
    answered = (2 * len(prompts) + len(continuations)) * (NEW_TOKENS - 1)
    assert sum(queries for rows, _ in batches for queries, _ in rows) == given + answered

    expected = expected_counts(batches)
    if chunk == WHOLE:
        # 1500 and 3000 tokens, the 92 of the repeated 1500 that fill no page, and the two continuations.
        assert expected["sparse"] == 5
    else:
        assert any(plan.long_rows and plan.dense_rows["decode"] for _, plan in first), "no mixed batch"
    assert any(row.seq_len > row.query_len for _, plan in batches for row in plan.long_rows), "no row with cached tokens"
    for layer in counted["layers"]:
        assert {"sparse": layer["sparse_calls"], **layer["dense_calls"]} == expected
        assert layer["density"] == 1
    assert [layer["layer"] for layer in counted["layers"]] == [0, 1]


def test_sparse_rows_answer_as_the_patched_model(stock, model_folder, reference_model, prompts):
    with engine(model_folder, WHOLE, SPARSE) as llm:
        sparse = answers(llm, prompts)
        counted = stats(llm)
        llm.collective_rpc("flashprefill_reset")
        cleared = stats(llm)
    assert_same_answers(sparse[:2], stock[0][:2])
    with patched(reference_model, config=FlashPrefillConfig(**SETTINGS)):
        assert [answer.tokens for answer in sparse] == [greedy(reference_model, prompt) for prompt in prompts]
        by_layer = [layer.density for layer in prefill_stats(reference_model).layers]
    assert [layer["density"] for layer in counted["layers"]] == pytest.approx(by_layer, abs=1e-3)
    assert 0.1 < counted["density"] < 0.7
    for ours, dense in zip(sparse[2:], stock[0][2:], strict=True):
        assert abs(ours.logprob - dense.logprob) > 1e-2
    assert cleared["sparse_calls"] == 0
    assert cleared["density"] is None
    assert [layer["dense_calls"] for layer in cleared["layers"]] == [{}, {}]


def test_chunks_leave_short_rows_alone_and_cached_prefixes_answer_as_cold_ones(stock, model_folder, prompts):
    with engine(model_folder, 1024, SPARSE | {"dense_layers": [1]}) as llm:
        mixed = answers(llm, prompts)
        layers = stats(llm)["layers"]
        llm.reset_prefix_cache()
        (cold,) = answers(llm, prompts[3:])
        llm.reset_prefix_cache()
        answers(llm, [prompts[3][:2049]])
        (warm,) = answers(llm, prompts[3:])
    assert_same_answers(mixed[:2], stock[0][:2])
    assert abs(cold.logprob - stock[0][3].logprob) > 1e-2
    assert (cold.cached, warm.cached) == (0, 2048)
    # The chunks end at the same places, so the cached keys are those of the cold run.
    assert_same_answers([warm], [cold])
    assert layers[0]["sparse_calls"] > 0
    assert layers[1]["sparse_calls"] == 0
    assert layers[1]["dense_calls"]["dense layer"] == layers[0]["sparse_calls"]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"alpha": 7}, "alpha must be from 0 to 1, got 7"),
        ({"dense_layers": [2]}, r"dense_layers must lie from 0 to 1, got \(2,\)"),
    ],
)
def test_bad_settings_stop_the_start(model_folder, reference_model, setting, named):
    with (
        pytest.raises(ValueError, match=r'additional_config\["flashprefill"\]: ' + named),
        engine(model_folder, 1024, SPARSE | setting),
    ):
        pass


@pytest.fixture
def environment(tmp_path):
    """Processes in it load the plugin's CPU stand-in as users' load the plugin, through an entry point."""
    folder = tmp_path / "flashprefill_test-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: flashprefill-test\nVersion: 0\n")
    (folder / "entry_points.txt").write_text("[vllm.general_plugins]\ncpu_stand_in = tests.vllm.cpu_plugin:register\n")
    return {"PYTHONPATH": f"{tmp_path}:{ROOT}", "VLLM_SERVER_DEV_MODE": "1"}


def test_a_server_reports_the_density_of_a_request(model_folder, reference_model, prompts, environment, tmp_path):
    with server(model_folder, WHOLE, SPARSE, environment, tmp_path / "log") as running:
        running.post("/v1/completions", {"model": "tiny", "prompt": prompts[3], "max_tokens": 2, "temperature": 0})
        (counted,) = running.post("/collective_rpc", {"method": "flashprefill_stats"})["results"]
    with patched(reference_model, config=FlashPrefillConfig(**SETTINGS)):
        greedy(reference_model, prompts[3])
        by_layer = [layer.density for layer in prefill_stats(reference_model).layers]
    assert [layer["density"] for layer in counted["layers"]] == pytest.approx(by_layer, abs=1e-3)
    assert counted["sparse_calls"] == 2


def test_a_server_with_bad_settings_does_not_start(model_folder, reference_model, environment):
    done = subprocess.run(
        server_command(model_folder, WHOLE, {"alhpa": 0.1}, free_port()),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "got ['alhpa']" in line]
    assert any('ValueError: additional_config["flashprefill"] must hold only' in line for line in lines), done.stderr
