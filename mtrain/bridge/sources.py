"""Where Hugging Face tensors come from: the two protocols that every checkpoint format answers to.

The one thing to know: whatever stores a model is asked for tensors by their Hugging Face names, in
parts of any size. Loading, converting, merging and comparing then know no format.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class TensorSource(Protocol):
    """Gives tensors: from files, or computed. Several threads may ask at once."""

    def slices(self, name: str) -> Any:
        """A tensor, or something that gives parts of it when it is indexed with slices."""
        ...


class StoredShape(Protocol):
    """What is known of a stored tensor before it is read."""

    @property
    def dtype(self) -> str:
        """Its dtype in the words of the safetensors format, e.g. "BF16"."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A `StoredShape` by itself.

    Attributes:
        dtype: Its dtype in the words of the safetensors format.
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]


class StoredWeights(Protocol):
    """A checkpoint on disk, whatever its format.

    Attributes:
        folder: Its folder, for messages.
        tensors: All tensors by their Hugging Face names.
    """

    @property
    def folder(self) -> Path:
        """See above."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredShape]:
        """See above."""
        ...

    def open(self) -> AbstractContextManager[TensorSource]:
        """Opens its files for reading; nothing is read yet."""
        ...
