"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, and longrope for long contexts."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.hf_config import refuse, rope, sliding_window


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    for key in ("resid_pdrop", "embd_pdrop"):
        refuse(hf_config, key, "set it to 0 in a copy of the checkpoint")
    attention = read_attention(
        hf_config,
        is_fused=True,
        **sliding_window(hf_config, window=hf_config.get("sliding_window")),
    )
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(
            hf_config, head_dim=attention.head_dim, partial=1.0, kinds=("default", "longrope")
        ),
        has_fused_mlp=True,
    )


PHI3 = decoder_family(name="Phi-3, Phi-4", model_types=("phi3",), read=_read)
