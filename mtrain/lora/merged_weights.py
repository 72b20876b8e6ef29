"""Weights of a checkpoint with an adapter merged, computed while they are read.

The one thing to know: base and product are added in float32 and come out in float32; whoever
writes them rounds once. It works on Hugging Face tensors in blocks of rows, so merging needs
neither a model nor memory for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.rules import filled, layers_of
from mtrain.bridge.sources import StoredShape, StoredWeights, TensorShape, TensorSource
from mtrain.lora.adapter_weights import WideSlices
from mtrain.lora.peft_format import StoredAdapter
from mtrain.lora.plan import PEFT_PREFIX, LoraPlan, factor_names


@dataclass(frozen=True, slots=True, kw_only=True)
class _Factors:
    """The adapter of a Hugging Face tensor: names of A and B, and the factor of their product."""

    a_name: str
    b_name: str
    scale: float
    is_embedding: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedWeights:
    """Weights and an adapter; see `StoredWeights`.

    Attributes:
        weights: The weights of the model.
        adapter: The adapter.
        tensors: All tensors of the model; those that the adapter changes are float32.
        factors: The adapter of each tensor that has one.
        saved: Names of tensors that the adapter replaces.
    """

    weights: StoredWeights
    adapter: StoredAdapter
    tensors: Mapping[str, StoredShape]
    factors: Mapping[str, _Factors]
    saved: frozenset[str]

    @property
    def folder(self) -> Path:
        """Folder of the model."""
        return self.weights.folder

    @contextmanager
    def open(self) -> Iterator[TensorSource]:
        """Gives the tensors; read and computed when asked for."""
        with self.weights.open() as base, self.adapter.open() as adapter:
            yield _MergedSource(self, base, adapter)


def merge_weights(weights: StoredWeights, adapter: StoredAdapter) -> MergedWeights:
    """The weights of a model with an adapter merged.

    Args:
        weights: The model.
        adapter: An adapter that fits it.
    """
    factors = dict(_all_factors(adapter.lora))
    saved = frozenset(_saved_names(adapter.lora))
    return MergedWeights(
        weights=weights,
        adapter=adapter,
        tensors={
            name: TensorShape("F32", tensor.shape) if name in factors or name in saved else tensor
            for name, tensor in weights.tensors.items()
        },
        factors=factors,
        saved=saved,
    )


class _MergedSource:
    def __init__(self, merged: MergedWeights, base: TensorSource, adapter: TensorSource) -> None:
        self._merged = merged
        self._base = base
        self._adapter = adapter

    def slices(self, name: str) -> Any:
        """An object that gives parts of a tensor when it is indexed with slices."""
        if name in self._merged.saved:
            return WideSlices(self._adapter.slices(PEFT_PREFIX + name), torch.float32)
        if name not in self._merged.factors:
            return self._base.slices(name)
        factors = self._merged.factors[name]
        lora_a, lora_b = (
            self._adapter.slices(stored)[:].float() for stored in (factors.a_name, factors.b_name)
        )
        return _MergedSlices(self._base.slices(name), lora_a, lora_b * factors.scale, factors)


class _MergedSlices:
    """A merged tensor; a part is computed when it is asked for."""

    def __init__(
        self, stored: Any, lora_a: torch.Tensor, scaled_b: torch.Tensor, factors: _Factors
    ) -> None:
        # Of an embedding PEFT looks up rows of A, so there the product is transposed.
        left, right = (lora_a.t(), scaled_b.t()) if factors.is_embedding else (scaled_b, lora_a)
        self._stored, self._left, self._right = stored, left, right

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The part: base plus product."""
        rows, *columns = key if isinstance(key, tuple) else (key,)
        right = self._right[:, columns[0]] if columns else self._right
        return self._stored[key].float() + self._left[rows] @ right


def _all_factors(lora: LoraPlan) -> Iterator[tuple[str, _Factors]]:
    for linear in lora.linears:
        rule, is_embedding = linear.rule, linear.kind == "embedding"
        layers = linear.layers or (None,)
        experts = range(rule.num_experts) if rule.num_experts else (None,)
        for source, layer, expert in product(linear.sources, layers, experts):
            adapter = linear.adapters[source]
            assert adapter is not None
            names = (
                rule.hf[source].name,
                *factor_names(rule.hf[source], is_embedding=is_embedding),
            )
            weight, a_name, b_name = (filled(n, layer=layer, expert=expert) for n in names)
            yield (
                weight,
                _Factors(
                    a_name=a_name, b_name=b_name, scale=adapter.scale, is_embedding=is_embedding
                ),
            )


def _saved_names(lora: LoraPlan) -> Iterator[str]:
    for rule in lora.modules_to_save:
        experts = range(rule.num_experts) if rule.num_experts else (None,)
        for layer, expert, tensor in product(layers_of(rule), experts, rule.hf):
            yield filled(tensor.name, layer=layer, expert=expert)
