"""Writes a safetensors file as a stream: the header first, then the tensors as they come.

The one thing to know: it hashes what it writes, so nobody has to read the file again to prove it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from mtrain.bridge.safetensors_header import make_header, tensor_bytes
from mtrain.bridge.written import FileHasher, WrittenFile

_Entries = Iterable[tuple[str, str, tuple[int, ...]]]


class TensorFile(AbstractContextManager["TensorFile"], Protocol):
    """What takes the bytes of a file's tensors, front to back."""

    def append(self, part: torch.Tensor) -> None:
        """Takes the next bytes: uint8 [num_bytes] on the CPU, which the caller may reuse."""
        ...

    @property
    def written(self) -> WrittenFile:
        """The record of the file, which is on disk then."""
        ...


OpenFile = Callable[[Path, _Entries], TensorFile]


class SafetensorsWriter:
    """A new file that is filled from front to back.

    The caller brings the bytes of the tensors in the order of `tensors`, in parts of any size. A
    file that was left with all its bytes is on disk when the `with` block ends; one that was left
    by an error is not repaired.

    Args:
        path: The file; it must not exist.
        tensors: Name, dtype and shape of each tensor.
    """

    def __init__(self, path: Path, tensors: _Entries) -> None:
        entries = list(tensors)
        self._path = path
        self._missing = sum(tensor_bytes(dtype, shape) for _, dtype, shape in entries)
        self._hasher = FileHasher(path.name, entries)
        self._file = path.open("xb", buffering=0)
        header = make_header(entries)
        self._hasher.add_header(header)
        self._write(memoryview(header))

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
        data = memoryview(part.numpy())
        self._hasher.add(data)
        self._write(data)

    @property
    def written(self) -> WrittenFile:
        """The record of the file, once the `with` block ended well."""
        assert self._file.closed, f"{self._path}: not complete yet"
        assert not self._missing, f"{self._path}: {self._missing} bytes were not written"
        return self._hasher.result()

    def _write(self, data: memoryview) -> None:
        while data:
            # An unbuffered file may take less than it was given.
            data = data[self._file.write(data) :]


class ThreadedWriter:
    """A `SafetensorsWriter` in a thread of its own, so that several files are written side by side.

    Args:
        path: The file; it must not exist.
        tensors: Name, dtype and shape of each tensor.
    """

    def __init__(self, path: Path, tensors: _Entries) -> None:
        self._writer = SafetensorsWriter(path, tensors)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"mtrain-write-{path.name}")
        self._under_way: deque[Future[None]] = deque()

    def __enter__(self) -> ThreadedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._executor.shutdown()
        errors = (part.exception() for part in self._under_way)
        error = next((error for error in errors if error is not None), None)
        if kind is not None or error is None:
            self._writer.__exit__(kind, *rest)
            return
        self._writer.__exit__(type(error))
        raise error

    def append(self, part: torch.Tensor) -> None:
        """Hands over a copy of the next bytes: uint8 [num_bytes] on the CPU.

        Raises:
            OSError: Bytes that came before could not be written.
        """
        # One part waits while one is written; more would only take memory.
        while len(self._under_way) > 1:
            self._under_way.popleft().result()
        self._under_way.append(self._executor.submit(self._writer.append, part.clone()))

    @property
    def written(self) -> WrittenFile:
        """The record of the file, once the `with` block ended well."""
        return self._writer.written


class DeferredWriter:
    """A file that is kept in memory, and written when its record is asked for.

    So that training can go on meanwhile: whoever asks, in a thread of its own, needs no other rank.

    Args:
        path: The file; it must not exist.
        tensors: Name, dtype and shape of each tensor.
    """

    def __init__(self, path: Path, tensors: _Entries) -> None:
        self._path = path
        self._entries = list(tensors)
        self._parts: list[torch.Tensor] = []

    def __enter__(self) -> DeferredWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def append(self, part: torch.Tensor) -> None:
        """Keeps a copy of the next bytes: uint8 [num_bytes] on the CPU."""
        self._parts.append(part.clone())

    @property
    def written(self) -> WrittenFile:
        """Writes the file, frees its memory on the way, and returns the record; once only."""
        with SafetensorsWriter(self._path, self._entries) as writer:
            self._parts.reverse()
            while self._parts:
                writer.append(self._parts.pop())
        return writer.written
