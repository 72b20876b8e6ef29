"""Finds the factors in an adapter file by name and shape, in PEFT's two layouts.

Every factor that is found is checked here: both halves are there, shapes fit the model, and all
experts of a layer have one of the same rank. The caller sees what is left over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from mtrain.bridge.rules import HFTensor, Rule, WeightTable, filled, layers_of
from mtrain.bridge.sources import StoredShape
from mtrain.lora.adapter_settings import MAX_RANK, AdapterSettings
from mtrain.lora.fused_experts import (
    FusedFactors,
    FusedParameter,
    fused_names,
    fused_parameters,
    split_ranks,
    used_ranks,
)
from mtrain.lora.model_names import table_in_model
from mtrain.lora.plan import factor_names, kind_of, module_name

Tensors = Mapping[str, StoredShape]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProjection:
    """The adapter of a projection in one layer, of all its experts if it has them.

    Attributes:
        rule: Rule of the weight.
        source: Which of the rule's Hugging Face tensors it is.
        layer: The layer; None for what is not in one.
        rank: Its rank.
        stored_rank: Rank of the factors that it is stored in; larger where they serve two.
        lookup_names: Names under which PEFT looks its rank and alpha up.
        tensors: Names of the stored factors.
    """

    rule: Rule
    source: int
    layer: int | None
    rank: int
    stored_rank: int
    lookup_names: tuple[str, ...]
    tensors: tuple[str, ...]


def find_projections(
    tensors: Tensors, table: WeightTable, settings: AdapterSettings
) -> Iterator[StoredProjection]:
    """Finds adapters of single linears and single experts.

    Raises:
        ValueError: One is incomplete or has a wrong shape.
    """
    in_model = table_in_model(table)
    for rule, known in zip(table.rules, in_model.rules, strict=True):
        if rule.is_duplicate or kind_of(rule) is None:
            continue
        is_embedding = kind_of(rule) == "embedding"
        experts = range(rule.num_experts) if rule.num_experts else (None,)
        for layer in layers_of(rule):
            for source, tensor in enumerate(rule.hf):
                named = [_in_place(tensor, layer, expert) for expert in experts]
                ranks = [_stored_rank(tensors, one, is_embedding=is_embedding) for one in named]
                if not any(ranks):
                    continue
                _check_experts(named, ranks)
                looked_up = [_in_place(known.hf[source], layer, expert) for expert in experts]
                yield StoredProjection(
                    rule=rule,
                    source=source,
                    layer=layer,
                    rank=ranks[0],
                    stored_rank=ranks[0],
                    lookup_names=tuple(settings.lookup_name(module_name(one)) for one in looked_up),
                    tensors=tuple(
                        name
                        for one in named
                        for name in factor_names(one, is_embedding=is_embedding)
                    ),
                )


def find_fused(tensors: Tensors, table: WeightTable) -> list[FusedFactors]:
    """Finds adapters of fused parameters; where two projections share one, its B is read.

    Raises:
        ValueError: One is incomplete or has a wrong shape.
    """
    by_container: dict[str, list[FusedParameter]] = {}
    for parameter in fused_parameters(table):
        by_container.setdefault(parameter.container, []).append(parameter)
    found = [
        factors
        for parameters in by_container.values()
        for layer in parameters[0].rule.layers
        for factors in _find_in_module(tensors, parameters, layer)
    ]
    return _with_spans(tensors, found)


def fused_projections(factors: FusedFactors) -> Iterator[StoredProjection]:
    """The projections that a pair of fused factors holds."""
    for source, span in enumerate(factors.spans):
        if span is not None:
            yield StoredProjection(
                rule=factors.parameter.rule,
                source=source,
                layer=factors.layer,
                rank=len(span),
                stored_rank=factors.rank,
                lookup_names=(factors.parameter.lookup_name(factors.layer),),
                tensors=factors.names,
            )


def _in_place(tensor: HFTensor, layer: int | None, expert: int | None) -> HFTensor:
    return replace(tensor, name=filled(tensor.name, layer=layer, expert=expert))


def _stored_rank(tensors: Tensors, weight: HFTensor, *, is_embedding: bool) -> int:
    """Rank of the adapter of a weight; 0 for none."""
    a_name, b_name = factor_names(weight, is_embedding=is_embedding)
    if not _is_pair(tensors, a_name, b_name):
        return 0
    out_size, in_size = reversed(weight.shape) if is_embedding else weight.shape
    a_shape, b_shape = tensors[a_name].shape, tensors[b_name].shape
    rank = a_shape[0] if len(a_shape) == 2 else 0
    if len(a_shape) != 2 or a_shape[1] != in_size or not 0 < rank <= MAX_RANK:
        raise ValueError(
            f"{a_name} has shape {list(a_shape)}, expected [rank, {in_size}] with a rank from 1 to "
            f"{MAX_RANK}"
        )
    if b_shape != (out_size, rank):
        raise ValueError(f"{b_name} has shape {list(b_shape)}, expected {[out_size, rank]}")
    return rank


def _is_pair(tensors: Tensors, a_name: str, b_name: str) -> bool:
    if (a_name in tensors) != (b_name in tensors):
        there, missing = (a_name, b_name) if a_name in tensors else (b_name, a_name)
        raise ValueError(f"has {there}, but no {missing}")
    return a_name in tensors


def _check_experts(named: list[HFTensor], ranks: list[int]) -> None:
    """All experts of a layer are one parameter, so their adapters have one shape."""
    rank = max(ranks)
    for one, other in zip(named, ranks, strict=True):
        if other != rank:
            having = f"an adapter of rank {other}" if other else "no adapter"
            first = module_name(named[ranks.index(rank)])
            raise ValueError(
                f"{module_name(one)} has {having}, and {first} one of rank {rank}; adapters of all "
                "experts of a layer must have the same rank"
            )


def _find_in_module(
    tensors: Tensors, parameters: list[FusedParameter], layer: int
) -> list[FusedFactors]:
    container = parameters[0].container
    depth = 0
    while depth < len(parameters) and _is_pair(
        tensors, *fused_names(container, layer, depth=depth)
    ):
        depth += 1
    if not depth:
        return []
    # Names do not say which parameters these are, but shapes do.
    candidates = [
        [
            _fitting(tensors, parameter, layer, depth - 1 - index)
            for index, parameter in enumerate(some)
        ]
        for some in combinations(parameters, depth)
    ]
    for candidate in candidates:
        if all(candidate):
            return candidate
    a_name, b_name = fused_names(container, layer, depth=depth - 1)
    expected = " or ".join(
        f"[n, {in_size}] and [{out_size}, n]"
        for (_, in_size), (out_size, _) in (one.factor_shapes(1) for one in parameters)
    )
    raise ValueError(
        f"{a_name} has shape {list(tensors[a_name].shape)} and {b_name} has "
        f"{list(tensors[b_name].shape)}, expected {expected}, where n is the number of experts "
        f"({parameters[0].num_experts}) times a rank from 1 to {MAX_RANK}"
    )


def _fitting(
    tensors: Tensors, parameter: FusedParameter, layer: int, depth: int
) -> FusedFactors | None:
    """The factors of a parameter, if shapes allow that they are its."""
    a_name, b_name = fused_names(parameter.container, layer, depth=depth)
    shapes = (tensors[a_name].shape, tensors[b_name].shape)
    rank = shapes[0][0] // parameter.num_experts if shapes[0] else 0
    if not 0 < rank <= MAX_RANK or shapes != parameter.factor_shapes(rank):
        return None
    return FusedFactors(
        parameter=parameter,
        layer=layer,
        depth=depth,
        rank=rank,
        spans=(range(rank),) * len(parameter.rule.hf),
    )


def _with_spans(tensors: Tensors, found: list[FusedFactors]) -> list[FusedFactors]:
    """Takes blocks apart, in the same way in all layers that have the same rank."""
    shared: dict[tuple[Rule, int], list[FusedFactors]] = {}
    for factors in found:
        if len(factors.spans) == 2:
            shared.setdefault((factors.parameter.rule, factors.rank), []).append(factors)
    if not shared:
        return found
    spans = {key: _read_spans(tensors, alike) for key, alike in shared.items()}
    return [
        replace(factors, spans=spans.get((factors.parameter.rule, factors.rank), factors.spans))
        for factors in found
    ]


def _read_spans(tensors: Tensors, alike: list[FusedFactors]) -> tuple[range | None, range | None]:
    from safetensors import safe_open

    path: Path = tensors[alike[0].names[1]].path
    used = []
    with safe_open(path, framework="pt") as file:
        for factors in alike:
            lora_b = file.get_tensor(factors.names[1])
            used.append(used_ranks(lora_b, factors.parameter, factors.rank))
            if used[-1][0] > used[-1][1]:
                break  # not block-diagonal, whatever the other layers are
    return split_ranks(used, alike[0].rank)
