"""Any-device backend in plain torch that does the work of the kept blocks only."""

from .attend import attend_blocks
from .means import run_means
from .select import pool_keys, pool_keys_and_blocks, select_blocks

__all__ = ["attend_blocks", "pool_keys", "pool_keys_and_blocks", "run_means", "select_blocks"]
