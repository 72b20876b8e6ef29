"""Expands a weight table into the copies that one rank makes.

Pure arithmetic: a plan needs no GPU, no process group and no model; any rank can compute that of
any other. Loading runs the pieces of a plan forwards, saving runs them backwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from mtrain.bridge.families import find_family
from mtrain.bridge.rules import Rule, WeightTable, divided, filled
from mtrain.bridge.spans import Box, Piece, box_size, whole
from mtrain.bridge.stages import chunk_layers
from mtrain.parallel import Coordinates, ParallelLayout

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPlan:
    """How one parameter of a model chunk is filled.

    Attributes:
        chunk: Index of the model chunk on this rank.
        name: Name in that chunk; its layer number counts from the chunk's first layer.
        shape: Shape of the local shard.
        pieces: The copies; what they leave out is padding and stays zero.
        split_over: Process group whose ranks hold the other parts; None if this is all of it.
        is_duplicate: Loaded here, but saved from another parameter.
    """

    chunk: int
    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    split_over: Literal["tp", "etp"] | None
    is_duplicate: bool

    @property
    def num_padding(self) -> int:
        """Elements that no piece fills."""
        return prod(self.shape) - sum(box_size(piece.local) for piece in self.pieces)


Plan = tuple[ParameterPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHome:
    """A Hugging Face tensor of the whole model and who owns it.

    Attributes:
        name: Its name.
        shape: Its shape.
        pp_rank: Pipeline stage that owns it.
        ep_rank: Expert-parallel rank that owns it; None if it is no expert's.
    """

    name: str
    shape: Shape
    pp_rank: int
    ep_rank: int | None


def weight_table(hf_config: Mapping[str, Any], num_next_tokens: int = 0) -> WeightTable:
    """The weight table of a model from its config.json.

    Args:
        hf_config: The config.
        num_next_tokens: Layers of multi-token prediction that the model is built with.

    Raises:
        ValueError: No family supports it, or it asks for something that is not built.
    """
    return find_family(hf_config).weight_table(hf_config, num_next_tokens)


def hf_tensors(table: WeightTable) -> dict[str, Shape]:
    """Names and shapes of all Hugging Face tensors of a model, in the order of the model."""
    return {home.name: home.shape for home in locate_tensors(table, layout=ParallelLayout())}


def locate_tensors(table: WeightTable, *, layout: ParallelLayout) -> Iterator[TensorHome]:
    """Lists every Hugging Face tensor once, in the order of the model, with its owner.

    Raises:
        ValueError: The model cannot be split that way.
    """
    stage_of = {
        layer: pp_rank
        for pp_rank in range(layout.pp_size)
        for layers in chunk_layers(table.num_layers, layout=layout, pp_rank=pp_rank)
        for layer in layers
    }
    rules = [rule for rule in table.rules if not rule.is_duplicate]
    for rule in rules:
        if rule.place == "first":
            yield from _homes(rule, layer=None, pp_rank=0, ep_size=1)
    for layer in range(table.num_layers):
        for rule in rules:
            if layer in rule.layers:
                yield from _homes(
                    rule, layer=layer, pp_rank=stage_of[layer], ep_size=layout.ep_size
                )
    for rule in rules:
        if rule.place in ("last", "mtp"):
            yield from _homes(rule, layer=None, pp_rank=layout.pp_size - 1, ep_size=layout.ep_size)


def plan_rank(
    table: WeightTable, *, layout: ParallelLayout, rank: int, uses_stored_names: bool = False
) -> Plan:
    """Plans every parameter of every model chunk of a rank.

    Args:
        table: Weights of the model.
        layout: Parallel sizes.
        rank: Global rank.
        uses_stored_names: Whether parameters have the names of a torch_dist folder, where the norm
            before a linear belongs to it, instead of those in a chunk.

    Raises:
        ValueError: The model cannot be split that way.
    """
    at = layout.coordinates(rank)
    shards = [
        _make_shard(rule, layout=layout, at=at, uses_stored_names=uses_stored_names)
        for rule in table.rules
    ]
    chunks = chunk_layers(table.num_layers, layout=layout, pp_rank=at.pp_rank)
    parameters: list[ParameterPlan] = []
    for chunk, layers in enumerate(chunks):
        if at.pp_rank == 0 and chunk == 0:
            parameters += [s.plan(chunk) for s in shards if s.rule.place == "first"]
        for layer in layers:
            parameters += [
                shard.plan(chunk, layer=layer, local_layer=layer - layers.start)
                for shard in shards
                if layer in shard.rule.layers
            ]
        if at.pp_rank == layout.pp_size - 1 and chunk == len(chunks) - 1:
            parameters += [s.plan(chunk) for s in shards if s.rule.place in ("last", "mtp")]
    if layout.pp_size == 1:
        # On one stage Megatron-Core shares the parameter instead of keeping a second one.
        parameters = [parameter for parameter in parameters if not parameter.is_duplicate]
    return tuple(parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """A rank's part of a rule's parameter: the same in every layer, so computed once."""

    rule: Rule
    name: str
    shape: Shape
    copies: tuple[tuple[int, Box, Box], ...]
    experts: range | None
    split_over: Literal["tp", "etp"] | None

    def plan(self, chunk: int, *, layer: int | None = None, local_layer: int = 0) -> ParameterPlan:
        """The plan of the parameter in one layer."""
        names = [filled(tensor.name, layer=layer) for tensor in self.rule.hf]
        if self.experts is None:
            pieces = [Piece(names[source], hf, local) for source, hf, local in self.copies]
        else:
            pieces = [
                Piece(filled(names[source], expert=expert), hf, local, index)
                for index, expert in enumerate(self.experts)
                for source, hf, local in self.copies
            ]
        return ParameterPlan(
            chunk=chunk,
            name=filled(self.name, layer=local_layer),
            shape=self.shape,
            pieces=tuple(pieces),
            split_over=self.split_over,
            is_duplicate=self.rule.is_duplicate,
        )


def _make_shard(
    rule: Rule, *, layout: ParallelLayout, at: Coordinates, uses_stored_names: bool
) -> _Shard:
    group: Literal["tp", "etp"] = "tp" if rule.num_experts is None else "etp"
    sizes, ranks = (
        {"tp": layout.tp_size, "etp": layout.etp_size},
        {"tp": at.tp_rank, "etp": at.etp_rank},
    )
    try:
        shape, copies = _split(rule, num_shards=sizes[group], index=ranks[group])
        experts = _local_experts(rule, ep_size=layout.ep_size, ep_rank=at.ep_rank)
    except ValueError as error:
        raise ValueError(f"{rule.megatron}: {error} (layout: {layout})") from error
    return _Shard(
        rule=rule,
        name=rule.megatron if uses_stored_names else rule.name_in_chunk,
        shape=shape if experts is None else (len(experts), *shape),
        copies=copies,
        experts=experts,
        split_over=group if rule.split else None,
    )


def _split(
    rule: Rule, *, num_shards: int, index: int
) -> tuple[Shape, tuple[tuple[int, Box, Box], ...]]:
    """Shape of one shard of a rule's parameter, and (source, there, here) of its copies.

    Sources may differ in width: narrower ones leave padding on the right.
    """
    axis = 1 if rule.split == "columns" else 0
    assert axis == 0 or len(rule.hf) == 1, f"{rule.megatron}: columns of several sources"
    size, parts = rule.layout.shard(
        tuple(tensor.shape[axis] for tensor in rule.hf),
        num_shards=num_shards if rule.split else 1,
        index=index if rule.split else 0,
    )
    widths = zip(*(tensor.shape[1:] for tensor in rule.hf), strict=True)
    shape = (size, *map(max, widths)) if axis == 0 else (rule.hf[0].shape[0], size)
    copies = []
    for part in parts:
        others = whole(rule.hf[part.source].shape)
        for there, here in _columns(rule, others):
            copies.append(
                (
                    part.source,
                    (*there[:axis], part.hf, *there[axis + 1 :]),
                    (*here[:axis], part.local, *here[axis + 1 :]),
                )
            )
    return shape, tuple(copies)


def _columns(rule: Rule, others: Box) -> list[tuple[Box, Box]]:
    """(there, here) of each part of the columns; of all at once where they keep their order."""
    if rule.columns is None:
        return [(others, others)]
    assert rule.split != "columns", f"{rule.megatron}: columns that are split and ordered"
    rows, columns = others
    _, parts = rule.columns.shard((columns.length,), num_shards=1, index=0)
    return [((rows, part.hf), (rows, part.local)) for part in parts]


def _local_experts(rule: Rule, *, ep_size: int, ep_rank: int) -> range | None:
    """Experts of a rank: a contiguous block each, as Megatron-Core's token dispatchers expect."""
    if rule.num_experts is None:
        return None
    num_local = divided(rule.num_experts, ep_size)
    return range(ep_rank * num_local, (ep_rank + 1) * num_local)


def _homes(rule: Rule, *, layer: int | None, pp_rank: int, ep_size: int) -> Iterator[TensorHome]:
    if rule.num_experts is None:
        for tensor in rule.hf:
            yield TensorHome(
                name=filled(tensor.name, layer=layer),
                shape=tensor.shape,
                pp_rank=pp_rank,
                ep_rank=None,
            )
        return
    for ep_rank in range(ep_size):
        for expert in _local_experts(rule, ep_size=ep_size, ep_rank=ep_rank) or ():
            for tensor in rule.hf:
                yield TensorHome(
                    name=filled(tensor.name, layer=layer, expert=expert),
                    shape=tensor.shape,
                    pp_rank=pp_rank,
                    ep_rank=ep_rank,
                )
