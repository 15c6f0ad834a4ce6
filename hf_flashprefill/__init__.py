"""Sparse prefill for Hugging Face transformers. Importing this registers nothing and changes nothing."""

from .block_index import BlockIndex
from .calibration import Calibration, LayerCalibration, calibrate
from .config import FlashPrefillConfig
from .fitting import UnsupportedModelError
from .functional import PrefillOutput, flash_prefill_attention
from .kept_pools import KeptPools
from .patch import (
    is_patched,
    patch_model,
    patched,
    patched_config,
    register_attention,
    unpatch_model,
    unpatched,
)
from .stats import LayerStats, PrefillStats, prefill_stats, reset_prefill_stats
from .warming import LayerWarmup, WarmupReport, warmup

__version__ = "0.1.0"

__all__ = [
    "BlockIndex",
    "Calibration",
    "FlashPrefillConfig",
    "KeptPools",
    "LayerCalibration",
    "LayerStats",
    "LayerWarmup",
    "PrefillOutput",
    "PrefillStats",
    "UnsupportedModelError",
    "WarmupReport",
    "calibrate",
    "flash_prefill_attention",
    "is_patched",
    "patch_model",
    "patched",
    "patched_config",
    "prefill_stats",
    "register_attention",
    "reset_prefill_stats",
    "unpatch_model",
    "unpatched",
    "warmup",
]
