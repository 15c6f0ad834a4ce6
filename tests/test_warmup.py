"""warmup: which kernels it calls, what it measures, and that it leaves no trace on the model."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_flashprefill import FlashPrefillConfig, patch_model, patched_config, prefill_stats, warming, warmup
from hf_flashprefill.crossover import Crossover, LayerShape, known, measure
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import prompt
from tests.inputs import tiny_model

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SHAPE = LayerShape(4, 2, 32, torch.float32)  # of tiny_model()


@pytest.fixture(autouse=True)
def timed(tmp_path, monkeypatch):
    """An empty cache and a clock by which sparse is twice as fast from 3072 tokens on; the (shape, length) it was asked for."""
    asked = []

    def time_attention(shape, device, config, length):
        asked.append((shape, length))
        return 2.0, 1.0 if length >= 3072 else 4.0

    monkeypatch.setenv("HF_FLASHPREFILL_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "time_attention", time_attention)
    known.reload()
    yield asked
    known.reload()


@pytest.fixture
def operator_calls(monkeypatch):
    """Shapes of query and key, whether there is padding, the window and the sinks of every call of the operator."""
    calls, operator = [], warming.flash_prefill_attention

    def spy(query, key, value, *, valid_ranges, sliding_window, sinks, **rest):
        calls.append(
            (tuple(query.shape), tuple(key.shape), valid_ranges is not None, sliding_window, sinks is not None, query.dtype)
        )
        options = {"valid_ranges": valid_ranges, "sliding_window": sliding_window, "sinks": sinks}
        return operator(query, key, value, **options, **rest)

    monkeypatch.setattr(warming, "flash_prefill_attention", spy)
    return calls


def test_every_situation_is_run_once_for_layers_of_one_kind(operator_calls, timed):
    report = warmup(patch_model(tiny_model(), alpha=0, **SETTINGS))
    whole, cached = (1, 2, 257, 32), (1, 2, 514, 32)
    expected = [(whole, False), (whole, True), (cached, False), (cached, True)]
    assert operator_calls == [((1, 4, 257, 32), key, padded, None, False, torch.float32) for key, padded in expected]
    (layer,) = report.layers
    assert list(layer.first_call_s) == list(warming._situations(64))
    assert all(seconds > 0 for seconds in layer.first_call_s.values())
    assert (layer.min_seq_len, layer.crossover) == (32, "given")
    assert timed == []
    assert "heads 4, kv_heads 2, head_dim 32, float32, cpu" in str(report)
    assert "sparse from 32 tokens (given)" in str(report)


def test_the_crossover_is_measured_once_and_kept(timed, tmp_path):
    model = patch_model(tiny_model())
    assert known.min_seq_len_for(patched_config(model), SHAPE, CPU) == 8192
    assert [(layer.min_seq_len, layer.crossover) for layer in warmup(model).layers] == [(3072, "measured")]
    assert timed == [(SHAPE, length) for length in (1024, 1536, 2048, 3072, 4096, 6144)]
    assert (tmp_path / "crossover.json").exists()
    known.reload()
    assert [(layer.min_seq_len, layer.crossover) for layer in warmup(model).layers] == [(3072, "known")]
    assert len(timed) == 6
    assert known.min_seq_len_for(patched_config(model), SHAPE, CPU) == 3072


def test_nothing_is_measured_unasked_or_beyond_the_longest_prompt(timed, tmp_path):
    model = patch_model(tiny_model())
    assert warmup(model, probe=False).layers[0].crossover == "table"
    assert warmup(model, 700).layers[0].crossover == "table"
    assert timed == []
    (layer,) = warmup(model, 2047).layers
    assert ([length for _, length in timed], layer.min_seq_len, layer.crossover) == ([1024, 1536], 8192, "measured")
    assert warmup(model, 1600).layers[0].crossover == "known"
    assert warmup(model, 8192, probe=False).layers[0].crossover == "known"
    assert len(timed) == 2
    # A longer prompt is to come than was looked at.
    (layer,) = warmup(model, 8192).layers
    assert (layer.min_seq_len, layer.crossover) == (3072, "measured")
    patch_model(model, backend="reference")
    assert warmup(model, probe=True).layers[0].crossover == "table"


@torch.no_grad()
def test_the_model_its_statistics_and_random_numbers_stay_as_they_are():
    model = patch_model(tiny_model(), alpha=0.3, **SETTINGS)
    model(prompt())
    weights, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    before, attributes = prefill_stats(model), [sorted(vars(module)) for module in model.modules()]
    config, expected = patched_config(model), model.config.to_dict()
    warmup(model)
    patch_model(model, config=FlashPrefillConfig(alpha=0.3, **SETTINGS | {"min_seq_len": "auto"}))
    assert prefill_stats(model).layers == []
    model(prompt())
    warmup(model)
    assert prefill_stats(model).dense_calls == {"shorter than min_seq_len": 2}
    patch_model(model, config=config)
    model(prompt())
    assert prefill_stats(model) == before
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert model.config.to_dict() == expected
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "base", "kinds"),
    [
        ("gemma3", "sdpa", [(SHAPE, 64, False), (SHAPE, None, False)]),
        ("gpt_oss", "eager", [(SHAPE, 64, True), (SHAPE, None, True)]),
        # Values narrower than keys stay dense.
        ("deepseek_v3", "sdpa", []),
        # One projection for all three; the config has the window, which only longer prompts are cut by.
        ("phi3", "sdpa", [(SHAPE._replace(head_dim=16), None, False), (SHAPE._replace(head_dim=16), 513, False)]),
        ("mistral", "sdpa", [(SHAPE, None, False), (SHAPE, 64, False)]),
        # Its layers call it head_size.
        ("gpt_neox", "sdpa", [(LayerShape(4, 4, 16, torch.float32), None, False)]),
        ("gemma4", "sdpa", [(SHAPE, 64, False), (SHAPE._replace(head_dim=64), None, False)]),
        # One layer of two is linear attention.
        ("qwen3_next", "sdpa", [(SHAPE, None, False)]),
        ("qwen2_5_vl", "sdpa", [(SHAPE._replace(head_dim=16), None, False)]),
    ],
)
def test_each_kind_of_layer_is_met(family, base, kinds, operator_calls):
    try:
        model = tiny_model(family, base)
    except (ValueError, AttributeError) as error:
        pytest.skip(f"{family}: {error}")
    report = warmup(patch_model(model, **SETTINGS))
    assert len(report.layers) == len(kinds)
    assert len(operator_calls) == 4 * len(kinds)
    for number, (shape, window, has_sinks) in enumerate(kinds):
        # Of a chunk after a cache, which has the most keys.
        query, key, _, sliding_window, sinks, dtype = operator_calls[4 * number + 2]
        assert LayerShape(query[1], key[1], query[3], dtype) == shape
        assert (sliding_window, sinks) == (window, has_sinks)


def test_layers_of_another_dtype_and_dense_ones(operator_calls):
    model = tiny_model().to(torch.bfloat16)
    warmup(patch_model(model, **SETTINGS))
    assert {call[-1] for call in operator_calls} == {torch.bfloat16}
    assert warmup(patch_model(model, dense_layers=[0, 1], **SETTINGS)).layers == []


def test_layers_whose_first_weights_are_quantised():
    model = tiny_model()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(layer.self_attn, name)
            projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    (layer,) = warmup(patch_model(model, **SETTINGS)).layers
    assert "float32" in layer.kind


def test_a_model_on_disk_warms_up_where_it_computes(tmp_path, operator_calls):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    accelerate.disk_offload(model, str(tmp_path / "weights"), execution_device=CPU)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert len(warmup(patch_model(model, **SETTINGS)).layers) == 1
    assert len(operator_calls) == 4


def test_a_process_of_several_has_its_share_of_the_heads(operator_calls, monkeypatch):
    model = patch_model(tiny_model(), **SETTINGS)
    monkeypatch.setattr(model, "_tp_size", 2)
    warmup(model)
    assert {(query[1], key[1]) for query, key, *_ in operator_calls} == {(2, 1)}


def test_refusals_name_what_is_wrong():
    model = tiny_model()
    with pytest.raises(ValueError, match="model must be patched.*LlamaForCausalLM"):
        warmup(model)
    patch_model(model)
    for wrong in (0, -1, True, 2.5, "8192"):
        with pytest.raises(ValueError, match="max_seq_len must be a whole number >= 1"):
            warmup(model, wrong)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        warmup(torch.nn.Linear(2, 2))


def test_an_interrupted_probe_can_be_repeated(timed, monkeypatch):
    model = patch_model(tiny_model())
    with monkeypatch.context() as interrupted:
        interrupted.setattr(measure, "time_attention", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            warmup(model)
    assert known.known_crossover(known.rule_of(patched_config(model)), SHAPE, CPU) is None
    assert warmup(model).layers[0].crossover == "measured"
    assert known.known_crossover(known.rule_of(patched_config(model)), SHAPE, CPU) == Crossover(
        3072, 6144, True, [[length, 2.0, 1.0 if length >= 3072 else 4.0] for _, length in timed]
    )


def test_no_prompt_compiles_what_warmup_has_not():
    """By the keys under which Triton keeps compiled kernels; every length, batch and layout of a prompt must find its own."""
    # A process of its own: here, kernels may belong to the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.specialisations"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["selector"], row["head_dim"]) for row in found] == [
        ("blend", 80),
        ("blend", 128),
        ("share", 64),
        ("flashprefill", 128),
    ]
    for row in found:
        assert row["missed"] == [], row
        # Each with padding and without: pool, score, list and attend; for 16-bit tensors of their head dims, Hopper's kernels
        # that score and attend. With padding the zeros. Without correction no more. Else the longest queries, with padding and
        # without, the means of runs and their weights, which Hopper's attention asks for with its counter, and the lists of the
        # tiles of Hopper's probe.
        has_hopper = row["head_dim"] == 128
        expected = 13 if has_hopper else 9
        if row["selector"] != "flashprefill":
            expected += 7 if has_hopper else 4
        assert row["warmed"] == row["met"] == expected, row
