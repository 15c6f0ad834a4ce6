"""Any-device backend in plain torch that does the work of the kept blocks only."""

from .attend import attend_blocks, new_output
from .means import run_means
from .select import pool_keys, pool_keys_and_values, pooled_together, select_blocks, tokens_per_row

__all__ = [
    "attend_blocks",
    "new_output",
    "pool_keys",
    "pool_keys_and_values",
    "pooled_together",
    "run_means",
    "select_blocks",
    "tokens_per_row",
]
