"""A model split over two processes, patched and unpatched, on the CPU or a GPU each.

``python -m torch.distributed.run --nproc-per-node 2 tests/tensor_parallel.py FOLDER cpu`` loads the model in FOLDER, and the
first process prints what it saw as JSON. ``see_split`` runs that.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hf_flashprefill import patched, prefill_stats
from hf_flashprefill.support.families import tiny_model
from hf_flashprefill.support.matrix import SETTINGS
from hf_flashprefill.support.situations import padding, prompt

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def see_split(folder: Path, device: str) -> dict:
    """What the first of two processes on ``device`` "cpu" or "cuda" saw of the model in ``folder``."""
    script = Path(__file__)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent.parent)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(script), str(folder), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def check_split(folder: Path, device: str, tolerance: float) -> None:
    """A tiny model split over two processes gives the whole one's logits, to ``tolerance``, and its tokens, patched or not."""
    tiny_model().save_pretrained(folder)
    seen = see_split(folder, device)
    # 4 query heads of 32: each process has 2 of them, and selects for these alone.
    assert (seen["processes"], seen["device"], seen["local_rows"], seen["local_heads"]) == (2, device, 64, [2, 2])
    assert (seen["sparse_calls"], seen["dense_calls"]) == (2, {})
    assert max(seen["error"], seen["unpatched_error"]) < tolerance
    assert seen["same_tokens"]


@torch.no_grad()
def main(folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    whole = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    split = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    heads = split.model.layers[0].self_attn.q_proj.weight
    ids, mask = prompt(2).to(device), padding("left").to(device)
    expected = whole(ids, attention_mask=mask).logits[mask.bool()]
    unpatched_error = (split(ids, attention_mask=mask).logits[mask.bool()] - expected).abs().max().item()
    with patched(split, alpha=0, **SETTINGS):
        error = (split(ids, attention_mask=mask).logits[mask.bool()] - expected).abs().max().item()
        stats = prefill_stats(split)
        tokens = split.generate(ids, attention_mask=mask, **GREEDY)
    same_tokens = torch.equal(tokens, whole.generate(ids, attention_mask=mask, **GREEDY))
    if dist.get_rank() == 0:
        seen = {
            "processes": dist.get_world_size(),
            "device": heads.device.type,
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
    main(*sys.argv[1:])
