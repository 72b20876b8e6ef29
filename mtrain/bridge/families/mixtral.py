"""Mixtral 8x7B and 8x22B: Mistral attention, every MLP a mixture of experts."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.families.mlp import Experts
from mtrain.bridge.families.qwen3_moe import check_topk
from mtrain.bridge.hf_config import positive_int, refuse, rope, sliding_window
from mtrain.bridge.storage.forms import StorageForm, stacked_experts

_LAYER = "model.layers.{layer}."
_MOE = _LAYER + "block_sparse_moe."


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    refuse(hf_config, "router_jitter_noise", "set it to 0 in a copy of the checkpoint")
    attention = read_attention(
        hf_config, **sliding_window(hf_config, window=hf_config.get("sliding_window"))
    )
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(hf_config, head_dim=attention.head_dim, base=1_000_000.0),
        experts=_experts(hf_config),
    )


def experts_everywhere(hf_config: Mapping[str, Any], *, topk: int | None, **facts: Any) -> Experts:
    """Experts in every layer, whose weights sum to one for each token.

    Args:
        hf_config: The config.
        topk: Experts of a token where the config does not say.
        **facts: Other fields of `Experts`.

    Raises:
        ValueError: A field is missing or asks for something impossible.
    """
    num_experts = positive_int(hf_config, "num_local_experts", hf_config.get("num_experts"))
    topk = positive_int(hf_config, "num_experts_per_tok", topk)
    check_topk(topk, num_experts, renormalises=True)
    return Experts(
        num_experts=num_experts,
        ffn_hidden_size=positive_int(hf_config, "intermediate_size"),
        topk=topk,
        renormalises=True,
        layers=tuple(range(positive_int(hf_config, "num_hidden_layers"))),
        **facts,
    )


def _experts(hf_config: Mapping[str, Any]) -> Experts:
    return experts_everywhere(
        hf_config,
        topk=2,
        router="block_sparse_moe.gate",
        name="block_sparse_moe.experts.{expert}",
        projections=("w1", "w3", "w2"),
        forms=(
            StorageForm(stored=_LAYER + "mlp.gate.weight", parts=(f"{_MOE}gate.weight",)),
            *stacked_experts(
                _LAYER + "mlp.experts.", canonical=_MOE + "experts.", gate="w1", up="w3", down="w2"
            ),
        ),
    )


MIXTRAL = decoder_family(name="Mixtral", model_types=("mixtral",), read=_read)
