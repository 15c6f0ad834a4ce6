"""Models spread over two GPUs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_flashprefill import patched, prefill_stats
from hf_flashprefill.backends import triton as triton_backend
from tests.tensor_parallel import check_split

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

LAYERS, TOKENS = 4, 3000


@pytest.fixture
def folder(tmp_path):
    """Of a small model with the shapes that the kernels for Hopper take."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": LAYERS, "vocab_size": 300}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=2 * TOKENS)).bfloat16().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("side", [None, "left"])
@torch.no_grad()
def test_layers_on_two_gpus_answer_as_on_one(folder, side, monkeypatch):
    """The same bits, whichever GPU is the current one; each layer's kernels run where its tensors are."""
    devices = []
    attend = triton_backend.attend_blocks

    def counted(query, *args, **kwargs):
        devices.append(query.device.index)
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(triton_backend, "attend_blocks", counted)
    parts = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    spread = parts | {f"model.layers.{layer}": 2 * layer // LAYERS for layer in range(LAYERS)}
    ids = torch.randint(3, 300, (2, TOKENS))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[1, : TOKENS // 3] = 0
    found = []
    for device_map in ({"": 0}, spread, {"": 1}):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).eval()
        first = model.get_input_embeddings().weight.device
        call = {"attention_mask": mask.to(first)}
        devices.clear()
        with patched(model, alpha=0.05, min_seq_len=256, dense_tail_blocks=0):
            logits = model(ids.to(first), **call).logits
            stats = prefill_stats(model)
            tokens = model.generate(ids.to(first), max_new_tokens=4, do_sample=False, pad_token_id=0, **call)
        assert [layer.sparse_calls for layer in stats.layers] == [1] * LAYERS
        assert 0 < stats.density < 0.9
        found.append((logits[mask.bool()].cpu(), tokens.cpu(), list(devices)))
    assert [places for _, _, places in found] == [[0] * 2 * LAYERS, [0, 0, 1, 1] * 2, [1] * 2 * LAYERS]
    assert found[0][0].isfinite().all()
    for logits, tokens, _ in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert torch.equal(tokens, found[0][1])


def test_tensor_parallel_over_two_gpus(tmp_path):
    check_split(tmp_path, "cuda", 1e-4)
