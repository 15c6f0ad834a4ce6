"""Tiny random models of the families that the support matrix covers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# Even, so that two processes can split it.
VOCABULARY = 200
WINDOW = 64

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MOE = {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_HALF_WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}

# What each family needs beyond _COMMON. Windows are shorter than the situations' prompts where the family is known for
# them (mistral in all layers; gemma2, gemma3, gemma4, cohere2, gpt_oss in half of them; llama4 has chunks instead), longer in
# phi3.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "llama4": {
        "head_dim": 32,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "qwen2": {},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3": {"head_dim": 32},
    "qwen3_moe": _MOE,
    "qwen3_next": _MOE
    | {
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mistral": {"head_dim": 32, "sliding_window": WINDOW},
    "ministral3": {"head_dim": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32} | _HALF_WINDOWED,
    "gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32} | _HALF_WINDOWED,
    # Its last two layers share the keys of the first two, and see only the queries whose logits are kept.
    "gemma4": {
        "head_dim": 32,
        "global_head_dim": 64,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
    },
    "phi3": {"sliding_window": 262144},
    "glm4": {"head_dim": 32},
    "olmo2": {},
    "cohere2": {"head_dim": 32} | _HALF_WINDOWED,
    "granite": {},
    "smollm3": {},
    "gpt_oss": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2} | _HALF_WINDOWED,
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "qwen2_5_vl": {"rope_scaling": _MROPE, "rope_parameters": _MROPE},
}
_MODEL_TYPES = {"llama4": "llama4_text", "gemma3": "gemma3_text", "gemma4": "gemma4_text"}
_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}


def tiny_model(family: str = "llama", implementation: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """A random model of two layers, or as few as the family needs, in float32, the same at every call.

    Args:
        family: A key of ``FAMILIES``, or any model type that AutoConfig knows.
        implementation: The attention implementation to load it with.
        **overrides: Fields of its config.

    Raises:
        ValueError: The installed transformers does not know the family or refuses the implementation for it.
    """
    settings = _COMMON | FAMILIES.get(family, {}) | overrides
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "qwen2_5_vl":
            config = transformers.Qwen2_5_VLConfig(text_config=settings, vision_config=_VISION)
            config._attn_implementation = implementation
            return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
        config = AutoConfig.for_model(_MODEL_TYPES.get(family, family), **settings)
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
