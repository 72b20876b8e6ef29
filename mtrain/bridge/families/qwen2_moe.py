"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 attention, experts, and a shared expert with a gate."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.families.mlp import SharedExperts
from mtrain.bridge.families.qwen2 import qwen_window
from mtrain.bridge.families.qwen3_moe import qwen_experts
from mtrain.bridge.hf_config import boolean, positive_int, rope


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    has_bias = boolean(hf_config, "qkv_bias", default=True)
    attention = read_attention(hf_config, has_qkv_bias=has_bias, **qwen_window(hf_config))
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(hf_config, head_dim=attention.head_dim),
        experts=qwen_experts(hf_config, shared=qwen_shared_expert(hf_config)),
    )


def qwen_shared_expert(hf_config: Mapping[str, Any]) -> SharedExperts:
    """The shared expert of Qwen models, whose output a gate scales."""
    return SharedExperts(
        width=positive_int(hf_config, "shared_expert_intermediate_size"),
        name="mlp.shared_expert",
        gate="mlp.shared_expert_gate",
    )


QWEN2_MOE = decoder_family(name="Qwen2-MoE", model_types=("qwen2_moe",), read=_read)
