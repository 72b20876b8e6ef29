"""Which projections have an adapter, and where its factors lie: the weight table of an adapter.

An adapter of a projection is `scale * B @ A`, A `[rank, in]` and B `[out, rank]`. A Megatron linear
that fuses several projections has one pair of parameters for all of them:

- `lora_a` `[num_adapted * rank, in]`: the A of its projections one after the other.
- `lora_b` `[out, rank]`: its rows are those of the linear's own weight, each row of the B of the
  projection that it belongs to. Rows of a projection without adapter stay zero.

The one thing to know: rows of `lora_b` are cut and ordered like the rows of the weight, and columns
of `lora_a` like its columns, so one layout serves both, and adapters are loaded and saved by the
bridge with rules made here. Where ranks differ inside a linear, both are padded with zeros to the
largest; a zero column of B meets a zero row of A, so they stay zero in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mtrain.bridge.rules import (
    Concatenated,
    HFTensor,
    Rule,
    Selected,
    Spaced,
    WeightTable,
)

# Where PEFT puts the model below its own wrappers.
PEFT_PREFIX = "base_model.model."
ADAPTER_CHILD = "adapter"

Kind = Literal["column", "row", "replicated", "router", "gate", "embedding", "experts"]
# Weights whose names say what they are; other linears are told by how they are split.
_NAMED_KINDS: dict[str, Kind | None] = {
    ".word_embeddings.weight": "embedding",
    ".position_embeddings.weight": None,
    ".router.weight": "router",
    ".shared_experts.gate_weight": "gate",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The adapter of one projection.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Numerator of the scale.
        use_rslora: Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
    """

    rank: int
    alpha: float
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """Factor of B @ A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedLinear:
    """A Megatron linear (or embedding) with adapters, in all layers where they are the same.

    Attributes:
        rule: Rule of its weight.
        adapters: The adapter of each of the rule's Hugging Face tensors; None for no adapter.
        layers: Layers, as in `Rule.layers`; empty for what is not in a layer.
    """

    rule: Rule
    adapters: tuple[Adapter | None, ...]
    layers: tuple[int, ...]

    @property
    def sources(self) -> tuple[int, ...]:
        """Indices of the rule's Hugging Face tensors that have an adapter."""
        return tuple(index for index, adapter in enumerate(self.adapters) if adapter)

    @property
    def rank(self) -> int:
        """The largest rank, to which the factors are padded."""
        return max(adapter.rank for adapter in self.adapters if adapter)

    @property
    def kind(self) -> Kind:
        """What kind of module it is."""
        kind = kind_of(self.rule)
        assert kind is not None, f"{self.rule.megatron} can have no adapter"
        return kind


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPlan:
    """All that an adapter consists of.

    Attributes:
        linears: Linears with adapters.
        modules_to_save: Rules of parameters that are trained whole and saved next to the factors.
    """

    linears: tuple[AdaptedLinear, ...]
    modules_to_save: tuple[Rule, ...] = ()


def kind_of(rule: Rule) -> Kind | None:
    """What kind of module a weight belongs to, as far as adapters are concerned.

    A "replicated" linear is whole on every tensor-parallel rank and sees its part of the sequence;
    a "gate" is the weight of a shared expert's gate, which Megatron-Core has as a bare parameter.

    Returns:
        The kind; None for what has no adapter: norms, biases, convolutions, learned positions.
    """
    is_matrix = all(len(tensor.shape) == 2 for tensor in rule.hf)
    if not is_matrix or not rule.megatron.endswith("weight"):
        return None
    if rule.num_experts is not None:
        return "experts"
    for ending, kind in _NAMED_KINDS.items():
        if rule.megatron.endswith(ending):
            return kind
    if rule.split is None:
        return "replicated"
    return "column" if rule.split == "rows" else "row"


def tied_tensors(table: WeightTable) -> set[HFTensor]:
    """Embeddings that are output layers too, by their one name."""
    return {
        tensor
        for rule in table.rules
        if rule.is_duplicate and rule.place == "last"
        for tensor in rule.hf
    }


def module_of(parameter: str) -> str:
    """Name of the module that a parameter belongs to."""
    return parameter.rpartition(".")[0]


def module_name(tensor: HFTensor) -> str:
    """The Hugging Face module that a weight belongs to, with `{layer}` and `{expert}` open."""
    return tensor.name.removesuffix(".weight")


def endings(name: str) -> Iterator[str]:
    """Ends of a name at its dots, the shortest first, as people and PEFT name modules."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in reversed(range(len(parts))))


def factor_names(tensor: HFTensor, *, is_embedding: bool = False) -> tuple[str, str]:
    """PEFT's names of A and B in an adapter file, with `{layer}` and `{expert}` open."""
    module = PEFT_PREFIX + module_name(tensor)
    if is_embedding:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def adapter_table(table: WeightTable, lora: LoraPlan) -> WeightTable:
    """The weight table of an adapter: what its file holds and where that lies in the model.

    Args:
        table: Weights of the model.
        lora: The adapters.
    """
    rules = [rule for linear in lora.linears for rule in _factor_rules(linear)]
    rules += [_saved_rule(rule) for rule in lora.modules_to_save]
    return WeightTable(num_layers=table.num_layers, rules=tuple(rules))


def check_mergeable(table: WeightTable, lora: LoraPlan) -> None:
    """Refuses what merging would change the meaning of.

    An adapter of an embedding adapts the lookup alone, as in PEFT. Where the output layer is the
    same tensor, a merge would change that too.

    Args:
        table: Weights of the model.
        lora: The adapters.

    Raises:
        ValueError: The adapter cannot be merged.
    """
    tied = tied_tensors(table)
    for linear in lora.linears:
        if linear.kind == "embedding" and tied.intersection(linear.rule.hf):
            raise ValueError(
                f"the adapter of {module_name(linear.rule.hf[0])} cannot be merged: this model "
                "uses the tensor as output layer too, which the adapter leaves alone; use "
                "--merge_lora false"
            )


def _factor_rules(linear: AdaptedLinear) -> tuple[Rule, Rule]:
    rule, rank = linear.rule, linear.rank
    is_embedding = linear.kind == "embedding"
    a_tensors, b_tensors = [], []
    for source in linear.sources:
        tensor, adapter = rule.hf[source], linear.adapters[source]
        assert adapter is not None
        a_name, b_name = factor_names(tensor, is_embedding=is_embedding)
        # PEFT looks the rows of an embedding's A up, so there the weight is transposed.
        out_size, in_size = reversed(tensor.shape) if is_embedding else tensor.shape
        a_tensors.append(HFTensor(a_name, (adapter.rank, in_size)))
        b_tensors.append(HFTensor(b_name, (out_size, adapter.rank)))
    prefix = rule.megatron.removesuffix("weight") + ADAPTER_CHILD
    common = {"place": rule.place, "layers": linear.layers, "num_experts": rule.num_experts}
    lora_a = Rule(
        megatron=f"{prefix}.lora_a",
        hf=tuple(a_tensors),
        layout=Spaced(rank),
        columns=rule.columns,
        **common,
    )
    lora_b = Rule(megatron=f"{prefix}.lora_b", hf=tuple(b_tensors), **common)
    if is_embedding:
        return replace(lora_a, split="columns", layout=rule.layout), lora_b
    if rule.split == "columns":
        return replace(lora_a, split="columns", layout=Concatenated()), lora_b
    num_rows = tuple(tensor.shape[0] for tensor in rule.hf)
    layout = Selected(rule.layout, num_rows=num_rows, sources=linear.sources)
    return lora_a, replace(lora_b, split=rule.split, layout=layout)


def _saved_rule(rule: Rule) -> Rule:
    renamed = tuple(replace(tensor, name=PEFT_PREFIX + tensor.name) for tensor in rule.hf)
    return replace(rule, hf=renamed)
