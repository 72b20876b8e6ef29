"""Llama 2, 3, 3.1, 3.2 and models of the same architecture."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_decoder
from mtrain.bridge.hf_config import refuse


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    refuse(hf_config, "attention_bias", "biases of the attention output projection")
    refuse(hf_config, "mlp_bias", "biases in the MLP")
    return read_decoder(hf_config)


LLAMA = decoder_family(name="Llama", model_types=("llama",), read=_read)
