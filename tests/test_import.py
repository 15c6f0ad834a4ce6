"""What ``import hf_flashprefill`` needs and changes, seen from a fresh interpreter."""

import subprocess
import sys

PURE = """
import transformers, transformers.masking_utils as masking
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping), dict(masking.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping)
import hf_flashprefill
after = dict(ALL_ATTENTION_FUNCTIONS._global_mapping), dict(masking.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping)
assert before == after
"""

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, hf_flashprefill as fp
query = torch.randn(1, 2, 200, 64)
fp.flash_prefill_attention(query, query, query)
try:
    fp.flash_prefill_attention(query, query, query, config=fp.FlashPrefillConfig(backend="triton"))
except ValueError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("the triton backend ran without triton")
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_import_registers_nothing():
    run(PURE)


def test_works_without_triton():
    run(WITHOUT_TRITON)
