"""The backend vLLM knows as CUSTOM: FlashAttention with sparse prefill of long rows, for NVIDIA GPUs."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .backend import SparsePrefillBackend, SparsePrefillBuilder, SparsePrefillImpl
from .gather import flash_pages


class FlashPrefillImpl(SparsePrefillImpl, FlashAttentionImpl):
    """vLLM's FlashAttention; long rows go to ``flash_prefill_attention``."""

    pages = staticmethod(flash_pages)


class FlashPrefillMetadataBuilder(SparsePrefillBuilder, FlashAttentionMetadataBuilder):
    """vLLM's FlashAttention metadata with the plan of the batch."""


class FlashPrefillBackend(SparsePrefillBackend, FlashAttentionBackend):
    """FlashAttention with sparse prefill of long rows."""

    @staticmethod
    def get_name() -> str:
        # vLLM looks the name up among its own, and CUSTOM is the one it leaves to plugins.
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashPrefillImpl]:
        return FlashPrefillImpl

    @staticmethod
    def get_builder_cls() -> type[FlashPrefillMetadataBuilder]:
        return FlashPrefillMetadataBuilder
