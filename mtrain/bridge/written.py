"""What is known of a file that was just written: its size, its hash, the hash of each tensor.

The one thing to know: the bytes are hashed while they are written, so a record says what should be
on disk, not what a second look found there. xxh3_128 finds damage; it does not stop a forger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from mtrain.bridge.safetensors_header import tensor_bytes

HASH_NAME = "xxh3_128"

_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenTensor:
    """A tensor in a file.

    Attributes:
        dtype: Its dtype in the words of the safetensors format, e.g. "BF16".
        shape: Its shape.
        digest: Hash of its bytes, in hexadecimal.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A file of a checkpoint.

    Attributes:
        name: Its path in the folder of the checkpoint, with slashes.
        num_bytes: Its size.
        digest: Hash of its bytes, in hexadecimal.
        tensors: The tensors in it by name, where they were hashed one by one.
    """

    name: str
    num_bytes: int
    digest: str
    tensors: Mapping[str, WrittenTensor] = field(default_factory=dict)


class FileHasher:
    """Hashes a file of tensors, and each tensor, as the bytes pass by.

    Args:
        name: Name of the file in the folder of the checkpoint.
        tensors: Name, dtype and shape of each tensor, in the order of their bytes.
    """

    def __init__(self, name: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        self._name = name
        self._entries = list(tensors)
        self._file = xxh3_128()
        self._num_bytes = 0
        self._hashers = [xxh3_128() for _ in self._entries]
        self._missing = [tensor_bytes(dtype, shape) for _, dtype, shape in self._entries]
        self._current = 0

    def add_header(self, data: bytes | memoryview) -> None:
        """Takes bytes that belong to no tensor."""
        self._file.update(data)
        self._num_bytes += len(data)

    def add(self, data: memoryview) -> None:
        """Takes the next bytes of the tensors; a part may end one and begin others."""
        self.add_header(data)
        while data:
            part = data[: self._missing[self._current]]
            self._hashers[self._current].update(part)
            self._missing[self._current] -= len(part)
            if not self._missing[self._current]:
                self._current += 1
            data = data[len(part) :]

    def result(self) -> WrittenFile:
        """The record of the file, when all its bytes have passed."""
        return WrittenFile(
            name=self._name,
            num_bytes=self._num_bytes,
            digest=self._file.hexdigest(),
            tensors={
                name: WrittenTensor(dtype=dtype, shape=shape, digest=hasher.hexdigest())
                for (name, dtype, shape), hasher in zip(self._entries, self._hashers, strict=True)
            },
        )


def hash_file(path: Path, *, start: int = 0, num_bytes: int | None = None) -> str:
    """Hashes a file, or a part of it, a few MiB at a time.

    Args:
        path: The file.
        start: The first byte.
        num_bytes: How many; None means up to the end.
    """
    hasher = xxh3_128()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        missing = os.fstat(file.fileno()).st_size - start if num_bytes is None else num_bytes
        file.seek(start)
        while missing > 0 and (count := file.readinto(buffer[:missing])):
            hasher.update(buffer[:count])
            missing -= count
    return hasher.hexdigest()


def record_file(folder: Path, path: Path) -> WrittenFile:
    """Reads a file that is there already; its tensors are not looked at.

    Args:
        folder: Folder of the checkpoint.
        path: A file in it.
    """
    return WrittenFile(
        name=path.relative_to(folder).as_posix(),
        num_bytes=path.stat().st_size,
        digest=hash_file(path),
    )


def write_json(folder: Path, name: str, content: Mapping[str, Any]) -> WrittenFile:
    """Writes a new JSON file and flushes it to disk.

    Args:
        folder: Folder of the checkpoint.
        name: Name of the file.
        content: A JSON object.

    Raises:
        FileExistsError: It is there already.
    """
    text = (json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n").encode()
    with (folder / name).open("xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(name=name, num_bytes=len(text), digest=xxh3_128(text).hexdigest())


def write_index(
    folder: Path, weight_map: Mapping[str, str], *, num_bytes: int, stem: str
) -> WrittenFile:
    """Writes the index of a checkpoint of several files.

    Args:
        folder: Its folder.
        weight_map: File of each tensor.
        num_bytes: Size of all tensors together.
        stem: How the names of the files begin.
    """
    content = {
        "metadata": {"total_size": num_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return write_json(folder, f"{stem}.safetensors.index.json", content)
