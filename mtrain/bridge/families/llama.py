"""Llama 2, 3, 3.1, 3.2 and models of the same architecture."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.hf_config import refuse, rope


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    refuse(hf_config, "attention_bias", "biases of the attention output projection")
    refuse(hf_config, "mlp_bias", "biases in the MLP")
    attention = read_attention(hf_config)
    return read_decoder(
        hf_config, attention=attention, rope=rope(hf_config, head_dim=attention.head_dim)
    )


LLAMA = decoder_family(name="Llama", model_types=("llama",), read=_read)
