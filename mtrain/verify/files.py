"""Compares the files of a checkpoint folder with its manifest, down to single tensors.

The one thing to know: every byte is read again. Files are read side by side, a few MiB of each at
a time, so it takes as long as the disk needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mtrain.bridge.safetensors_header import read_header
from mtrain.bridge.written import WrittenFile, hash_file
from mtrain.checkpoint.manifest import read_manifest

__all__ = ["FileFault", "check_files"]

# Files that hold weights: a loader would take them, so none may be there unrecorded.
_WEIGHT_SUFFIXES = (".safetensors", ".distcp")
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class FileFault:
    """Something that is not as it was saved.

    Attributes:
        kind: What is wrong, in a few words; the same for all faults of its kind.
        text: Which file or tensor, and more about it.
    """

    kind: str
    text: str


def check_files(folder: Path) -> list[FileFault]:
    """Reads every file of a checkpoint folder again.

    Weight files that the manifest does not list are faults too; other files may be added.

    Args:
        folder: A folder with a manifest.

    Returns:
        What is wrong, in the order of the manifest.

    Raises:
        ValueError: There is no manifest, or not a sound one.
    """
    files = read_manifest(folder)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda file: list(_check_file(folder, file)), files)
        faults = [fault for of_file in found for fault in of_file]
    return [*faults, *_surplus_weights(folder, {file.name for file in files})]


def _check_file(folder: Path, file: WrittenFile) -> Iterator[FileFault]:
    path = folder / file.name
    if not path.is_file():
        yield FileFault("missing", file.name)
        return
    try:
        num_bytes = path.stat().st_size
        if num_bytes != file.num_bytes:
            text = f"{file.name} has {num_bytes} bytes, was saved with {file.num_bytes}"
            yield FileFault("other size", text)
        elif hash_file(path) != file.digest:
            yield from _find_damage(path, file)
    except OSError as error:
        yield FileFault("cannot be read", f"{file.name}: {error.strerror}")


def _find_damage(path: Path, file: WrittenFile) -> Iterator[FileFault]:
    """Says where in a file with another hash the damage is."""
    # Files of the optimizer's state have no records of their tensors.
    if path.suffix != ".safetensors" or not file.tensors:
        yield FileFault("other content", file.name)
        return
    try:
        stored = read_header(path)
    except ValueError as error:
        yield FileFault("other content", f"{file.name}, in its header: {error}")
        return
    if stored.keys() != file.tensors.keys():
        yield FileFault("other content", f"{file.name}, in its header: it names other tensors")
        return
    damaged = [
        name
        for name, tensor in stored.items()
        if (tensor.dtype, tensor.shape) != (file.tensors[name].dtype, file.tensors[name].shape)
        or hash_file(path, start=tensor.start, num_bytes=tensor.num_bytes)
        != file.tensors[name].digest
    ]
    where = f"{len(damaged)} of {len(stored)} tensors" if damaged else "its header"
    yield FileFault("other content", f"{file.name}, in {where}")
    for name in damaged:
        yield FileFault("damaged tensor", f"{name} in {file.name}")


def _surplus_weights(folder: Path, names: set[str]) -> Iterator[FileFault]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in _WEIGHT_SUFFIXES and name not in names:
            yield FileFault("not in the manifest", name)
