"""Qwen2 and Qwen2.5: Llama with a bias in the query, key and value projections."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_decoder
from mtrain.bridge.hf_config import refuse_sliding_window


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    window = hf_config.get("sliding_window") if hf_config.get("use_sliding_window") else None
    refuse_sliding_window(hf_config, window=window)
    return read_decoder(hf_config, has_qkv_bias=True)


QWEN2 = decoder_family(name="Qwen2, Qwen2.5", model_types=("qwen2",), read=_read)
