"""How many floating-point operations a training step is, for MFU and HFU.

The one thing to know: for MFU only useful work counts. Padding, recomputation and attention across
documents are not in its numerator, so MFU falls when they cost time. HFU counts the first two as
well: it says how busy the device was, whatever that was good for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

__all__ = ["ModelShape", "hardware_flops", "training_flops"]

# A weight takes part in one multiply-add a token in forward, and in two in backward: one for the
# gradient of the activations and one for its own, which a frozen weight does not need.
_FLOPS_PER_WEIGHT = 6
_FLOPS_PER_FROZEN_WEIGHT = 4
_FORWARD_FLOPS_PER_WEIGHT = 2
# A (query, key) pair and head channel is one multiply-add in the product with the keys and one in
# that with the values; backward has two products for each.
_FORWARD_FLOPS_PER_PAIR = 4
_FLOPS_PER_PAIR = 3 * _FORWARD_FLOPS_PER_PAIR


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that decide the work of one token.

    Attributes:
        num_attention_layers: Layers in which tokens are compared, those of multi-token prediction
            counted; not those of a gated delta net, whose work a token is small and not counted.
        num_matmul_weights: Weights that one token is multiplied with: attention, MLP (of a
            mixture the experts that a token is routed to, and the router) and the output layer;
            not the embedding, which is looked up, nor norms.
        num_head_weights: Those of the output layer, which only labelled tokens go through; once
            more for each layer of multi-token prediction.
        attention_width: Channels of all heads, the mean of queries and values.
        num_windowed_layers: Those of the layers that have a window.
        window: Tokens that a token of those sees.
        is_frozen: Whether all these weights are frozen, as under an adapter; the adapter's own
            work, a percent or so, is not counted.
        num_recomputed_weights: Weights that a token is multiplied with once more in backward.
        recomputed_attention: Share of the layers with attention that compare tokens once more.
    """

    num_attention_layers: int
    num_matmul_weights: int
    attention_width: float
    num_head_weights: int = 0
    num_windowed_layers: int = 0
    window: int = 0
    is_frozen: bool = False
    num_recomputed_weights: float = 0.0
    recomputed_attention: float = 0.0

    @classmethod
    def from_config(
        cls,
        config: TransformerConfig,
        *,
        vocab_size: int,
        num_delta_net_layers: int = 0,
        is_frozen: bool = False,
    ) -> ModelShape:
        """The shape of a GPT model with this Megatron-Core configuration.

        Args:
            config: The configuration.
            vocab_size: Words without padding.
            num_delta_net_layers: Layers with a gated delta net in place of attention.
            is_frozen: See above.
        """
        num_next = config.mtp_num_layers or 0
        head = (1 + num_next) * config.hidden_size * vocab_size
        decoder = _decoder_weights(config, num_delta_net_layers)
        windowed = config.window_attn_skip_freq if config.window_size else None
        return cls(
            num_attention_layers=config.num_layers - num_delta_net_layers + num_next,
            num_matmul_weights=decoder + _next_token_weights(config) + head,
            num_head_weights=head,
            attention_width=_attention_width(config),
            num_windowed_layers=sum(windowed) if isinstance(windowed, list) else 0,
            window=config.window_size[0] + 1 if config.window_size else 0,
            is_frozen=is_frozen,
            num_recomputed_weights=_recomputed_weights(config, num_delta_net_layers),
            recomputed_attention=_recomputed_attention(config, num_delta_net_layers),
        )


def training_flops(
    shape: ModelShape, *, num_tokens: float, num_labels: float, num_attention_pairs: float
) -> float:
    """Operations of forward and backward.

    Args:
        shape: The model.
        num_tokens: Real tokens.
        num_labels: Those with a label.
        num_attention_pairs: (query, key) pairs that causal attention needs: the sum of
            `length * (length + 1) / 2` over the documents.

    Returns:
        FLOPs over all ranks: 6 a weight and token, 4 if it is frozen; a pair costs 2 in each of the
        two products of attention, a head channel, and backward costs twice the forward. Layers
        with a window count at most as many pairs as it has places.
    """
    per_weight = _FLOPS_PER_FROZEN_WEIGHT if shape.is_frozen else _FLOPS_PER_WEIGHT
    weights = per_weight * (
        (shape.num_matmul_weights - shape.num_head_weights) * num_tokens
        + shape.num_head_weights * num_labels
    )
    pairs = _pairs_of_all_layers(shape, num_tokens, num_attention_pairs)
    return weights + _FLOPS_PER_PAIR * shape.attention_width * pairs


def hardware_flops(
    shape: ModelShape, *, num_padded_tokens: float, num_labels: float, num_attention_pairs: float
) -> float:
    """Operations of forward and backward as they are computed: with padding and recomputation.

    Left out: attention inside padding; what a fused attention makes again in its own backward;
    recomputed norms, activation functions and delta rules, which have no weights; and the tokens
    without a label that go through a head with an adapter.

    Args:
        shape: The model.
        num_padded_tokens: Tokens with padding.
        num_labels: Real tokens with a label.
        num_attention_pairs: As for `training_flops`.

    Returns:
        FLOPs over all ranks: those of `training_flops` with padding as if it were real, and once
        more the forward pass of what is recomputed, 2 a weight and token and 4 a pair and channel.
    """
    once = training_flops(
        shape,
        num_tokens=num_padded_tokens,
        num_labels=num_labels,
        num_attention_pairs=num_attention_pairs,
    )
    weights = _FORWARD_FLOPS_PER_WEIGHT * shape.num_recomputed_weights * num_padded_tokens
    pairs = _pairs_of_all_layers(shape, num_padded_tokens, num_attention_pairs)
    pairs *= shape.recomputed_attention
    return once + weights + _FORWARD_FLOPS_PER_PAIR * shape.attention_width * pairs


def _pairs_of_all_layers(shape: ModelShape, num_tokens: float, num_attention_pairs: float) -> float:
    num_full = shape.num_attention_layers - shape.num_windowed_layers
    in_window = min(num_attention_pairs, num_tokens * shape.window)
    return num_full * num_attention_pairs + shape.num_windowed_layers * in_window


def _decoder_weights(config: TransformerConfig, num_delta_net_layers: int) -> int:
    """Of all layers but those of multi-token prediction."""
    num_attended = config.num_layers - num_delta_net_layers
    num_moe = _num_moe_layers(config)
    weights = num_attended * _attention_weights(config)
    weights += (config.num_layers - num_moe) * _mlp_weights(config, config.ffn_hidden_size)
    if num_moe:
        weights += num_moe * _moe_weights_of_a_token(config)
    if num_delta_net_layers:
        weights += num_delta_net_layers * _delta_net_weights(config)
    return weights


def _next_token_weights(config: TransformerConfig) -> int:
    """Of the layers of multi-token prediction without the head, which are like the decoder's."""
    joined = 2 * config.hidden_size**2
    if _num_moe_layers(config):
        mlp = _moe_weights_of_a_token(config)
    else:
        mlp = _mlp_weights(config, config.ffn_hidden_size)
    return (config.mtp_num_layers or 0) * (_attention_weights(config) + mlp + joined)


def _recomputed_weights(config: TransformerConfig, num_delta_net_layers: int) -> float:
    if config.recompute_granularity == "full":
        decoder = _decoder_weights(config, num_delta_net_layers)
        weights = _share_of_recomputed_layers(config) * decoder
        return weights + _recomputes_next_tokens(config) * _next_token_weights(config)
    if config.recompute_granularity == "selective":
        return _weights_of_modules(config, config.recompute_modules)
    return 0.0


def _recomputed_attention(config: TransformerConfig, num_delta_net_layers: int) -> float:
    num_attended = config.num_layers - num_delta_net_layers
    num_next = config.mtp_num_layers or 0
    if config.recompute_granularity == "full":
        num_recomputed = _share_of_recomputed_layers(config) * num_attended
        num_recomputed += _recomputes_next_tokens(config) * num_next
        return num_recomputed / max(num_attended + num_next, 1)
    is_selective = config.recompute_granularity == "selective"
    return float(is_selective and "core_attn" in config.recompute_modules)


def _recomputes_next_tokens(config: TransformerConfig) -> bool:
    """Whether full recomputation is of multi-token prediction too: Megatron-Core skips `block`."""
    return config.recompute_method == "uniform"


def _share_of_recomputed_layers(config: TransformerConfig) -> float:
    """Of the decoder under full recomputation, all layers taken as equal.

    `block` is about the first `recompute_num_layers` layers of every virtual stage.
    """
    if config.recompute_method == "uniform":
        return 1.0
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    num_recomputed = sum(
        min(num_chunks * config.recompute_num_layers, num_layers)
        for num_layers in _layers_of_stages(config)
    )
    return num_recomputed / config.num_layers


def _layers_of_stages(config: TransformerConfig) -> list[int]:
    """Layers of every pipeline stage, in any order."""
    ends = (config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage)
    given = [num_layers for num_layers in ends if num_layers is not None]
    num_others = config.pipeline_model_parallel_size - len(given)
    others = (config.num_layers - sum(given)) // max(num_others, 1)
    return given + num_others * [others]


def _weights_of_modules(config: TransformerConfig, modules: Sequence[str]) -> int:
    """Of the parts that selective recomputation names; the others have none, like `core_attn`."""
    num_moe, num_next = _num_moe_layers(config), config.mtp_num_layers or 0
    num_dense = config.num_layers - num_moe
    if num_moe:
        num_moe += num_next
    else:
        num_dense += num_next
    weights = 0
    if "mlp" in modules:
        weights += num_dense * _mlp_weights(config, config.ffn_hidden_size)
    if "moe" in modules and num_moe:
        weights += num_moe * _moe_weights_of_a_token(config)
    elif "shared_experts" in modules:
        # A recomputed expert layer has them in it.
        shared = config.moe_shared_expert_intermediate_size or 0
        weights += num_moe * _mlp_weights(config, shared)
    return weights


def _attention_weights(config: TransformerConfig) -> int:
    """Of one layer with attention."""
    hidden_size, num_heads = config.hidden_size, config.num_attention_heads
    if config.multi_latent_attention:
        query = num_heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
        rank = config.q_lora_rank
        queries = hidden_size * query if rank is None else rank * (hidden_size + query)
        down = hidden_size * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
        up = config.kv_lora_rank * num_heads * (config.qk_head_dim + config.v_head_dim)
        return queries + down + up + num_heads * config.v_head_dim * hidden_size
    width = num_heads * config.kv_channels
    gate = width if config.attention_output_gate else 0
    return hidden_size * (2 * width + gate + 2 * config.num_query_groups * config.kv_channels)


def _attention_width(config: TransformerConfig) -> float:
    if config.multi_latent_attention:
        query = config.qk_head_dim + config.qk_pos_emb_head_dim
        return config.num_attention_heads * (query + config.v_head_dim) / 2
    return config.num_attention_heads * config.kv_channels


def _delta_net_weights(config: TransformerConfig) -> int:
    """Of one layer with a gated delta net."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    inputs = 2 * keys + 2 * values + 2 * config.linear_num_value_heads
    return config.hidden_size * (inputs + values)


def _num_moe_layers(config: TransformerConfig) -> int:
    if config.num_moe_experts is None:
        return 0
    if isinstance(config.moe_layer_freq, int):
        return len(range(0, config.num_layers, config.moe_layer_freq))
    return sum(config.moe_layer_freq)


def _mlp_weights(config: TransformerConfig, ffn_hidden_size: int) -> int:
    num_matrices = 3 if config.gated_linear_unit else 2
    return num_matrices * config.hidden_size * ffn_hidden_size


def _moe_weights_of_a_token(config: TransformerConfig) -> int:
    shared = config.moe_shared_expert_intermediate_size or 0
    routed = config.moe_router_topk * config.moe_ffn_hidden_size
    router = config.hidden_size * config.num_moe_experts
    return _mlp_weights(config, routed + shared) + router
