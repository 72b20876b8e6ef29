"""`manifest.json`: what a checkpoint folder should hold, down to the hash of every tensor.

The one thing to know: it is made of the records that the ranks kept while they wrote, so nothing is
read again to make it. Whoever reads one believes nothing of it before its form is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mtrain import __version__
from mtrain.bridge.safetensors_header import BITS_OF_DTYPE, parse_json
from mtrain.bridge.written import HASH_NAME, WrittenFile, WrittenTensor, write_json

__all__ = ["MANIFEST_FILE", "read_manifest", "write_manifest"]

MANIFEST_FILE = "manifest.json"

_FORMAT = 1
_LIBRARIES = ("torch", "megatron-core", "transformers", "peft", "safetensors")
_MAX_BYTES = 2**28


def write_manifest(
    folder: Path, files: Iterable[WrittenFile], *, source: Mapping[str, Any]
) -> WrittenFile:
    """Writes the manifest of a folder and flushes it to disk.

    Args:
        folder: Folder of the checkpoint.
        files: All its files, by whatever rank.
        source: What the checkpoint was made from; goes in as it is.
    """
    ordered = sorted(files, key=lambda file: file.name)
    names = [name for file in ordered for name in file.tensors]
    assert len({file.name for file in ordered}) == len(ordered), "a file was recorded twice"
    assert len(set(names)) == len(names), "two files hold a tensor of the same name"
    return write_json(
        folder,
        MANIFEST_FILE,
        {
            "format": _FORMAT,
            "hash": HASH_NAME,
            "versions": _versions(),
            "source": dict(source),
            "files": {
                file.name: {"bytes": file.num_bytes, "hash": file.digest} for file in ordered
            },
            "tensors": {
                name: {
                    "file": file.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "hash": tensor.digest,
                }
                for file in ordered
                for name, tensor in file.tensors.items()
            },
        },
    )


def _versions() -> dict[str, str]:
    versions = {"mtrain": __version__}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def read_manifest(folder: Path) -> tuple[WrittenFile, ...]:
    """Reads what a folder should hold; no other file is looked at.

    Raises:
        ValueError: There is no manifest, or it is not one that mtrain wrote.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder}: has no {MANIFEST_FILE}; it was not saved by mtrain, or by a version that "
            "wrote none"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: larger than {_MAX_BYTES} bytes; this is no manifest")
    content = parse_json(path.read_bytes(), source=path)
    try:
        return _read(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(content: Mapping[str, Any]) -> tuple[WrittenFile, ...]:
    if (content.get("format"), content.get("hash")) != (_FORMAT, HASH_NAME):
        raise ValueError(f"is not of format {_FORMAT} with hash {HASH_NAME}")
    files, tensors = content.get("files"), content.get("tensors")
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        raise ValueError("files and tensors must be objects")
    tensors_of: dict[str, dict[str, WrittenTensor]] = {name: {} for name in files}
    for name, entry in tensors.items():
        tensor = _read_tensor(name, entry)
        if entry["file"] not in tensors_of:
            raise ValueError(f"tensor {name!r} is in {entry['file']!r}, which it does not list")
        tensors_of[entry["file"]][name] = tensor
    return tuple(_read_file(name, entry, tensors_of[name]) for name, entry in files.items())


def _read_tensor(name: str, entry: object) -> WrittenTensor:
    if not isinstance(entry, dict) or set(entry) != {"file", "dtype", "shape", "hash"}:
        raise ValueError(f"tensor {name!r} must have exactly file, dtype, shape and hash")
    shape = entry["shape"]
    if (
        not isinstance(entry["file"], str)
        or not isinstance(entry["dtype"], str)
        or entry["dtype"] not in BITS_OF_DTYPE
        or not isinstance(shape, list)
        or not all(_is_size(size) for size in shape)
        or not _is_digest(entry["hash"])
    ):
        raise ValueError(f"tensor {name!r} is not described by a dtype, a shape and a hash")
    return WrittenTensor(dtype=entry["dtype"], shape=tuple(shape), digest=entry["hash"])


def _read_file(name: str, entry: object, tensors: Mapping[str, WrittenTensor]) -> WrittenFile:
    # A path inside the folder: nothing that any system could read as a way out of it.
    if any(part in ("", ".", "..") for part in name.split("/")) or set(name) & set("\\:\0"):
        raise ValueError(f"names the file {name!r}; only files in the folder are accepted")
    if (
        not isinstance(entry, dict)
        or set(entry) != {"bytes", "hash"}
        or not _is_size(entry["bytes"])
        or not _is_digest(entry["hash"])
    ):
        raise ValueError(f"file {name!r} must have exactly bytes and hash")
    return WrittenFile(
        name=name, num_bytes=entry["bytes"], digest=entry["hash"], tensors=dict(tensors)
    )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 32 and set(value) <= set("0123456789abcdef")
