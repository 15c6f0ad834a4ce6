"""The out-of-tree vLLM plugin: long prompt rows of a batch prefill sparsely, all others stay on vLLM's own backend.

vLLM calls ``register`` in each of its processes through the entry point ``vllm.general_plugins``. It makes the attention
backend CUSTOM available and changes nothing else; a server that does not ask for ``--attention-backend CUSTOM`` is
untouched. The README's page docs/vllm.md says how to start one.
"""

BACKEND_PATH = "hf_flashprefill.integrations.vllm.flash.FlashPrefillBackend"
# For vLLM's worker_extension_cls.
STATS_PATH = "hf_flashprefill.integrations.vllm.stats.StatsExtension"


def register() -> None:
    """Name our backend as vLLM's CUSTOM attention backend. May be called any number of times; imports no kernels."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
