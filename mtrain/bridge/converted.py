"""Weights in another precision: converted while they are read, each value rounded once.

The one thing to know: a finite value that the new precision cannot hold becomes infinite. That is
counted, by tensor, so that whoever asked for the conversion can be warned.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.save import DTYPE_NAMES
from mtrain.bridge.sources import StoredWeights, TensorShape, TensorSource

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedWeights:
    """Weights of another checkpoint with other dtypes; see `StoredWeights`.

    Attributes:
        weights: The other checkpoint.
        tensors: Its tensors with their new dtypes.
        overflows: Values that became infinite, by tensor; grows while tensors are read.
    """

    weights: StoredWeights
    tensors: Mapping[str, TensorShape]
    overflows: Counter[str]

    @property
    def folder(self) -> Path:
        """Folder of the other checkpoint."""
        return self.weights.folder

    @contextmanager
    def open(self) -> Iterator[TensorSource]:
        """Gives the tensors in their new precision; read when asked for."""
        with self.weights.open() as source:
            yield _ConvertedSource(source, self.tensors, self.overflows)


def converted(weights: StoredWeights, dtypes: Mapping[str, str]) -> ConvertedWeights:
    """The tensors that are named, in the dtypes that are given for them.

    Args:
        weights: Any weights.
        dtypes: The new dtype of each tensor, in the words of the safetensors format; tensors that
            are not named are left out.

    Raises:
        ValueError: A dtype is none that weights are written in.
    """
    for name, dtype in dtypes.items():
        if dtype not in TORCH_DTYPES:
            raise ValueError(
                f"{weights.folder}: {name} is {dtype}, which is not written; give --torch_dtype "
                "float32, bfloat16 or float16"
            )
    return ConvertedWeights(
        weights=weights,
        tensors={
            name: TensorShape(dtype, weights.tensors[name].shape) for name, dtype in dtypes.items()
        },
        overflows=Counter(),
    )


class _ConvertedSource:
    def __init__(
        self,
        source: TensorSource,
        tensors: Mapping[str, TensorShape],
        overflows: Counter[str],
    ) -> None:
        self._source = source
        self._tensors = tensors
        self._overflows = overflows
        self._lock = threading.Lock()

    def slices(self, name: str) -> _ConvertedSlices:
        """An object that gives parts of a tensor when it is indexed with slices."""
        return _ConvertedSlices(self, name, self._source.slices(name))

    def convert(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A part of a tensor in its new precision."""
        dtype = TORCH_DTYPES[self._tensors[name].dtype]
        if part.dtype == dtype:
            return part
        result = part.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(part.dtype).max and _may_be_infinite(result):
            count = int(torch.isinf(result).sum() - torch.isinf(part).sum())
            if count:
                with self._lock:
                    self._overflows[name] += count
        return result


def _may_be_infinite(values: torch.Tensor) -> bool:
    """One fast pass: counting takes ten times as long, and is hardly ever needed."""
    return values.numel() > 0 and not all(math.isfinite(end) for end in values.aminmax())


class _ConvertedSlices:
    def __init__(self, source: _ConvertedSource, name: str, stored: Any) -> None:
        self._source, self._name, self._stored = source, name, stored

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The part, converted."""
        return self._source.convert(self._name, self._stored[key])
