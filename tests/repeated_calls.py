"""The same calls again and again, to be run by several processes at once: python -m tests.repeated_calls 8

Prints a JSON line per call: how long its lists are, how often it ran in so many seconds, and how often its bits were not those
of the first run.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention
from tests.inputs import Case

# Lists in full, short ones, and those of the own block alone, whose turns are the shortest; float16, which has no second pass
# that could make good for wrong numbers, and bfloat16; rows that end early, whose turns are passed over.
CALLS = [
    (Case(1, 32, 4, 6000, 19_000, 128, dtype=torch.float16), "blend", 0.0),
    (Case(1, 32, 4, 6000, 19_000, 128, dtype=torch.bfloat16), "blend", 0.1),
    (Case(1, 16, 2, 6000, 19_000, 64, dtype=torch.float16), "blend", 0.1),
    (Case(1, 8, 2, 3000, 9000, 256, dtype=torch.float16), "blend", 0.1),
    (Case(1, 16, 2, 9000, 9000, 64, dtype=torch.bfloat16), "share", 1.0),
    (Case(1, 28, 4, 9000, 9000, 128, dtype=torch.bfloat16), "share", 1.0),
    (Case(1, 16, 2, 9000, 9000, 256, dtype=torch.bfloat16), "share", 1.0),
    (Case(3, 16, 2, 9000, 9000, 128, dtype=torch.bfloat16, ranges=((0, 9000), (7000, 9000), (4000, 4000))), "share", 1.0),
    (Case(1, 32, 4, 6000, 19_000, 128, dtype=torch.bfloat16), "flashprefill", 0.1),
    (Case(1, 16, 2, 6000, 19_000, 64, dtype=torch.bfloat16), "flashprefill", 0.1),
]


def main(seconds: float) -> None:
    for case, selector, alpha in CALLS:
        torch.manual_seed(0)
        query, key, value, ranges = case.tensors(torch.device("cuda"))
        forced = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}
        config = FlashPrefillConfig(alpha, selector, backend="triton", **forced)
        first, index = flash_prefill_attention(query, key, value, config=config, valid_ranges=ranges, return_index=True)
        listed = index.counts[index.counts > 0].float().mean().item()
        runs = changed = 0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            again = flash_prefill_attention(query, key, value, config=config, valid_ranges=ranges)
            runs += 1
            changed += not torch.equal(again, first)
        row = {"case": str(case), "selector": selector, "blocks_a_list": listed, "runs": runs, "changed": changed}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
