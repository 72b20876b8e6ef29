"""How many floating-point operations a training step is, for MFU.

The one thing to know: only useful work counts. Padding, recomputation and attention across
documents are not in the numerator, so MFU falls when they cost time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

__all__ = ["ModelShape", "training_flops"]

# A weight takes part in one multiply-add a token in forward, and in two in backward: one for the
# gradient of the activations and one for its own, which a frozen weight does not need.
_FLOPS_PER_WEIGHT = 6
_FLOPS_PER_FROZEN_WEIGHT = 4


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
    """

    num_attention_layers: int
    num_matmul_weights: int
    attention_width: float
    num_head_weights: int = 0
    num_windowed_layers: int = 0
    window: int = 0
    is_frozen: bool = False

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
        num_moe_layers = _num_moe_layers(config)
        num_attended = config.num_layers - num_delta_net_layers
        dense = _mlp_weights(config, config.ffn_hidden_size)
        moe = _moe_weights_of_a_token(config) if num_moe_layers else 0
        head = config.hidden_size * vocab_size
        weights = num_attended * _attention_weights(config) + head
        weights += (config.num_layers - num_moe_layers) * dense + num_moe_layers * moe
        if num_delta_net_layers:
            weights += num_delta_net_layers * _delta_net_weights(config)
        joined = 2 * config.hidden_size**2
        weights += num_next * (_attention_weights(config) + (moe or dense) + joined + head)
        windowed = config.window_attn_skip_freq if config.window_size else None
        return cls(
            num_attention_layers=num_attended + num_next,
            num_matmul_weights=weights,
            num_head_weights=(1 + num_next) * head,
            attention_width=_attention_width(config),
            num_windowed_layers=sum(windowed) if isinstance(windowed, list) else 0,
            window=config.window_size[0] + 1 if config.window_size else 0,
            is_frozen=is_frozen,
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
    num_full = shape.num_attention_layers - shape.num_windowed_layers
    pairs = num_full * num_attention_pairs
    pairs += shape.num_windowed_layers * min(num_attention_pairs, num_tokens * shape.window)
    return weights + 3 * 4 * shape.attention_width * pairs


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
