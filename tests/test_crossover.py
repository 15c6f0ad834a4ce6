"""min_seq_len="auto": what is known, how it is measured, and what a patched model does with it."""

import copy
import functools
import json
import pickle
import subprocess
import sys

import pytest
import torch

import hf_flashprefill.attention as seam
from hf_flashprefill import FlashPrefillConfig, patch_model, prefill_stats
from hf_flashprefill.backends import torch as torch_backend
from hf_flashprefill.causal_mask import CausalMask
from hf_flashprefill.crossover import (
    NEVER,
    imposed,
    known,
    measure,
    measure_crossover,
    min_seq_len_of_model,
    timing,
)
from hf_flashprefill.crossover import __main__ as command
from hf_flashprefill.masking import _TAKES_CACHE_POSITION
from hf_flashprefill.support.situations import padding, prompt
from tests.crossovers import AUTO, CPU, GPU, LLAMA, RULE, SHAPE, answer, measured
from tests.inputs import Case, exact_dense, tiny_model
from tests.tolerance import assert_same_output

pytestmark = pytest.mark.usefixtures("cache")
LENGTHS = tuple(range(10, 100, 10))


def test_settings_go_before_measurements_and_those_before_the_table():
    assert answer() == known.UNMEASURED_CPU == 8192
    known.remember(RULE, SHAPE, CPU, measured(3000))
    assert answer() == 3000
    assert answer(FlashPrefillConfig(min_seq_len=77)) == 77
    # A rule that was not measured is not the one that was.
    assert answer(FlashPrefillConfig(selector="flashprefill")) == 8192


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (measured(5000), 5000),
        (measured(None), NEVER),
        (measured(None, longest=4096, exhausted=False), 8192),
        (measured(None, longest=12288, exhausted=False), 12289),
    ],
)
def test_where_sparse_never_won_it_stays_dense_as_far_as_was_looked(found, expected):
    known.remember(RULE, SHAPE, CPU, found)
    assert answer() == expected


@pytest.mark.parametrize(
    ("capability", "shape", "expected"),
    [
        ((9, 0), LLAMA, 12288),
        ((9, 0), LLAMA._replace(heads=64, head_dim=64), 12288),
        ((9, 0), LLAMA._replace(heads=14, head_dim=64), 16384),
        ((9, 0), LLAMA._replace(dtype=torch.float32), 16384),
        ((8, 0), LLAMA, 16384),
        ((12, 0), LLAMA, 16384),
    ],
)
def test_the_table_is_careful_about_what_nobody_measured(capability, shape, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(torch.version, "hip", None)
    assert answer(shape=shape, device=GPU) == expected
    known.remember(RULE, shape, GPU, measured(5120))
    assert answer(shape=shape, device=GPU) == 5120


def test_amd_gpus_are_not_taken_for_what_was_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert known.default_min_seq_len(LLAMA, GPU) == 16384


@pytest.mark.parametrize(
    ("winning", "expected", "asked"),
    [
        ({40, 50, 60, 70, 80, 90}, 40, 6),
        (set(LENGTHS), 10, 3),
        (set(), None, 9),
        ({90}, 90, 9),
        ({80, 90}, 80, 9),
        # A win that does not last, twice.
        ({20, 40, 50, 70, 80, 90}, 70, 9),
        # Wins for good that end at the longest lengths are no wins.
        ({70, 80}, None, 9),
    ],
)
def test_the_first_length_from_which_on_sparse_wins(winning, expected, asked):
    questions = []

    def wins(length):
        questions.append(length)
        return length in winning

    assert measure.first_lasting_win(LENGTHS, wins) == expected
    assert questions == list(LENGTHS[:asked])


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        # Overhead of 3 ms, then a quarter of the dense time, which is 1 ms at 1024 tokens: wins from 2.05 K tokens on.
        (lambda length: 3 + (length / 1024) ** 2 / 4, 3072),
        # Never by as much as the margin.
        (lambda length: 0.96 * (length / 1024) ** 2, None),
        # Not monotone: wins that do not last at 1024, and at 2048 and 3072 tokens.
        (lambda length: 1e9 if length in (1536, 4096) else 0.1, 6144),
    ],
)
def test_measuring_by_another_clock(sparse, expected, cache):
    found = measure_crossover(SHAPE, "cpu", AUTO, time_length=lambda length: ((length / 1024) ** 2, sparse(length)))
    assert found.tokens == expected
    assert found.exhausted
    assert answer() == (NEVER if expected is None else expected)
    assert len(json.loads(cache.read_text())) == 1
    assert [row[0] for row in found.timings] == list(measure.CPU_LENGTHS[: len(found.timings)])
    assert found.longest == found.timings[-1][0]


def test_an_interrupted_measurement_leaves_nothing(cache):
    def interrupted(length):
        if length == 2048:
            raise KeyboardInterrupt
        return 1.0, 2.0

    with pytest.raises(KeyboardInterrupt):
        measure_crossover(SHAPE, "cpu", AUTO, time_length=interrupted)
    assert not cache.exists()
    assert answer() == 8192


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="max_seq_len must be at least 1024 tokens, got 1023"):
        measure_crossover(SHAPE, "cpu", AUTO, max_seq_len=1023)
    with pytest.raises(ValueError, match="backend must be"):
        measure_crossover(SHAPE, "cpu", FlashPrefillConfig(backend="reference"))


@pytest.mark.parametrize("settings", [{}, {"selector": "flashprefill"}])
def test_the_clock_times_the_operator_at_the_assumed_density(settings, monkeypatch):
    seen, state = [], torch.random.get_rng_state()
    original = torch_backend.attend_blocks

    def attend(query, key, value, index, **options):
        seen.append((tuple(query.shape), tuple(key.shape), index.density(), options["means"] is not None))
        original(query, key, value, index, **options)

    monkeypatch.setattr(torch_backend, "attend_blocks", attend)
    dense, sparse = measure.time_attention(SHAPE, CPU, FlashPrefillConfig(**settings), 4096)
    assert dense > 0
    assert sparse > 0
    assert len(seen) > timing.FEWEST_RUNS
    (query, key, density, has_means) = seen[0]
    assert (query, key, has_means) == ((1, 4, 4096, 32), (1, 2, 4096, 32), settings == {})
    assert density == pytest.approx(0.70, abs=0.02)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_times_that_are_compared_are_taken_in_turns():
    calls = []
    runs = {name: functools.partial(calls.append, name) for name in ("one", "other")}
    times = timing.medians_ms(runs, torch.device("cpu"), seconds=0, least=3)
    assert calls == ["one", "other"] * 4
    assert times.keys() == runs.keys()
    assert all(
        0 <= of["quartile_low_ms"] <= of["median_ms"] <= of["quartile_high_ms"] and of["runs"] == 3 for of in times.values()
    )


def test_densities_between_the_published_ones():
    for length, density in imposed.PUBLISHED_DENSITY.items():
        assert imposed.assumed_density(length) == pytest.approx(density)
    # Half way between 4K and 8K on a scale of ratios.
    assert imposed.assumed_density(round(4096 * 2**0.5)) == pytest.approx((0.70 + 0.46) / 2, abs=1e-4)
    assert [imposed.assumed_density(length) for length in (1, 1024, 1 << 30)] == pytest.approx([1, 1, 0.041])


def test_the_command_prints_every_length_and_keeps_the_answer(capsys, cache, monkeypatch):
    monkeypatch.setattr(command, "time_attention", lambda shape, device, config, length: (4.0, 8.0 if length < 1536 else 2.0))
    arguments = ["--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--device", "cpu"]
    assert command.main([*arguments, "--max-seq-len", "2048"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1024", "1536", "2048"]
    assert lines[1].split()[-1] == "0.50"
    assert json.loads(lines[-1])["tokens"] == 1536
    assert known.known_crossover(known.rule_of(FlashPrefillConfig()), SHAPE, CPU).tokens == 1536


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--kv-heads", "3"], "--kv-heads must divide --heads 4, got 3"),
        (["--heads", "-8"], "--heads must be at least 1, got -8"),
        (["--head-dim", "-4"], "--head-dim must be at least 1, got -4"),
        (["--max-seq-len", "0"], "--max-seq-len must be at least 1024, got 0"),
        (["--device", "nonsense"], "--device nonsense: "),
        (["--device", "meta"], "--device meta: "),
        (["--dtype", "int8"], "argument --dtype: "),
    ],
)
def test_the_command_refuses_in_one_line(wrong, message, capsys, cache):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--device", "cpu", *wrong])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.fixture
def seen(monkeypatch):
    """What every attention layer of a patched model gets and does: (queries, the mask is ours, ran sparse)."""
    calls, decide = [], seam.dense_reason

    def spy(config, module, query, key, value, attention_mask, *rest):
        reason = decide(config, module, query, key, value, attention_mask, *rest)
        calls.append((query.shape[2], isinstance(attention_mask, CausalMask), reason is None))
        return reason

    monkeypatch.setattr(seam, "dense_reason", spy)
    return calls


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@torch.no_grad()
def test_a_patched_model_runs_sparse_from_the_measured_length_on(base, seen):
    known.remember(RULE, SHAPE, CPU, measured(130))
    model = tiny_model(implementation=base)
    mask = padding("left")[:, -130:]
    expected = [model(prompt(length=129)).logits, model(prompt(length=130)).logits]
    expected += [model(prompt(2)[:, :130], attention_mask=mask).logits[mask.bool()]]
    patch_model(model, config=AUTO)
    got = [model(prompt(length=129)).logits, model(prompt(length=130)).logits]
    got += [model(prompt(2)[:, :130], attention_mask=mask).logits[mask.bool()]]
    for ours, theirs in zip(got, expected, strict=True):
        assert_same_output(ours, theirs)
    assert seen == [(129, False, False)] * 2 + [(130, True, True)] * 4
    stats = prefill_stats(model)
    assert (stats.sparse_calls, stats.dense_calls) == (4, {"shorter than min_seq_len": 2})


@torch.no_grad()
def test_a_16_bit_model_asks_for_what_was_measured_in_16_bits():
    known.remember(RULE, SHAPE._replace(dtype=torch.bfloat16), CPU, measured(130))
    model = patch_model(tiny_model().bfloat16(), config=AUTO)
    model(prompt(length=129))
    model(prompt(length=130))
    stats = prefill_stats(model)
    assert (stats.sparse_calls, stats.dense_calls) == (2, {"shorter than min_seq_len": 2})


@torch.no_grad()
def test_where_sparse_never_wins_a_model_stays_dense(seen):
    known.remember(RULE, SHAPE, CPU, measured(None))
    model = tiny_model()
    expected = model(prompt(length=500)).logits
    patch_model(model, config=AUTO)
    assert torch.equal(model(prompt(length=500)).logits, expected)
    assert seen == [(500, False, False)] * 2
    assert prefill_stats(model).dense_calls == {"shorter than min_seq_len": 2}


@torch.no_grad()
def test_nothing_reads_the_file_twice(monkeypatch):
    reads, read = [], known._load
    monkeypatch.setattr(known, "_load", lambda path: reads.append(path) or read(path))
    model = patch_model(tiny_model(), config=AUTO)
    for length in (90, 100, 110):
        model(prompt(length=length))
    patch_model(copy.deepcopy(model), config=AUTO, alpha=0.5)(prompt(length=100))
    assert len(reads) == 1


@torch.no_grad()
def test_layers_decide_by_their_own_shape_where_the_models_config_says_another(seen):
    """As in tensor parallelism, where a layer has its process's heads: what the mask left open, the layers close."""
    known.remember(RULE, SHAPE._replace(heads=2, kv_heads=1), CPU, measured(100))
    assert min_seq_len_of_model(AUTO, tiny_model().config, torch.float32, CPU) == 100
    known.remember(RULE, SHAPE, CPU, measured(200))
    assert min_seq_len_of_model(AUTO, tiny_model().config, torch.float32, CPU) == 100
    model = tiny_model(implementation="eager")
    expected = model(prompt(length=150)).logits
    patch_model(model, config=AUTO)
    assert_same_output(model(prompt(length=150)).logits, expected)
    assert seen == [(150, True, False)] * 2
    assert prefill_stats(model).dense_calls == {"shorter than min_seq_len": 2}


def test_a_model_that_does_not_tell_its_shape_leaves_it_to_the_layers():
    assert min_seq_len_of_model(AUTO, None, torch.float32, CPU) == 0
    assert min_seq_len_of_model(FlashPrefillConfig(min_seq_len=9), None, torch.float32, CPU) == 9


@pytest.mark.skipif(_TAKES_CACHE_POSITION, reason="before transformers 5.4 masks cannot be made in a graph")
@torch.no_grad()
def test_a_graph_takes_the_length_in():
    known.remember(RULE, SHAPE, CPU, measured(130))
    model = patch_model(tiny_model(), config=AUTO)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length in (129, 130, 200):
        assert_same_output(compiled(prompt(length=length)).logits, model(prompt(length=length)).logits)
    stats = prefill_stats(model)
    assert (stats.sparse_calls, stats.dense_calls) == (8, {"shorter than min_seq_len": 4})
    torch.compiler.reset()


IN_A_FRESH_PROCESS = """
import pickle, sys, torch
model = pickle.load(open(sys.argv[1], "rb"))
import hf_flashprefill as fp
assert fp.patched_config(model).min_seq_len == "auto"
with torch.no_grad():
    for length in (129, 130):
        model(torch.arange(length)[None] % 100)
stats = fp.prefill_stats(model)
assert (stats.sparse_calls, stats.dense_calls) == (2, {"shorter than min_seq_len": 2}), stats.to_dict()
"""


def test_a_pickled_model_asks_the_fresh_process(tmp_path):
    known.remember(RULE, SHAPE, CPU, measured(130))
    (tmp_path / "model").write_bytes(pickle.dumps(patch_model(tiny_model(), config=AUTO)))
    # The number of threads is part of what was measured.
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n" + IN_A_FRESH_PROCESS
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=300)
    done = run([sys.executable, "-c", code, str(tmp_path / "model")])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("head_dim", "has_mask", "keeps_groups"), [(64, False, True), (64, True, False), (512, False, False)])
def test_dense_attention_is_timed_as_transformers_runs_it(head_dim, has_mask, keeps_groups, monkeypatch):
    """Torch has no kernel on GPUs for groups of heads with a mask or with wide heads."""
    keys = 100 if has_mask else 50
    query, key, value, _ = Case(1, 4, 2, 50, keys, head_dim).tensors(CPU)
    mask = torch.ones(50, keys, dtype=torch.bool).tril(50)[None, None] if has_mask else None
    sdpa, called = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query, key, value, **options):
        called.append(key.shape[1])
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    attend = measure.unpatched_attention(query, key, value, mask)
    exact = exact_dense(query, key, value, keys - 50, None, head_dim**-0.5)
    torch.testing.assert_close(attend().double(), exact, atol=1e-5, rtol=1e-5)
    assert called == [2 if keeps_groups else 4]
