"""One of two gloo processes of tests/test_devices.py: a model split over them, patched and unpatched.

``python -m torch.distributed.run --nproc-per-node 2 tests/tensor_parallel.py FOLDER`` loads the model in FOLDER, and the
first process prints what it saw as JSON.
"""

import json
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hf_flashprefill import patched, prefill_stats
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import padding, prompt

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@torch.no_grad()
def main(folder: str) -> None:
    torch.set_num_threads(1)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    split = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    heads = split.model.layers[0].self_attn.q_proj.weight
    ids, mask = prompt(2), padding("left")
    expected = whole(ids, attention_mask=mask).logits[mask.bool()]
    unpatched_error = (split(ids, attention_mask=mask).logits[mask.bool()] - expected).abs().max().item()
    with patched(split, alpha=0, **SETTINGS):
        error = (split(ids, attention_mask=mask).logits[mask.bool()] - expected).abs().max().item()
        stats = prefill_stats(split)
        tokens = split.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    same_tokens = torch.equal(
        tokens, whole.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    )
    if dist.get_rank() == 0:
        seen = {
            "processes": dist.get_world_size(),
            "local_rows": (heads.to_local() if hasattr(heads, "to_local") else heads).shape[0],
            "local_heads": [len(layer.head_density) for layer in stats.layers],
            "sparse_calls": stats.sparse_calls,
            "dense_calls": stats.dense_calls,
            "unpatched_error": unpatched_error,
            "error": error,
            "same_tokens": same_tokens,
        }
        print(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
