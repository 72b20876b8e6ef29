"""Gemma 3 (text): norms on both sides of every sublayer, windows in most layers, two ropes."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.families.layers import NormNames
from mtrain.bridge.hf_config import (
    number,
    positive_int,
    refuse,
    rope,
    rope_parameters,
    sliding_window,
)

_GLOBAL_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0
_HEAD_DIM = 256
_DEFAULT_WINDOW = 4096


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    refuse(hf_config, "attention_bias", "biases of attention projections")
    refuse(hf_config, "use_bidirectional_attention", "attention to later tokens")
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        refuse(hf_config, key, "a bound on logits")
    pattern = positive_int(hf_config, "sliding_window_pattern", 6)
    num_layers = positive_int(hf_config, "num_hidden_layers")
    window = sliding_window(
        hf_config,
        window=positive_int(hf_config, "sliding_window", _DEFAULT_WINDOW),
        windowed=[layer for layer in range(num_layers) if (layer + 1) % pattern],
        is_kept=True,
    )
    scalar = number(hf_config, "query_pre_attn_scalar", 256.0)
    attention = read_attention(
        hf_config, head_dim=_HEAD_DIM, has_qk_norm=True, softmax_scale=scalar**-0.5, **window
    )
    full, local = _rotary_settings(hf_config)
    hidden_size = positive_int(hf_config, "hidden_size")
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(full, head_dim=attention.head_dim, base=_GLOBAL_BASE),
        window_rope=rope(local, head_dim=attention.head_dim, base=_LOCAL_BASE) if window else None,
        activation_key="hidden_activation",
        activation_default="gelu_pytorch_tanh",
        tied_by_default=True,
        norms=NormNames(
            after_attention="post_attention_layernorm",
            before_mlp="pre_feedforward_layernorm",
            after_mlp="post_feedforward_layernorm",
        ),
        has_zero_centered_norms=True,
        embedding_scale=hidden_size**0.5,
    )


def _rotary_settings(hf_config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configs as `rope` reads them: of layers that see all, and of those with a window."""
    longest = {"max_position_embeddings": hf_config.get("max_position_embeddings")}
    parameters = rope_parameters(hf_config)
    if "full_attention" in parameters or "sliding_attention" in parameters:
        full, local = (
            {"rope_parameters": parameters.get(kind) or {}}
            for kind in ("full_attention", "sliding_attention")
        )
    else:
        full = {"rope_theta": hf_config.get("rope_theta"), "rope_scaling": dict(parameters)}
        local = {"rope_theta": hf_config.get("rope_local_base_freq")}
    return longest | full, longest | local


GEMMA3 = decoder_family(name="Gemma 3 (text)", model_types=("gemma3_text",), read=_read)
