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
DENSE = tuple(name for name in TINY if "moe" not in name)


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
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
