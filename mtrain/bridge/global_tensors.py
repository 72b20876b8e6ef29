"""A model as Megatron-Core's checkpoints see it: whole parameters, layers and experts stacked.

The one thing to know: a parameter of a whole model is that of a single rank, so the plan of one
rank says how it is made. What is added here are the names and the axes that checkpoints put in
front: `decoder.layers.mlp.experts.experts.linear_fc1.weight` is `[layer, expert, out, in]`. Models
whose layers differ have a name for each layer instead of that axis.
Source: Megatron-Core's `TransformerBlock.sharded_state_dict` and `TEGroupedMLP.sharded_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mtrain.bridge.plan import ParameterPlan, Shape, plan_rank
from mtrain.bridge.rules import Padded, WeightTable, filled
from mtrain.bridge.spans import Piece
from mtrain.parallel import ParallelLayout

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERTS = (".mlp.experts.", ".mlp.experts.experts.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalParameter:
    """A parameter of the whole model; of all experts of a layer together.

    Attributes:
        name: Its name in a checkpoint, with `{layer}` open.
        layer: Its layer; None outside of layers.
        num_layers: Layers of the model.
        num_experts: Experts that are stacked; None where there are none.
        shape: Its shape, without the axes of layers and experts.
        pieces: What it is made of.
        may_be_padded: Whether checkpoints may have rows more (of a padded vocabulary).
        has_gaps: Whether there are elements that no piece fills; they are zero.
    """

    name: str
    layer: int | None
    num_layers: int
    num_experts: int | None
    shape: Shape
    pieces: tuple[Piece, ...]
    may_be_padded: bool
    has_gaps: bool

    def key(self, *, stacked: bool) -> str:
        """Name in a checkpoint that stacks layers, or in one that does not."""
        if stacked:
            return self.name.replace("{layer}.", "")
        return filled(self.name, layer=self.layer)

    def front(self, *, stacked: bool, expert: int | None) -> tuple[tuple[int, int], ...]:
        """(index, size) on each axis that checkpoints put in front."""
        axes = []
        if stacked and self.layer is not None:
            axes.append((self.layer, self.num_layers))
        if expert is not None:
            assert self.num_experts is not None, "an index of an expert where there is none"
            axes.append((expert, self.num_experts))
        return tuple(axes)

    @property
    def experts(self) -> tuple[int | None, ...]:
        """Indices of the experts; (None,) where there are none."""
        return (None,) if self.num_experts is None else tuple(range(self.num_experts))

    def pieces_of(self, expert: int | None) -> tuple[Piece, ...]:
        """What one expert, or a parameter without experts, is made of."""
        return tuple(piece for piece in self.pieces if piece.expert == expert)


def global_parameters(table: WeightTable) -> tuple[GlobalParameter, ...]:
    """All parameters of a model, in its order.

    Args:
        table: Weights of the model, or of an adapter.
    """
    padded = {
        rule.megatron
        for rule in table.rules
        if isinstance(rule.layout, Padded) and rule.split == "rows"
    }
    plan = plan_rank(table, layout=ParallelLayout(), rank=0, uses_stored_names=True)
    return tuple(_global(parameter, table, parameter.name in padded) for parameter in plan)


def has_equal_layers(table: WeightTable) -> bool:
    """Whether every parameter is in all layers, so that checkpoints stack them."""
    rules = [rule for rule in table.rules if rule.place == "layers" and rule.layers]
    return all(len(rule.layers) == table.num_layers for rule in rules)


def places_by_name(
    parameters: tuple[GlobalParameter, ...],
) -> dict[str, list[tuple[GlobalParameter, Piece]]]:
    """Where the parts of every Hugging Face tensor are."""
    places: dict[str, list[tuple[GlobalParameter, Piece]]] = {}
    for parameter, piece in _all_pieces(parameters):
        places.setdefault(piece.hf_name, []).append((parameter, piece))
    return places


def _all_pieces(
    parameters: tuple[GlobalParameter, ...],
) -> Iterator[tuple[GlobalParameter, Piece]]:
    for parameter in parameters:
        for piece in parameter.pieces:
            yield parameter, piece


def _global(parameter: ParameterPlan, table: WeightTable, is_padded: bool) -> GlobalParameter:
    match = _LAYER.match(parameter.name)
    name = _LAYER.sub("decoder.layers.{layer}.", parameter.name).replace(*_EXPERTS)
    has_experts = parameter.pieces[0].expert is not None
    return GlobalParameter(
        name=name,
        layer=int(match[1]) if match else None,
        num_layers=table.num_layers,
        num_experts=parameter.shape[0] if has_experts else None,
        shape=parameter.shape[1:] if has_experts else parameter.shape,
        pieces=parameter.pieces,
        may_be_padded=is_padded,
        has_gaps=parameter.num_padding > 0,
    )
