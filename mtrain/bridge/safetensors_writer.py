"""Writes a safetensors file as a stream: the header first, then the tensors as they come."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from mtrain.bridge.safetensors_header import make_header, tensor_bytes


class SafetensorsWriter:
    """A new file that is filled from front to back.

    The caller brings the bytes of the tensors in the order of `tensors`, in parts of any size. A
    file that was left with all its bytes is on disk when the `with` block ends; one that was left
    by an error is not repaired.

    Args:
        path: The file; it must not exist.
        tensors: Name, dtype and shape of each tensor.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        entries = list(tensors)
        self._path = path
        self._missing = sum(tensor_bytes(dtype, shape) for _, dtype, shape in entries)
        self._file = path.open("xb", buffering=0)
        self._write(make_header(entries))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        with self._file:
            if kind is None:
                assert not self._missing, f"{self._path}: {self._missing} bytes were not written"
                os.fsync(self._file.fileno())

    def append(self, part: torch.Tensor) -> None:
        """Writes the next bytes.

        Args:
            part: uint8 [num_bytes] on the CPU.
        """
        self._missing -= part.numel()
        assert self._missing >= 0, f"{self._path}: more bytes than the header announces"
        self._write(memoryview(part.numpy()))

    def _write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            # An unbuffered file may take less than it was given.
            rest = rest[self._file.write(rest) :]
