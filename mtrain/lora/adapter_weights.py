"""An adapter as weights: its tensors by PEFT's names, one linear an expert, whatever stores it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mtrain.bridge.converted import ConvertedTensor
from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.sources import TensorSource
from mtrain.lora.peft_format import StoredAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """The tensors of an adapter; see `StoredWeights`.

    Attributes:
        adapter: The adapter.
        tensors: Its tensors by canonical names.
    """

    adapter: StoredAdapter
    tensors: Mapping[str, ConvertedTensor]

    @property
    def folder(self) -> Path:
        """Folder of the adapter."""
        return self.adapter.folder

    def open(self) -> AbstractContextManager[TensorSource]:
        """Gives the tensors; read when asked for."""
        return self.adapter.open()


def adapter_weights(adapter: StoredAdapter, table: WeightTable) -> AdapterWeights:
    """The tensors of an adapter.

    Args:
        adapter: The adapter.
        table: What they are (`adapter_table`).
    """
    dtype = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return AdapterWeights(
        adapter=adapter,
        tensors={
            name: ConvertedTensor(dtype[adapter.dtype], shape)
            for name, shape in hf_tensors(table).items()
        },
    )
