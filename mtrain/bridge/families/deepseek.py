"""DeepSeek-V2 and V3, and models of the same architecture (Moonlight, Kimi-K2).

Latent attention, shared experts, routing by groups of experts, multi-token prediction.
"""

import math
from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.decoder import Decoder, decoder_family, read_decoder
from mtrain.bridge.families.latent_attention import LatentAttention
from mtrain.bridge.families.mlp import Experts, SharedExperts
from mtrain.bridge.families.next_tokens import NextTokens
from mtrain.bridge.families.qwen3_moe import check_topk
from mtrain.bridge.hf_config import (
    boolean,
    number,
    positive_int,
    refuse,
    rope,
    rope_parameters,
    whole_number,
)

_GROUP_SCORES_V3 = 2


def _read_v3(hf_config: Mapping[str, Any]) -> Decoder:
    # Spelled out by remote code; the Hugging Face class has nothing else.
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if hf_config.get(key, only) != only:
            raise ValueError(
                f"config.json: {key!r} is {hf_config[key]!r}; only {only!r} is built for "
                f"{hf_config.get('model_type')}"
            )
    interleaved = boolean(hf_config, "rope_interleave", default=True)
    return _read(
        hf_config,
        experts=sigmoid_experts(hf_config, scaling=2.5),
        is_interleaved=interleaved,
        layers_of_next_tokens=next_tokens(hf_config),
    )


def _read_v2(hf_config: Mapping[str, Any]) -> Decoder:
    refuse(hf_config, "mlp_bias", "biases in the MLP")
    return _read(hf_config, experts=_softmax_experts(hf_config), is_interleaved=True)


def _read(
    hf_config: Mapping[str, Any],
    *,
    experts: Experts,
    is_interleaved: bool,
    layers_of_next_tokens: NextTokens | None = None,
) -> Decoder:
    refuse(hf_config, "attention_bias", "biases of attention projections")
    rotary_dim = positive_int(hf_config, "qk_rope_head_dim")
    head_dim = positive_int(hf_config, "qk_nope_head_dim")
    attention = LatentAttention(
        num_heads=positive_int(hf_config, "num_attention_heads"),
        query_rank=None
        if hf_config.get("q_lora_rank") is None
        else positive_int(hf_config, "q_lora_rank"),
        key_value_rank=positive_int(hf_config, "kv_lora_rank"),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        value_dim=positive_int(hf_config, "v_head_dim"),
        softmax_scale=_softmax_scale(hf_config, head_dim + rotary_dim),
    )
    return read_decoder(
        hf_config,
        attention=attention,
        rope=rope(hf_config, head_dim=rotary_dim, is_interleaved=is_interleaved),
        experts=experts if experts.layers else None,
        next_tokens=layers_of_next_tokens,
    )


def _softmax_scale(hf_config: Mapping[str, Any], head_dim: int) -> float:
    """Factor of the scores, which a stretched rotary embedding makes larger."""
    parameters = rope_parameters(hf_config)
    mscale = 1.0
    if parameters.get("rope_type", parameters.get("type", "default")) != "default":
        weight, factor = (number(parameters, key, 0.0) for key in ("mscale_all_dim", "factor"))
        if weight and factor > 1:
            mscale = 0.1 * weight * math.log(factor) + 1.0
    return mscale * mscale / math.sqrt(head_dim)


def sigmoid_experts(hf_config: Mapping[str, Any], *, scaling: float) -> Experts:
    """The experts of DeepSeek-V3, GLM-4.5 and others that took them over.

    Args:
        hf_config: The config.
        scaling: Factor of the weights of experts where the config does not say.

    Raises:
        ValueError: A field is missing or asks for something that is not built.
    """
    if not boolean(hf_config, "norm_topk_prob", default=True):
        raise ValueError(
            "config.json: 'norm_topk_prob' false is not built: Megatron-Core makes the weights of "
            "experts that are chosen by sigmoid scores sum to one"
        )
    groups = whole_number(hf_config, "n_group", 1)
    chosen = whole_number(hf_config, "topk_group", 1)
    return _experts(
        hf_config,
        scaling=scaling,
        renormalises=True,
        score_function="sigmoid",
        has_score_bias=True,
        **_group_choice(groups, chosen, scores=_GROUP_SCORES_V3),
    )


def _softmax_experts(hf_config: Mapping[str, Any]) -> Experts:
    method = hf_config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(
            f"config.json: 'topk_method' is {method!r}; built are greedy and group_limited_greedy"
        )
    # The Hugging Face class does not renormalise, whatever the config says.
    refuse(hf_config, "norm_topk_prob", "weights of experts that sum to one")
    groups, chosen = 1, 1
    if method == "group_limited_greedy":
        groups, chosen = positive_int(hf_config, "n_group"), positive_int(hf_config, "topk_group")
    return _experts(
        hf_config, scaling=1.0, renormalises=False, **_group_choice(groups, chosen, scores=1)
    )


def _group_choice(groups: int, chosen: int, *, scores: int) -> dict[str, Any]:
    """Fields of `Experts`; nothing where all groups are chosen."""
    if groups == chosen:
        return {}
    return {"num_groups": groups, "group_topk": chosen, "group_scores": scores}


def _experts(hf_config: Mapping[str, Any], *, scaling: float, **facts: Any) -> Experts:
    num_experts = positive_int(hf_config, "n_routed_experts", hf_config.get("num_local_experts"))
    topk = positive_int(hf_config, "num_experts_per_tok")
    check_topk(topk, num_experts, renormalises=False)
    width = positive_int(hf_config, "moe_intermediate_size")
    num_shared = whole_number(hf_config, "n_shared_experts", 0)
    num_layers = positive_int(hf_config, "num_hidden_layers")
    first = whole_number(hf_config, "first_k_dense_replace", 0)
    if positive_int(hf_config, "moe_layer_freq", 1) != 1:
        raise ValueError("config.json: 'moe_layer_freq' other than 1 is not built")
    return Experts(
        num_experts=num_experts,
        ffn_hidden_size=width,
        topk=topk,
        layers=tuple(range(min(first, num_layers), num_layers)),
        scaling=number(hf_config, "routed_scaling_factor", scaling),
        shared=SharedExperts(width=num_shared * width, name="mlp.shared_experts")
        if num_shared
        else None,
        **facts,
    )


def next_tokens(hf_config: Mapping[str, Any]) -> NextTokens | None:
    """Multi-token prediction as DeepSeek-V3 stores it: more layers behind the last one."""
    given = hf_config.get("num_mtp_layers")
    num_next = whole_number(hf_config, "num_nextn_predict_layers", 1 if given is None else given)
    if not num_next:
        return None
    num_layers = positive_int(hf_config, "num_hidden_layers")
    prefixes = tuple(f"model.layers.{num_layers + number}." for number in range(num_next))
    return NextTokens(
        prefixes=prefixes,
        layer_prefixes=prefixes,
        copies=(
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", "lm_head.weight"),
        ),
    )


DEEPSEEK_V2 = decoder_family(name="DeepSeek-V2", model_types=("deepseek_v2",), read=_read_v2)
DEEPSEEK_V3 = decoder_family(
    name="DeepSeek-V3, Moonlight, Kimi-K2", model_types=("deepseek_v3", "kimi_k2"), read=_read_v3
)
