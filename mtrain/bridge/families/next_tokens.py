"""Multi-token prediction: layers behind the last one that predict the tokens after the next."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mtrain.bridge.families.layers import LayerNames
from mtrain.bridge.rules import Concatenated, IgnoredKey, Regrouped, Rule
from mtrain.bridge.spans import Span

_LAYER = "transformer_layer."


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokens:
    """The layers of multi-token prediction and their Hugging Face names.

    Attributes:
        prefixes: What begins the names of each layer's own tensors.
        layer_prefixes: What begins those of the decoder layer in it.
        embedding_norm: Norm of the embedding of the next token.
        hidden_norm: Norm of the hidden state.
        projection: Linear that joins the two.
        final_norm: Norm before the head.
        copies: Tensors of each layer that copy one of the model: name in the layer, and the copied.
        hidden_first: Whether the hidden state comes first in what is joined; Megatron-Core has the
            embedding first.
    """

    prefixes: tuple[str, ...]
    layer_prefixes: tuple[str, ...]
    embedding_norm: str = "enorm"
    hidden_norm: str = "hnorm"
    projection: str = "eh_proj"
    final_norm: str = "shared_head.norm"
    copies: tuple[tuple[str, str], ...] = ()
    hidden_first: bool = False

    @property
    def num_layers(self) -> int:
        """How many layers there are, and so how many more tokens are predicted."""
        return len(self.prefixes)

    def first(self, num_layers: int) -> NextTokens:
        """The first of these layers alone."""
        return replace(
            self,
            prefixes=self.prefixes[:num_layers],
            layer_prefixes=self.layer_prefixes[:num_layers],
        )

    def left_out(self, num_built: int) -> tuple[IgnoredKey, ...]:
        """What a checkpoint may hold besides the first `num_built` layers."""
        copied = tuple(
            IgnoredKey(
                re.escape(prefix + name),
                "a copy for other programs",
                copy_of=original,
                is_carried=True,
            )
            for prefix in self.prefixes[:num_built]
            for name, original in self.copies
        )
        others = tuple(
            IgnoredKey(
                re.escape(prefix) + ".*",
                "multi-token prediction is not trained; see --mtp_num_layers",
                is_carried=True,
            )
            for prefix in self.prefixes[num_built:]
        )
        return copied + others

    def rules(
        self, hidden_size: int, *, layer_rules: Callable[[LayerNames], Sequence[Rule]]
    ) -> tuple[Rule, ...]:
        """Rules of their weights.

        Args:
            hidden_size: Width of the residual stream.
            layer_rules: Gives the rules of the decoder layer of each.
        """
        rules: list[Rule] = []
        halves = (Span(hidden_size, hidden_size), Span(0, hidden_size))
        swapped = Regrouped(Concatenated(), tuple((0, half) for half in halves))
        for number, (prefix, layer_prefix) in enumerate(
            zip(self.prefixes, self.layer_prefixes, strict=True)
        ):
            megatron = f"mtp.layers.{number}."
            at = LayerNames(megatron=megatron, hf=prefix, place="mtp")
            norms = {
                "enorm": self.embedding_norm,
                "hnorm": self.hidden_norm,
                "final_layernorm": self.final_norm,
            }
            rules += [
                at.rule(f"{ours}.weight", [(f"{theirs}.weight", (hidden_size,))])
                for ours, theirs in norms.items()
            ]
            rules.append(
                at.rule(
                    "eh_proj.weight",
                    [(f"{self.projection}.weight", (hidden_size, 2 * hidden_size))],
                    columns=swapped if self.hidden_first else None,
                    split="rows",
                )
            )
            rules += layer_rules(
                LayerNames(megatron=megatron + _LAYER, hf=layer_prefix, place="mtp")
            )
        return tuple(rules)
