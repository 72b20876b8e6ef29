"""Qwen3 (dense): norms on queries and keys, a head size of 128 whatever the hidden size."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.families.qwen2 import qwen_window
from mtrain.bridge.hf_config import refuse, rope


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    refuse(hf_config, "attention_bias", "biases of the attention output projection")
    attention = read_attention(hf_config, head_dim=128, has_qk_norm=True, **qwen_window(hf_config))
    return read_decoder(
        hf_config, attention=attention, rope=rope(hf_config, head_dim=attention.head_dim)
    )


QWEN3 = decoder_family(name="Qwen3", model_types=("qwen3",), read=_read)
