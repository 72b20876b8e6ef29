"""Mistral 7B, Nemo and Small (text): Llama with a head size of its own and maybe a window."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.hf_config import rope, sliding_window


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    if "sliding_window" not in hf_config:
        # The Hugging Face class would take 4096 for it, which hardly anybody means.
        raise ValueError("config.json has no 'sliding_window'; null means full attention")
    attention = read_attention(
        hf_config, **sliding_window(hf_config, window=hf_config["sliding_window"])
    )
    return read_decoder(
        hf_config, attention=attention, rope=rope(hf_config, head_dim=attention.head_dim)
    )


MISTRAL = decoder_family(name="Mistral", model_types=("mistral",), read=_read)
