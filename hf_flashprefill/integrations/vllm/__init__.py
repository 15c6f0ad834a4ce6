"""The out-of-tree vLLM plugin: long prompt rows of a batch prefill sparsely, all others stay on vLLM's own backend.

vLLM calls ``register`` in each of its processes through the entry point ``vllm.general_plugins``. It makes the attention
backend CUSTOM available and changes nothing else; a server that does not ask for ``--attention-backend CUSTOM`` is
untouched. The README's page docs/vllm.md says how to start one.
"""

import logging

BACKEND_PATH = "hf_flashprefill.integrations.vllm.flash.FlashPrefillBackend"
# For vLLM's worker_extension_cls.
STATS_PATH = "hf_flashprefill.integrations.vllm.stats.StatsExtension"

# vLLM's log shows only its own loggers.
logger = logging.getLogger("vllm.plugins.flashprefill")


def register() -> bool:
    """Name our backend as vLLM's CUSTOM attention backend. May be called any number of times; imports no kernels.

    Where this vLLM has no such backend, or it is another plugin's already, a warning says so and nothing is changed.

    Returns:
        Whether CUSTOM is our backend now.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        custom = AttentionBackendEnum.CUSTOM
    except (ImportError, AttributeError) as error:
        logger.warning("No sparse prefill: this vLLM takes no attention backend from plugins (%s)", error)
        return False
    path = custom.get_path() if custom.is_overridden() else BACKEND_PATH
    if path != BACKEND_PATH:
        logger.warning("No sparse prefill: the attention backend CUSTOM is %s already, not %s", path, BACKEND_PATH)
        return False
    register_backend(custom, BACKEND_PATH)
    return True
