"""Rules of decoder layers: what the parts of a family's table have in common.

`LayerNames` says where a layer's parameters and tensors are; the same rules then serve ordinary
layers and the layers of multi-token prediction, which have other names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mtrain.bridge.rules import HFTensor, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """Names of some layers of one kind.

    Attributes:
        numbers: Their numbers; empty for what is not numbered.
        megatron: What begins the names of their parameters.
        hf: What begins the names of their tensors.
        place: As in `Rule`.
    """

    numbers: tuple[int, ...] = ()
    megatron: str = "decoder.layers.{layer}."
    hf: str = "model.layers.{layer}."
    place: Literal["layers", "mtp"] = "layers"

    def rule(
        self,
        megatron: str,
        hf: Sequence[tuple[str, tuple[int, ...]] | HFTensor],
        *,
        plain: str | None = None,
        **fields: Any,
    ) -> Rule:
        """A rule of these layers.

        Args:
            megatron: Name of the parameter inside the layer.
            hf: Name inside the layer and shape of each tensor, or a tensor with such a name.
            plain: As in `Rule`, inside the layer.
            **fields: Other fields of the rule.
        """
        tensors = (one if isinstance(one, HFTensor) else HFTensor(*one) for one in hf)
        return Rule(
            megatron=self.megatron + megatron,
            plain=None if plain is None else self.megatron + plain,
            hf=tuple(HFTensor(self.hf + one.name, one.shape, one.dtype) for one in tensors),
            place=self.place,
            layers=self.numbers,
            **fields,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """Names of a layer's norms; None for one that it has not.

    Attributes:
        before_attention: Of the input of attention.
        after_attention: Of its output, before it is added.
        before_mlp: Of the input of the MLP.
        after_mlp: Of its output, before it is added.
    """

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None

    @property
    def has_sublayer_norms(self) -> bool:
        """Whether outputs are normalised before they are added."""
        return self.after_attention is not None

    def sublayer_rules(self, at: LayerNames, hidden_size: int) -> tuple[Rule, ...]:
        """Rules of the norms of outputs."""
        named = (("self_attn_bda", self.after_attention), ("mlp_bda", self.after_mlp))
        return tuple(
            at.rule(f"{module}.norm.weight", [(f"{name}.weight", (hidden_size,))])
            for module, name in named
            if name is not None
        )
