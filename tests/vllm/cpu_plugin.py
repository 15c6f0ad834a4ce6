"""The plugin's mixins around vLLM's CPU backend, so that its logic runs inside a real engine without a GPU.

vLLM's CPU platform takes no CUSTOM backend, so this one stands in for CPU_ATTN. The engines under test load it as users'
engines load ours, through an entry point.
"""

from __future__ import annotations

from hf_flashprefill.integrations.vllm.gather import cpu_pages

PATH = f"{__name__}.CpuFlashPrefillBackend"


def register() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, PATH)
    _forget_choice()


def unregister() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    AttentionBackendEnum.CPU_ATTN.clear_override()
    _forget_choice()


def _forget_choice() -> None:
    # vLLM looks a backend up once per process; the tests run engines with ours and without in one.
    from vllm.v1.attention.selector import _cached_get_attn_backend

    _cached_get_attn_backend.cache_clear()


def __getattr__(name: str):
    # The classes need vLLM's, which takes seconds to import and may be absent.
    if name != "CpuFlashPrefillBackend":
        raise AttributeError(name)
    from vllm.v1.attention.backends.cpu_attn import (
        CPUAttentionBackend,
        CPUAttentionBackendImpl,
        CPUAttentionMetadataBuilder,
    )

    from hf_flashprefill.integrations.vllm.backend import SparsePrefillBackend, SparsePrefillBuilder, SparsePrefillImpl

    class CpuImpl(SparsePrefillImpl, CPUAttentionBackendImpl):
        pages = staticmethod(cpu_pages)

    class CpuBuilder(SparsePrefillBuilder, CPUAttentionMetadataBuilder):
        pass

    class CpuFlashPrefillBackend(SparsePrefillBackend, CPUAttentionBackend):
        @staticmethod
        def get_impl_cls():
            return CpuImpl

        @staticmethod
        def get_builder_cls():
            return CpuBuilder

    globals()[name] = CpuFlashPrefillBackend
    return CpuFlashPrefillBackend
