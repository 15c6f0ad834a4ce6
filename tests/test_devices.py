"""Models spread over devices and processes, as far as a CPU can show it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_flashprefill import patch_model, prefill_stats, unpatch_model
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import SITUATIONS, padding, prompt
from tests.inputs import tiny_model
from tests.tensor_parallel import check_split
from tests.tolerance import assert_same_output

accelerate = pytest.importorskip("accelerate")


def dispatched(tmp_path, how: str):
    """A tiny model under accelerate's hooks."""
    model = tiny_model()
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk_offload":
        return accelerate.disk_offload(model, tmp_path / "offloaded", execution_device=torch.device("cpu"))
    model.save_pretrained(tmp_path / "model")
    parts = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    options = {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).eval()


@pytest.mark.parametrize("how", ["patched, then cpu_offload", "cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("name", ["left_padded", "static_cache_chunks", "generate"])
@torch.no_grad()
def test_accelerate_hooks(name, how, tmp_path):
    def check():
        for ours, theirs in zip(situation.run(model), expected, strict=True):
            assert_same_output(ours, theirs)

    situation = SITUATIONS[name]
    expected = situation.run(tiny_model())
    if how == "patched, then cpu_offload":
        model = patch_model(tiny_model(), alpha=0, **SETTINGS)
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model = patch_model(dispatched(tmp_path, how), alpha=0, **SETTINGS)
    hooked = [module for module in model.modules() if hasattr(module, "_hf_hook")]
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    check()
    assert [layer.sparse_calls > 0 for layer in prefill_stats(model).layers] == [True, True]
    unpatch_model(model)
    assert hooked == [module for module in model.modules() if hasattr(module, "_hf_hook")]
    check()


@pytest.mark.parametrize("window", [None, 64])
@torch.no_grad()
def test_a_mask_that_moves_between_devices_is_still_known(window):
    """accelerate sends every tensor argument to the layer's device; "meta" stands for a second one."""
    from accelerate.utils import send_to_device
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    from hf_flashprefill import FlashPrefillConfig
    from hf_flashprefill.causal_mask import CausalMask
    from hf_flashprefill.masking import prefill_mask

    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    for attention_mask in (None, padding("left").bool()):
        length = prompt().shape[1]
        call = {"batch_size": 2, "kv_length": length, "kv_offset": 0, "mask_function": function, "local_size": window}
        positions = {"q_length": length, "q_offset": 0, "device": torch.device("cpu")}
        mask = prefill_mask("sdpa", FlashPrefillConfig(min_seq_len=32), attention_mask=attention_mask, **call, **positions)
        moved = send_to_device(mask, torch.device("meta"))
        assert isinstance(moved, CausalMask)
        # Whatever is made of a mask with a window must not pass for one without.
        copies = (mask, moved, mask.clone(), mask[:1], mask.contiguous(), mask.repeat_interleave(2, 0))
        assert {type(copy).sliding_window for copy in copies} == {window}
        assert moved.shape == (2, length)
        assert (moved.padding() is None) == (attention_mask is None)
        # The model asks again for what generate() made before, with the same arguments.
        assert prefill_mask("sdpa", FlashPrefillConfig(), attention_mask=mask, **call, **positions) is mask


def test_tensor_parallel_over_two_processes(tmp_path):
    check_split(tmp_path, "cpu", 2e-5)
