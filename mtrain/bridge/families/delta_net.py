"""The gated delta net of Qwen3-Next as rules and as Megatron-Core configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtrain.bridge.families.layers import LayerNames
from mtrain.bridge.rules import Concatenated, Regrouped, Rule
from mtrain.bridge.spans import Span

_A = "self_attention."


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNet:
    """Linear attention with a short convolution.

    Attributes:
        layers: Layers that have it.
        num_key_heads: Heads of queries and keys.
        num_value_heads: Heads of values; a multiple of the former.
        key_dim: Size of a query or key head.
        value_dim: Size of a value head.
        kernel_size: Tokens that the convolution sees.
    """

    layers: tuple[int, ...]
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int

    def rules(self, at: LayerNames, hidden_size: int, *, input_norm: str) -> tuple[Rule, ...]:
        """Rules of the weights of some layers; see `GroupedQueryAttention.rules`."""
        keys, values = self.num_key_heads * self.key_dim, self.num_value_heads * self.value_dim
        channels = ((0, keys), (keys, keys), (2 * keys, values))
        heads = (self.num_value_heads,)
        return (
            at.rule(
                _A + "in_proj.layer_norm_weight",
                [(f"{input_norm}.weight", (hidden_size,))],
                plain="input_layernorm.weight",
            ),
            at.rule(
                _A + "in_proj.weight",
                [
                    ("linear_attn.in_proj_qkvz.weight", (2 * keys + 2 * values, hidden_size)),
                    ("linear_attn.in_proj_ba.weight", (2 * self.num_value_heads, hidden_size)),
                ],
                layout=Regrouped(Concatenated(), self._row_order()),
                split="rows",
            ),
            at.rule(
                _A + "conv1d.weight",
                [("linear_attn.conv1d.weight", (2 * keys + values, 1, self.kernel_size))],
                layout=Regrouped(
                    Concatenated(), tuple((0, Span(start, size)) for start, size in channels)
                ),
                split="rows",
            ),
            at.rule(_A + "A_log", [("linear_attn.A_log", heads)], split="rows"),
            at.rule(_A + "dt_bias", [("linear_attn.dt_bias", heads)], split="rows"),
            at.rule(_A + "out_norm.weight", [("linear_attn.norm.weight", (self.value_dim,))]),
            at.rule(
                _A + "out_proj.weight",
                [("linear_attn.out_proj.weight", (hidden_size, values))],
                split="columns",
            ),
        )

    def _row_order(self) -> tuple[tuple[int, Span], ...]:
        """Queries, keys, values, gates, betas, decays: each of all heads.

        Hugging Face has the rows of one key head, and of the value heads that share it, together.
        """
        shared = self.num_value_heads // self.num_key_heads
        sizes = (self.key_dim, self.key_dim, shared * self.value_dim, shared * self.value_dim)
        step, count = sum(sizes), self.num_key_heads
        parts = [
            (0, Span(sum(sizes[:index]), size, count, step)) for index, size in enumerate(sizes)
        ]
        parts += [(1, Span(first, shared, count, 2 * shared)) for first in (0, shared)]
        return tuple(parts)

    def transformer(self) -> dict[str, Any]:
        """Fields of `TransformerConfig`."""
        return {
            "linear_conv_kernel_dim": self.kernel_size,
            "linear_key_head_dim": self.key_dim,
            "linear_value_head_dim": self.value_dim,
            "linear_num_key_heads": self.num_key_heads,
            "linear_num_value_heads": self.num_value_heads,
        }
