"""Grouped-query attention as rules and as Megatron-Core configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtrain.bridge.families.layers import LayerNames
from mtrain.bridge.rules import Interleaved, Layout, Regrouped, Rule
from mtrain.bridge.spans import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQueryAttention:
    """Attention in which groups of queries share keys and values.

    Attributes:
        num_heads: Query heads.
        num_groups: Key and value heads.
        head_dim: Size of a head.
        has_qkv_bias: Query, key and value projections have a bias.
        has_output_bias: The output projection has one.
        has_qk_norm: Queries and keys are normalised, head by head.
        has_output_gate: The query projection also makes a gate for the output of each head; its
            rows are those of a head's query, then of its gate.
        has_sinks: Each head has a logit that only takes part in the sum of its softmax.
        is_fused: One tensor `qkv_proj` holds the rows of all queries, then keys, then values.
        softmax_scale: Factor of the scores; None for 1 / sqrt(head_dim).
        window: Tokens that those of windowed layers see, themselves included; None for all.
        windowed_layers: Layers with that window.
    """

    num_heads: int
    num_groups: int
    head_dim: int
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_qk_norm: bool = False
    has_output_gate: bool = False
    has_sinks: bool = False
    is_fused: bool = False
    softmax_scale: float | None = None
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()

    def rules(self, at: LayerNames, hidden_size: int, *, input_norm: str) -> tuple[Rule, ...]:
        """Rules of the weights of some layers.

        Args:
            at: The layers.
            hidden_size: Their width.
            input_norm: Name of the norm before attention.
        """
        width = self.num_heads * self.head_dim
        rules = [
            at.rule(
                "self_attention.linear_qkv.layer_norm_weight",
                [(f"{input_norm}.weight", (hidden_size,))],
                plain="input_layernorm.weight",
            ),
            self._projections(at, "weight", (hidden_size,)),
            at.rule(
                "self_attention.linear_proj.weight",
                [("self_attn.o_proj.weight", (hidden_size, width))],
                split="columns",
            ),
        ]
        if self.has_qkv_bias:
            rules.append(self._projections(at, "bias", ()))
        if self.has_output_bias:
            rules.append(
                at.rule(
                    "self_attention.linear_proj.bias", [("self_attn.o_proj.bias", (hidden_size,))]
                )
            )
        if self.has_qk_norm:
            rules += [
                at.rule(
                    f"self_attention.{which}_layernorm.weight",
                    [(f"self_attn.{which}_norm.weight", (self.head_dim,))],
                )
                for which in ("q", "k")
            ]
        if self.has_sinks:
            rules.append(
                at.rule(
                    "self_attention.core_attention.softmax_offset",
                    [("self_attn.sinks", (self.num_heads,))],
                    split="rows",
                )
            )
        return tuple(rules)

    def _projections(self, at: LayerNames, kind: str, columns: tuple[int, ...]) -> Rule:
        width, shared = self.num_heads * self.head_dim, self.num_groups * self.head_dim
        if self.is_fused:
            tensors = [("qkv_proj", width + 2 * shared)]
        else:
            queries = 2 * width if self.has_output_gate else width
            tensors = [("q_proj", queries), ("k_proj", shared), ("v_proj", shared)]
        return at.rule(
            f"self_attention.linear_qkv.{kind}",
            [(f"self_attn.{name}.{kind}", (rows, *columns)) for name, rows in tensors],
            layout=self._row_order(),
            split="rows",
        )

    def _row_order(self) -> Layout:
        order = Interleaved(self.num_groups)
        width, shared = self.num_heads * self.head_dim, self.num_groups * self.head_dim
        if self.is_fused:
            starts = ((0, width), (width, shared), (width + shared, shared))
            return Regrouped(order, tuple((0, Span(start, size)) for start, size in starts))
        if self.has_output_gate:
            heads = [
                Span(first, self.head_dim, self.num_heads, 2 * self.head_dim)
                for first in (0, self.head_dim)
            ]
            whole = Span(0, shared)
            return Regrouped(order, ((0, heads[0]), (0, heads[1]), (1, whole), (2, whole)))
        return order

    def transformer(self, num_layers: int) -> dict[str, Any]:
        """Fields of `TransformerConfig`."""
        fields: dict[str, Any] = {
            "num_attention_heads": self.num_heads,
            "num_query_groups": self.num_groups,
            "kv_channels": self.head_dim,
            "add_qkv_bias": self.has_qkv_bias,
            "qk_layernorm": self.has_qk_norm,
        }
        if self.has_output_gate:
            fields["attention_output_gate"] = True
        if self.has_sinks:
            fields["softmax_type"] = "learnable"
        if self.softmax_scale is not None:
            fields["softmax_scale"] = self.softmax_scale
        if self.window is not None and self.windowed_layers:
            # Megatron-Core counts the tokens before; a list says for each layer whether.
            fields["window_size"] = (self.window - 1, 0)
            fields["window_attn_skip_freq"] = [
                int(layer in self.windowed_layers) for layer in range(num_layers)
            ]
        return fields
