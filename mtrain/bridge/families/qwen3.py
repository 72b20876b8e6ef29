"""Qwen3 (dense): norms on queries and keys, a head size of 128 whatever the hidden size."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_decoder
from mtrain.bridge.hf_config import refuse, refuse_sliding_window


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    refuse(hf_config, "attention_bias", "biases of the attention output projection")
    window = hf_config.get("sliding_window") if hf_config.get("use_sliding_window") else None
    refuse_sliding_window(hf_config, window=window)
    return read_decoder(hf_config, head_dim=128, has_qk_norm=True)


QWEN3 = decoder_family(name="Qwen3", model_types=("qwen3",), read=_read)
