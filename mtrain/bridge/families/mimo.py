"""MiMo-7B: Qwen2 with layers of multi-token prediction.

There is no class for it in transformers; its checkpoints bring code of their own, which calls the
layers of Qwen2.
"""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.families.next_tokens import NextTokens
from mtrain.bridge.families.qwen2 import qwen_window
from mtrain.bridge.hf_config import boolean, rope, whole_number


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    attention = read_attention(
        hf_config,
        has_qkv_bias=boolean(hf_config, "attention_bias", default=True),
        **qwen_window(hf_config),
    )
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(hf_config, head_dim=attention.head_dim),
        next_tokens=_next_tokens(hf_config),
    )


def _next_tokens(hf_config: Mapping[str, Any]) -> NextTokens | None:
    num_next = whole_number(hf_config, "num_nextn_predict_layers", 0)
    if not num_next:
        return None
    prefixes = tuple(f"model.mtp_layers.{number}." for number in range(num_next))
    return NextTokens(
        prefixes=prefixes,
        layer_prefixes=prefixes,
        embedding_norm="token_layernorm",
        hidden_norm="hidden_layernorm",
        projection="input_proj",
        final_norm="final_layernorm",
        hidden_first=True,
    )


MIMO = decoder_family(name="MiMo", model_types=("mimo",), read=_read)
