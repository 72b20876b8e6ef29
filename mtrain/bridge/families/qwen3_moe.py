"""Qwen3 mixture of experts: Qwen3 attention, experts in all or in some layers, none shared.

`router_aux_loss_coef` is no property of the weights and is not read: a balance loss is a choice of
the run.
"""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_attention, read_decoder
from mtrain.bridge.families.mlp import Experts, SharedExperts
from mtrain.bridge.families.qwen2 import qwen_window
from mtrain.bridge.hf_config import boolean, positive_int, refuse, rope


def _read(hf_config: Mapping[str, Any]) -> Decoder:
    refuse(hf_config, "attention_bias", "biases of the attention output projection")
    attention = read_attention(hf_config, has_qk_norm=True, **qwen_window(hf_config))
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(hf_config, head_dim=attention.head_dim),
        experts=qwen_experts(hf_config),
    )


def qwen_experts(
    hf_config: Mapping[str, Any],
    *,
    shared: SharedExperts | None = None,
    renormalises: bool = False,
) -> Experts:
    """The experts of Qwen models.

    Args:
        hf_config: The config.
        shared: Their shared expert.
        renormalises: Whether weights sum to one where the config does not say.

    Raises:
        ValueError: A field is missing or asks for something impossible.
    """
    step = positive_int(hf_config, "decoder_sparse_step", 1)
    dense = hf_config.get("mlp_only_layers") or ()
    layers = tuple(
        layer
        for layer in range(positive_int(hf_config, "num_hidden_layers"))
        if layer not in dense and (layer + 1) % step == 0
    )
    # transformers 5 writes num_local_experts, published checkpoints have num_experts.
    num_experts = positive_int(hf_config, "num_experts", hf_config.get("num_local_experts"))
    topk = positive_int(hf_config, "num_experts_per_tok")
    renormalises = boolean(hf_config, "norm_topk_prob", default=renormalises)
    check_topk(topk, num_experts, renormalises=renormalises)
    return Experts(
        num_experts=num_experts,
        ffn_hidden_size=positive_int(hf_config, "moe_intermediate_size"),
        topk=topk,
        renormalises=renormalises,
        layers=layers,
        shared=shared,
    )


def check_topk(topk: int, num_experts: int, *, renormalises: bool) -> None:
    """Refuses a choice of experts that cannot be made or trained.

    Raises:
        ValueError: Naming the numbers.
    """
    if topk > num_experts:
        raise ValueError(f"config.json: a token cannot go to {topk} of {num_experts} experts")
    if topk == 1 and renormalises:
        raise ValueError(
            "config.json: 'norm_topk_prob' with one expert a token leaves the router without a "
            "gradient; Megatron-Core refuses it"
        )


QWEN3_MOE = decoder_family(name="Qwen3-MoE", model_types=("qwen3_moe",), read=_read)
