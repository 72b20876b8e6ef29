"""Qwen3-Next: three layers of gated delta net, then one of gated attention; many small experts."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.families.delta_net import DeltaNet
from mtrain.bridge.families.next_tokens import NextTokens
from mtrain.bridge.families.qwen2_moe import qwen_shared_expert
from mtrain.bridge.families.qwen3_moe import qwen_experts
from mtrain.bridge.hf_config import layer_kinds, positive_int, refuse, rope, whole_number

_HEAD_DIM = 256
_ROTARY_PART = 0.25
_FULL, _LINEAR = "full_attention", "linear_attention"


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    refuse(hf_config, "attention_bias", "biases of attention projections")
    attention = read_attention(
        hf_config, head_dim=_HEAD_DIM, has_qk_norm=True, has_output_gate=True
    )
    delta_net = _delta_net(hf_config)
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(hf_config, head_dim=attention.head_dim, partial=_ROTARY_PART),
        delta_net=delta_net if delta_net.layers else None,
        experts=qwen_experts(hf_config, shared=qwen_shared_expert(hf_config), renormalises=True),
        has_zero_centered_norms=True,
        next_tokens=_next_tokens(hf_config),
    )


def _delta_net(hf_config: Mapping[str, Any]) -> DeltaNet:
    num_layers = positive_int(hf_config, "num_hidden_layers")
    interval = positive_int(hf_config, "full_attention_interval", 4)
    default = tuple(_LINEAR if (n + 1) % interval else _FULL for n in range(num_layers))
    kinds = layer_kinds(hf_config, default, known=(_FULL, _LINEAR))
    keys, values = (
        positive_int(hf_config, f"linear_num_{which}_heads", default)
        for which, default in (("key", 16), ("value", 32))
    )
    if values % keys:
        raise ValueError(f"config.json: {values} value heads cannot share {keys} key heads evenly")
    return DeltaNet(
        layers=tuple(n for n, kind in enumerate(kinds) if kind == _LINEAR),
        num_key_heads=keys,
        num_value_heads=values,
        key_dim=positive_int(hf_config, "linear_key_head_dim", 128),
        value_dim=positive_int(hf_config, "linear_value_head_dim", 128),
        kernel_size=positive_int(hf_config, "linear_conv_kernel_dim", 4),
    )


def _next_tokens(hf_config: Mapping[str, Any]) -> NextTokens | None:
    # Published configs do not say that there is one.
    num_next = whole_number(hf_config, "num_nextn_predict_layers", 1)
    if not num_next:
        return None
    if num_next > 1:
        raise ValueError("config.json: more than one layer of multi-token prediction is not built")
    return NextTokens(
        prefixes=("mtp.",),
        layer_prefixes=("mtp.layers.0.",),
        embedding_norm="pre_fc_norm_embedding",
        hidden_norm="pre_fc_norm_hidden",
        projection="fc",
        final_norm="norm",
    )


QWEN3_NEXT = decoder_family(name="Qwen3-Next", model_types=("qwen3_next",), read=_read)
