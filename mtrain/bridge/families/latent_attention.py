"""Multi-head latent attention (DeepSeek) as rules and as Megatron-Core configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtrain.bridge.families.layers import LayerNames
from mtrain.bridge.rules import Rule

_A = "self_attention."


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Attention whose keys and values (and maybe queries) pass through few dimensions.

    Attributes:
        num_heads: Heads.
        query_rank: Dimensions of the compressed queries; None where they are not compressed.
        key_value_rank: Dimensions of the compressed keys and values.
        head_dim: Dimensions of queries and keys that do not turn.
        rotary_dim: Those that do; keys share them between the heads.
        value_dim: Dimensions of values.
        softmax_scale: Factor of the scores.
    """

    num_heads: int
    query_rank: int | None
    key_value_rank: int
    head_dim: int
    rotary_dim: int
    value_dim: int
    softmax_scale: float

    def rules(self, at: LayerNames, hidden_size: int, *, input_norm: str) -> tuple[Rule, ...]:
        """Rules of the weights of some layers; see `GroupedQueryAttention.rules`."""
        compressed = self.key_value_rank + self.rotary_dim
        rows = self.num_heads * (self.head_dim + self.value_dim)
        return (
            at.rule("input_layernorm.weight", [(f"{input_norm}.weight", (hidden_size,))]),
            *self._queries(at, hidden_size),
            at.rule(
                _A + "linear_kv_down_proj.weight",
                [("self_attn.kv_a_proj_with_mqa.weight", (compressed, hidden_size))],
            ),
            at.rule(
                _A + "linear_kv_up_proj.layer_norm_weight",
                [("self_attn.kv_a_layernorm.weight", (self.key_value_rank,))],
                plain=_A + "kv_layernorm.weight",
            ),
            at.rule(
                _A + "linear_kv_up_proj.weight",
                [("self_attn.kv_b_proj.weight", (rows, self.key_value_rank))],
                split="rows",
            ),
            at.rule(
                _A + "linear_proj.weight",
                [("self_attn.o_proj.weight", (hidden_size, self.num_heads * self.value_dim))],
                split="columns",
            ),
        )

    def _queries(self, at: LayerNames, hidden_size: int) -> tuple[Rule, ...]:
        rows = self.num_heads * (self.head_dim + self.rotary_dim)
        if self.query_rank is None:
            query = ("self_attn.q_proj.weight", (rows, hidden_size))
            return (at.rule(_A + "linear_q_proj.weight", [query], split="rows"),)
        return (
            at.rule(
                _A + "linear_q_down_proj.weight",
                [("self_attn.q_a_proj.weight", (self.query_rank, hidden_size))],
            ),
            at.rule(
                _A + "linear_q_up_proj.layer_norm_weight",
                [("self_attn.q_a_layernorm.weight", (self.query_rank,))],
                plain=_A + "q_layernorm.weight",
            ),
            at.rule(
                _A + "linear_q_up_proj.weight",
                [("self_attn.q_b_proj.weight", (rows, self.query_rank))],
                split="rows",
            ),
        )

    def transformer(self, num_layers: int) -> dict[str, Any]:
        """Fields of `MLATransformerConfig`."""
        return {
            "multi_latent_attention": True,
            "num_attention_heads": self.num_heads,
            "q_lora_rank": self.query_rank,
            "kv_lora_rank": self.key_value_rank,
            "qk_head_dim": self.head_dim,
            "qk_pos_emb_head_dim": self.rotary_dim,
            "v_head_dim": self.value_dim,
            # What the output projection takes of a head.
            "kv_channels": self.value_dim,
            # There are norms, but not of heads: where this is true, Megatron-Core adds up over the
            # tensor-parallel ranks the gradients of all that is called q_layernorm.
            "qk_layernorm": False,
            "softmax_scale": self.softmax_scale,
            # Not looked at: cosines and sines are ours.
            "rope_type": "rope",
        }
