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
        num_layers: Transformer layers.
        num_matmul_weights: Weights that one token is multiplied with: attention, MLP (of a
            mixture the experts that a token is routed to, and the router) and the output layer;
            not the embedding, which is looked up, nor norms.
        attention_width: Query heads x head size.
        is_frozen: Whether all these weights are frozen, as under an adapter; the adapter's own
            work, a percent or so, is not counted.
    """

    num_layers: int
    num_matmul_weights: int
    attention_width: int
    is_frozen: bool = False

    @classmethod
    def from_config(
        cls, config: TransformerConfig, *, vocab_size: int, is_frozen: bool = False
    ) -> ModelShape:
        """The shape of a GPT model with this Megatron-Core configuration."""
        width = config.num_attention_heads * config.kv_channels
        key_value_width = config.num_query_groups * config.kv_channels
        attention = config.hidden_size * (2 * width + 2 * key_value_width)
        num_moe_layers = _num_moe_layers(config)
        mlp = (config.num_layers - num_moe_layers) * _mlp_weights(config, config.ffn_hidden_size)
        moe = num_moe_layers * _moe_weights_of_a_token(config) if num_moe_layers else 0
        return cls(
            num_layers=config.num_layers,
            num_matmul_weights=config.num_layers * attention
            + mlp
            + moe
            + config.hidden_size * vocab_size,
            attention_width=width,
            is_frozen=is_frozen,
        )


def training_flops(shape: ModelShape, *, num_tokens: float, num_attention_pairs: float) -> float:
    """Operations of forward and backward.

    Args:
        shape: The model.
        num_tokens: Real tokens.
        num_attention_pairs: (query, key) pairs that causal attention needs: the sum of
            `length * (length + 1) / 2` over the documents.

    Returns:
        FLOPs over all ranks: 6 a weight and token, 4 if it is frozen; a pair costs 2 in each of the
        two products of attention, a head channel, and backward costs twice the forward.
    """
    per_weight = _FLOPS_PER_FROZEN_WEIGHT if shape.is_frozen else _FLOPS_PER_WEIGHT
    weights = per_weight * shape.num_matmul_weights * num_tokens
    attention = 3 * 4 * shape.num_layers * shape.attention_width * num_attention_pairs
    return weights + attention


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
