"""Tiny checkpoints of every family, written by transformers' own classes.

One entry a family; the parametrised tests then run by themselves. Norm weights and biases are
random too, so that a swapped or forgotten one shows.
"""

from pathlib import Path
from typing import Any

# head_dim * heads differs from hidden_size where the family allows it; the vocabulary is odd, so
# that tensor parallelism has to pad it.
_COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 32,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}

TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3_tied": {
        "model_type": "llama",
        "rope_parameters": _LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {
        "model_type": "mixtral",
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek_v3": {**_LATENT, "model_type": "deepseek_v3"},
    "deepseek_v3_groups": {
        **_LATENT,
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "rope_parameters": _YARN,
    },
    "deepseek_v2": {
        **_LATENT,
        "model_type": "deepseek_v2",
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "routed_scaling_factor": 4.0,
    },
    "glm4": {"model_type": "glm4", "head_dim": 32, "attention_bias": True, "pad_token_id": None},
    "glm4_moe": {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "use_qk_norm": True,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
    },
    "gpt_oss_moe": {
        "model_type": "gpt_oss",
        "head_dim": 32,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3_next_moe": {
        "model_type": "qwen3_next",
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "norm_topk_prob": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", "pad_token_id": None},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 256,
        "tie_word_embeddings": True,
    },
    "qwen3_moe_mixed": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
}
# Plain tables, for tests that write down themselves what lies where.
LLAMA_LIKE = (
    "llama",
    "llama3_tied",
    "mistral",
    "qwen2",
    "qwen2_tied",
    "qwen3",
    "qwen3_tied",
    "qwen3_moe",
    "qwen3_moe_mixed",
)
# One of each kind of table: for tests that take long.
DISTINCT = (
    "llama3_tied",
    "qwen2",
    "qwen3_moe_mixed",
    "deepseek_v3_groups",
    "glm4",
    "qwen3_next_moe",
)
# Names with experts; a family may have experts whatever its name says.
MOE = tuple(name for name in TINY if any("experts" in key for key in TINY[name]))
DENSE = tuple(name for name in TINY if name not in MOE)
# In which the last kind of layer comes late.
_NEEDS_MORE_THAN_TWO_LAYERS = ("gemma3", "qwen3_next_moe")


def without_spare_layers(name: str, *, pp_size: int) -> dict[str, int]:
    """Changes for `make_checkpoint`: two layers, where they show all kinds and no stages need more.

    Tensor-parallel ranks that share two cores wait for each other in every layer.
    """
    if pp_size > 1 or name in _NEEDS_MORE_THAN_TWO_LAYERS:
        return {}
    return {"num_hidden_layers": 2}


def tiny_config(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json fields of a tiny model, with changes applied."""
    return {**_COMMON, **TINY[name], **changes}


def make_checkpoint(
    folder: Path, name: str, *, seed: int = 0, max_shard_size: str = "5GB", **changes: Any
) -> Path:
    """Writes a tiny random checkpoint (float32 unless `dtype` is among the changes)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = tiny_config(name, **changes)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    dtype = getattr(torch, str(changes.get("dtype", "float32")))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name_of, tensor in (*model.named_parameters(), *model.named_buffers()):
            # Biases of experts are one tensor, [experts, width].
            is_vector = tensor.dim() == 1 or name_of.endswith("bias")
            if is_vector and "inv_freq" not in name_of and tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
