"""gpt-oss: sinks, windows in every other layer, biases everywhere, a clamped activation.

Its files hold all experts of a layer in one tensor, transposed and with gate and up rows taking
turns, in 4 bits or not; here every expert has tensors of its own (see `StorageForm`).
"""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.families.mixtral import experts_everywhere
from mtrain.bridge.families.mlp import Experts
from mtrain.bridge.hf_config import boolean, number, positive_int, rope, sliding_window
from mtrain.bridge.storage.forms import stacked_experts

_HEAD_DIM = 64
_BASE = 150_000.0
_ALPHA = 1.702


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    if not boolean(hf_config, "attention_bias", default=True):
        raise ValueError("config.json: 'attention_bias' false is not built for gpt_oss")
    if number(hf_config, "swiglu_alpha", _ALPHA) != _ALPHA:
        raise ValueError(f"config.json: 'swiglu_alpha' other than {_ALPHA} is not built")
    num_layers = positive_int(hf_config, "num_hidden_layers")
    attention = read_attention(
        hf_config,
        head_dim=_HEAD_DIM,
        has_qkv_bias=True,
        has_output_bias=True,
        has_sinks=True,
        **sliding_window(
            hf_config, window=hf_config.get("sliding_window"), windowed=range(0, num_layers, 2)
        ),
    )
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(
            hf_config, head_dim=attention.head_dim, base=_BASE, kinds=("default", "yarn", "linear")
        ),
        experts=_experts(hf_config),
        activation="quick_gelu",
        transformer={
            "add_bias_linear": True,
            "activation_func_clamp_value": number(hf_config, "swiglu_limit", 7.0),
            "glu_linear_offset": 1.0,
        },
    )


def _experts(hf_config: Mapping[str, Any]) -> Experts:
    return experts_everywhere(
        hf_config,
        topk=hf_config.get("experts_per_token"),
        router="mlp.router",
        has_biases=True,
        forms=stacked_experts(
            "model.layers.{layer}.mlp.experts.",
            order="interleaved",
            is_transposed=True,
            is_native=True,
            has_bias=True,
        ),
    )


GPT_OSS = decoder_family(name="gpt-oss", model_types=("gpt_oss",), read=_read)
