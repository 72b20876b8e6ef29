"""Qwen2 and Qwen2.5: Llama with a bias in the query, key and value projections."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.hf_config import boolean, positive_int, rope, sliding_window


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    attention = read_attention(hf_config, has_qkv_bias=True, **qwen_window(hf_config))
    return read_decoder(
        hf_config, attention=attention, rope=rope(hf_config, head_dim=attention.head_dim)
    )


def qwen_window(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sliding window of Qwen2 and Qwen3: of the upper layers, and only if switched on."""
    if not boolean(hf_config, "use_sliding_window", default=False):
        return sliding_window(hf_config, window=None, windowed=())
    num_layers = positive_int(hf_config, "num_hidden_layers")
    first = positive_int(hf_config, "max_window_layers", _MAX_WINDOW_LAYERS)
    return sliding_window(
        hf_config, window=hf_config.get("sliding_window"), windowed=range(first, num_layers)
    )


# What the Hugging Face class takes.
_MAX_WINDOW_LAYERS = 28

QWEN2 = decoder_family(name="Qwen2, Qwen2.5", model_types=("qwen2",), read=_read)
