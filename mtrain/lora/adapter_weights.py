"""An adapter as weights: its tensors by PEFT's names, one linear an expert, whatever stores it.

The one thing to know: files may mix dtypes, here all tensors have the widest of them, but for
those that always have the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.file_plan import fixed_dtypes
from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_reader import DTYPES
from mtrain.bridge.sources import TensorShape, TensorSource
from mtrain.lora.peft_format import StoredAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """The tensors of an adapter; see `StoredWeights`.

    Attributes:
        adapter: The adapter.
        tensors: Its tensors by canonical names.
    """

    adapter: StoredAdapter
    tensors: Mapping[str, TensorShape]

    @property
    def folder(self) -> Path:
        """Folder of the adapter."""
        return self.adapter.folder

    @contextmanager
    def open(self) -> Iterator[TensorSource]:
        """Gives the tensors; read when asked for."""
        with self.adapter.open() as source:
            yield _WideSource(source, self.tensors)


def adapter_weights(adapter: StoredAdapter, table: WeightTable) -> AdapterWeights:
    """The tensors of an adapter.

    Args:
        adapter: The adapter.
        table: What they are (`adapter_table`).
    """
    fixed = fixed_dtypes(table)
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtype = names[getattr(torch, adapter.dtype)]
    return AdapterWeights(
        adapter=adapter,
        tensors={
            name: TensorShape(fixed.get(name, dtype), shape)
            for name, shape in hf_tensors(table).items()
        },
    )


class WideSlices:
    """A stored tensor in a wider dtype, in which all its values are exact.

    Args:
        stored: The tensor, or something that gives parts of it when it is indexed with slices.
        dtype: The wider dtype.
    """

    def __init__(self, stored: Any, dtype: torch.dtype) -> None:
        self._stored, self._dtype = stored, dtype

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The part, widened."""
        return self._stored[key].to(self._dtype)


class _WideSource:
    def __init__(self, source: TensorSource, tensors: Mapping[str, TensorShape]) -> None:
        self._source, self._tensors = source, tensors

    def slices(self, name: str) -> WideSlices:
        """An object that gives parts of a tensor when it is indexed with slices."""
        return WideSlices(self._source.slices(name), DTYPES[self._tensors[name].dtype])
