"""What happens to a patched model besides being called: copied, pickled, saved, adapted, quantised, moved, interrupted."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_flashprefill import (
    UnsupportedModelError,
    is_patched,
    patch,
    patch_model,
    patched,
    patched_config,
    prefill_stats,
    seam,
    unpatch_model,
    unpatched,
)
from hf_flashprefill.seam import NAME
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import prompt
from tests.inputs import tiny_model
from tests.tolerance import assert_same_output

HARSH = {"alpha": 1.0, "sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(prompt(length=700)).logits


def traces(model) -> list[str]:
    """Everything in the model that mentions us."""
    found = [f"{name}.{key}" for name, module in model.named_modules() for key in vars(module) if NAME in key]
    return found + [key for key, value in vars(model.config).items() if NAME in f"{key} {value}"]


def test_patching_again_changes_nothing_but_the_settings():
    model = tiny_model()
    expected = logits(model)
    for alpha in (0.3, 0.0, 0.0):
        patch_model(model, alpha=alpha, **SETTINGS)
    assert_same_output(logits(model), expected)
    assert prefill_stats(model).sparse_calls == 2
    unpatch_model(model)
    assert traces(model) == []
    assert torch.equal(logits(model), expected)


def test_a_patched_model_given_another_implementation_by_hand_is_unpatched_whole():
    model = tiny_model()
    patch_model(model, alpha=0, **SETTINGS)
    logits(model)
    model.set_attn_implementation("eager")
    assert not is_patched(model)
    assert traces(model) != []
    assert unpatch_model(model).config._attn_implementation == "eager"
    assert traces(model) == []
    assert prefill_stats(model).sparse_calls == 2


def test_two_models_with_different_settings_do_not_touch_each_other():
    exact, harsh, plain = tiny_model(), tiny_model(), tiny_model()
    expected = logits(plain)
    patch_model(exact, alpha=0, **SETTINGS)
    patch_model(harsh, **HARSH, **SETTINGS)
    first = logits(harsh)
    assert_same_output(logits(exact), expected)
    assert torch.equal(logits(harsh), first)
    assert (first - expected).abs().max() > 1e-3
    assert torch.equal(logits(plain), expected)
    assert [prefill_stats(model).sparse_calls for model in (exact, harsh, plain)] == [2, 4, 0]


def test_models_that_share_a_config_object_are_patched_together():
    first = tiny_model()
    second = type(first)(first.config).eval()
    expected = logits(second)
    patch_model(first, alpha=0, **SETTINGS)
    assert is_patched(second)
    assert_same_output(logits(second), expected)
    assert prefill_stats(second).sparse_calls == 2
    assert prefill_stats(first).sparse_calls == 0
    unpatch_model(second)
    assert not is_patched(first)
    assert torch.equal(logits(second), expected)


def test_deep_copies_keep_settings_weights_of_their_own_and_statistics_of_their_own():
    model = patch_model(tiny_model(), alpha=0, **SETTINGS)
    before = logits(model)
    twin = copy.deepcopy(model)
    assert prefill_stats(twin).layers == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), before)
    assert prefill_stats(twin).sparse_calls == 2
    unpatch_model(model)
    assert is_patched(twin)


IN_A_FRESH_PROCESS = """
import pickle, sys, torch
model = pickle.load(open(sys.argv[1], "rb"))
ids = torch.load(sys.argv[2])
import hf_flashprefill as fp
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[3])
stats = fp.prefill_stats(model)
assert (stats.sparse_calls, stats.dense_calls) == (2, {}), stats.to_dict()
assert fp.patched_config(model).alpha == 1.0
fp.unpatch_model(model)
assert model.config._attn_implementation == "eager"
"""


def test_a_pickled_model_is_patched_in_a_fresh_process(tmp_path):
    model = patch_model(tiny_model(implementation="eager"), **HARSH, **SETTINGS)
    expected = logits(model)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    torch.save(prompt(length=700), tmp_path / "ids")
    files = [str(tmp_path / name) for name in ("model", "ids", "logits")]
    done = subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_output(torch.load(files[2]), expected)


def test_an_unpatched_model_pickles_without_us():
    model = unpatch_model(patch_model(tiny_model(), alpha=0))
    assert NAME.encode() not in pickle.dumps(model)


def test_saved_models_and_configs_know_nothing_of_us(tmp_path):
    model = patch_model(tiny_model(), alpha=0, **SETTINGS)
    model.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "config")
    written = [path for path in tmp_path.glob("*/*.json") if NAME in path.read_text(encoding="utf-8")]
    assert written == []
    assert not any(NAME in key for key in model.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not is_patched(loaded)
    assert_same_output(logits(loaded), logits(model))


def lora():
    peft = pytest.importorskip("peft")
    return peft, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.mark.parametrize("order", ["patched first", "adapted first"])
def test_adapters_before_after_swapped_and_merged(order):
    peft, config = lora()
    model = tiny_model()
    if order == "patched first":
        patch_model(model, alpha=0, **SETTINGS)
    adapted = peft.get_peft_model(model, config)
    adapted.add_adapter("other", config)
    if order == "adapted first":
        patch_model(adapted, alpha=0, **SETTINGS)
    answers = {}
    for adapter in ("default", "other", "default"):
        adapted.set_adapter(adapter)
        with unpatched(adapted):
            answers[adapter] = logits(adapted)
        assert_same_output(logits(adapted), answers[adapter])
    assert (answers["default"] - answers["other"]).abs().max() > 1e-3
    assert (prefill_stats(adapted).sparse_calls, prefill_stats(adapted).dense_calls) == (6, {})
    merged = adapted.merge_and_unload()
    assert is_patched(merged)
    assert_same_output(logits(merged), answers["default"])
    assert prefill_stats(merged).sparse_calls == 8
    assert traces(unpatch_model(merged)) == []


def test_prefix_tuning_keeps_its_virtual_tokens():
    peft, _ = lora()
    model = peft.get_peft_model(tiny_model(), peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    expected = logits(model)
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(logits(model), expected)
    stats = prefill_stats(model)
    assert stats.sparse_calls + sum(stats.dense_calls.values()) == 2


def test_quantised_linears_are_none_of_our_business():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = logits(model)
    patch_model(model, alpha=0, **SETTINGS)
    assert_same_output(logits(model), expected)
    assert prefill_stats(model).sparse_calls == 2


@torch.no_grad()
def test_patching_in_one_thread_leaves_another_threads_model_alone():
    busy, other = tiny_model(), tiny_model()
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    ids = prompt(length=300)
    expected = busy.generate(ids, **options)
    stop, errors = threading.Event(), []

    def keep_patching():
        alpha = 0.0
        try:
            while not stop.is_set():
                alpha = (alpha + 0.001) % 1
                with patched(other, alpha=alpha, **SETTINGS):
                    other(prompt(length=100))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=keep_patching)
    thread.start()
    try:
        for _ in range(3):
            assert torch.equal(busy.generate(ids, **options), expected)
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert not is_patched(busy)
    assert not is_patched(other)


def test_ctrl_c_restores():
    model = tiny_model(implementation="eager")

    def interrupted():
        with patched(model, alpha=0.5):
            assert is_patched(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config._attn_implementation == "eager"
    assert traces(model) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("victim", ["set_attn_implementation", "attach_record", "reset_prefill_stats"])
@pytest.mark.parametrize("was_patched", [False, True])
def test_an_exception_in_the_middle_of_patching_leaves_nothing_half_done(error, victim, was_patched, monkeypatch):
    model = tiny_model()
    if was_patched:
        patch_model(model, alpha=0.5, **SETTINGS)
        logits(model)
    before, counted = patched_config(model), prefill_stats(model)
    owner = next(place for place in (type(model), patch, seam) if hasattr(place, victim))
    original, calls = getattr(owner, victim), []

    def fails_at_first(*args, **kwargs):
        calls.append(args)
        original(*args, **kwargs)
        if len(calls) == 1:
            raise error("in the middle")

    monkeypatch.setattr(owner, victim, fails_at_first)
    with pytest.raises(error, match="in the middle"):
        patch_model(model, alpha=0, **SETTINGS)
    assert calls
    assert patched_config(model) == before
    assert prefill_stats(model) == counted
    assert bool(traces(model)) == was_patched


def test_a_refused_model_keeps_its_settings():
    model = patch_model(tiny_model(), alpha=0.5)
    with pytest.raises(ValueError, match="dense_layers"):
        patch_model(model, alpha=0.1, dense_layers=[7])
    assert patched_config(model).alpha == 0.5


def test_encoder_decoders_are_refused():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 99}
    heads = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads))
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match="BartForConditionalGeneration"):
        patch_model(model)
    assert model.config._attn_implementation == before
