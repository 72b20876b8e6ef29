"""MLPs, experts and shared experts as rules and as Megatron-Core configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mtrain.bridge.families.layers import LayerNames
from mtrain.bridge.rules import Concatenated, HFTensor, Regrouped, Rule
from mtrain.bridge.spans import Span
from mtrain.bridge.storage.forms import StorageForm, stacked_experts


def gated_mlp_rules(
    at: LayerNames, *, hidden_size: int, width: int, norm: str, is_fused: bool = False
) -> tuple[Rule, ...]:
    """Rules of `down(act(gate(x)) * up(x))`.

    Args:
        at: The layers.
        hidden_size: Width outside.
        width: Width inside.
        norm: Name of the norm before it.
        is_fused: One tensor `gate_up_proj` holds the rows of the gate, then of up.
    """
    return (
        at.rule(
            "mlp.linear_fc1.layer_norm_weight",
            [(f"{norm}.weight", (hidden_size,))],
            plain="pre_mlp_layernorm.weight",
        ),
        _gate_and_up(at, "mlp.linear_fc1", "mlp", hidden_size, width, is_fused=is_fused),
        at.rule(
            "mlp.linear_fc2.weight",
            [("mlp.down_proj.weight", (hidden_size, width))],
            split="columns",
        ),
    )


def _gate_and_up(
    at: LayerNames, megatron: str, hf: str, hidden_size: int, width: int, *, is_fused: bool = False
) -> Rule:
    if is_fused:
        halves = tuple((0, Span(first, width)) for first in (0, width))
        return at.rule(
            f"{megatron}.weight",
            [(f"{hf}.gate_up_proj.weight", (2 * width, hidden_size))],
            layout=Regrouped(Concatenated(), halves),
            split="rows",
        )
    return at.rule(
        f"{megatron}.weight",
        [(f"{hf}.{name}.weight", (width, hidden_size)) for name in ("gate_proj", "up_proj")],
        split="rows",
    )


STACKED = stacked_experts("model.layers.{layer}.mlp.experts.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExperts:
    """An MLP that every token goes through besides its experts.

    Attributes:
        width: Its width.
        name: Its Hugging Face name inside the layer.
        gate: Hugging Face name of the gate of its output; None where there is none.
    """

    width: int
    name: str
    gate: str | None = None

    def rules(self, at: LayerNames, hidden_size: int) -> tuple[Rule, ...]:
        """Rules of its weights."""
        down = [(f"{self.name}.down_proj.weight", (hidden_size, self.width))]
        rules = [
            _gate_and_up(at, "mlp.shared_experts.linear_fc1", self.name, hidden_size, self.width),
            at.rule("mlp.shared_experts.linear_fc2.weight", down, split="columns"),
        ]
        if self.gate is not None:
            gate = [(f"{self.gate}.weight", (1, hidden_size))]
            rules.append(at.rule("mlp.shared_experts.gate_weight", gate))
        return tuple(rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture-of-experts part of a decoder.

    Attributes:
        num_experts: Experts in each such layer.
        ffn_hidden_size: Width of one expert.
        topk: Experts that a token goes to.
        renormalises: Whether the weights of a token's experts sum to one (before `scaling`).
        layers: Layers that have experts; the others are dense.
        score_function: What makes scores of the router's logits.
        has_score_bias: Whether a bias, which no gradient trains, is added to choose experts.
        num_groups: Groups of experts of which only some are chosen from; None for one group.
        group_topk: Groups that a token chooses from.
        group_scores: Best scores of a group whose sum is that of the group.
        scaling: Factor of the weights of experts.
        shared: The shared expert, if there is one.
        router: Hugging Face name of the router inside the layer.
        name: Hugging Face name of an expert inside the layer, with `{expert}` open.
        projections: Hugging Face names of gate, up and down inside the expert.
        has_biases: Whether router and experts have biases.
        forms: Ways in which files hold all experts of a layer at once.
    """

    num_experts: int
    ffn_hidden_size: int
    topk: int
    renormalises: bool
    layers: tuple[int, ...]
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    has_score_bias: bool = False
    num_groups: int | None = None
    group_topk: int | None = None
    group_scores: int | None = None
    scaling: float | None = None
    shared: SharedExperts | None = None
    router: str = "mlp.gate"
    name: str = "mlp.experts.{expert}"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    has_biases: bool = False
    forms: tuple[StorageForm, ...] = STACKED

    def rules(self, at: LayerNames, hidden_size: int, *, norm: str) -> tuple[Rule, ...]:
        """Rules of the weights of some layers; `norm` is the norm before the experts."""
        rules = [
            at.rule("pre_mlp_layernorm.weight", [(f"{norm}.weight", (hidden_size,))]),
            at.rule(
                "mlp.router.weight", [(f"{self.router}.weight", (self.num_experts, hidden_size))]
            ),
            *self._expert_rules(at, "weight", hidden_size),
        ]
        if self.has_biases:
            rules += [
                at.rule("mlp.router.bias", [(f"{self.router}.bias", (self.num_experts,))]),
                *self._expert_rules(at, "bias", hidden_size),
            ]
        if self.has_score_bias:
            bias = HFTensor(f"{self.router}.e_score_correction_bias", (self.num_experts,), "F32")
            rules.append(at.rule("mlp.router.expert_bias", [bias]))
        if self.shared:
            rules += self.shared.rules(at, hidden_size)
        return tuple(rules)

    def _expert_rules(self, at: LayerNames, kind: str, hidden_size: int) -> tuple[Rule, Rule]:
        gate, up, down = (f"{self.name}.{projection}.{kind}" for projection in self.projections)
        width, is_weight = self.ffn_hidden_size, kind == "weight"
        inner = (width, hidden_size) if is_weight else (width,)
        outer = (hidden_size, width) if is_weight else (hidden_size,)
        return (
            at.rule(
                f"mlp.experts.linear_fc1.{kind}",
                [(gate, inner), (up, inner)],
                split="rows",
                num_experts=self.num_experts,
            ),
            at.rule(
                f"mlp.experts.linear_fc2.{kind}",
                [(down, outer)],
                split="columns" if is_weight else None,
                num_experts=self.num_experts,
            ),
        )

    def transformer(self, num_layers: int) -> dict[str, Any]:
        """Fields of `TransformerConfig`."""
        fields: dict[str, Any] = {
            "num_moe_experts": self.num_experts,
            "moe_ffn_hidden_size": self.ffn_hidden_size,
            "moe_router_topk": self.topk,
            "moe_router_score_function": self.score_function,
            # Softmax over the chosen experts alone gives weights that sum to one; softmax over all
            # of them before choosing does not.
            "moe_router_pre_softmax": self.score_function == "softmax" and not self.renormalises,
            # A list makes Megatron-Core's checkpoints have a name for each layer instead of an
            # axis.
            "moe_layer_freq": 1
            if len(self.layers) == num_layers
            else [int(layer in self.layers) for layer in range(num_layers)],
        }
        if self.has_score_bias:
            fields["moe_router_enable_expert_bias"] = True
        if self.num_groups is not None:
            fields["moe_router_num_groups"] = self.num_groups
            fields["moe_router_group_topk"] = self.group_topk
        if self.scaling is not None:
            fields["moe_router_topk_scaling_factor"] = self.scaling
        if self.shared:
            fields["moe_shared_expert_intermediate_size"] = self.shared.width
            fields["moe_shared_expert_gate"] = self.shared.gate is not None
        return fields
