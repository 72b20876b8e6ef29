"""GLM-4 (dense) and GLM-4.5, 4.6 (mixture of experts): half of each head turns."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.families.deepseek import next_tokens, sigmoid_experts
from mtrain.bridge.families.layers import NormNames
from mtrain.bridge.hf_config import boolean, rope

_ROTARY_PART = 0.5


def _read_dense(hf_config: Mapping[str, Any]) -> Decoder:
    attention = read_attention(
        hf_config,
        head_dim=128,
        has_qkv_bias=boolean(hf_config, "attention_bias", default=True),
    )
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(
            hf_config, head_dim=attention.head_dim, partial=_ROTARY_PART, is_interleaved=True
        ),
        norms=NormNames(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
        has_fused_mlp=True,
    )


def _read_experts(hf_config: Mapping[str, Any]) -> Decoder:
    attention = read_attention(
        hf_config,
        has_qkv_bias=boolean(hf_config, "attention_bias", default=False),
        has_qk_norm=boolean(hf_config, "use_qk_norm", default=False),
    )
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(hf_config, head_dim=attention.head_dim, partial=_ROTARY_PART),
        experts=sigmoid_experts(hf_config, scaling=1.0),
        next_tokens=next_tokens(hf_config),
    )


GLM4 = decoder_family(name="GLM-4", model_types=("glm4",), read=_read_dense)
GLM4_MOE = decoder_family(name="GLM-4.5, 4.6", model_types=("glm4_moe",), read=_read_experts)
