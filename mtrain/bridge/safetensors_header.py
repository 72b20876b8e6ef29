"""The header of a safetensors file: read with full distrust, and written.

A file is 8 bytes (length of the header, little endian), the header (JSON: name -> dtype, shape and
place of the bytes) and the bytes of the tensors, without gaps. Everything that a wrong or hostile
file can get wrong is found here, from the header and the size of the file alone.
Source: the format description of the safetensors library.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
_MAX_AXES = 64

BITS_OF_DTYPE: dict[str, int] = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        path: The file.
        dtype: Its dtype in the words of the format, e.g. "BF16".
        shape: Its shape.
        num_bytes: Its size in the file.
        start: Where in the file its first byte is.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    start: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of a file; no tensor is read.

    Raises:
        ValueError: The file is not sound; the message names the file, the tensor and the rule.
    """
    header, data_start, data_size = _read_json(path)
    metadata = header.pop("__metadata__", {})
    if not _is_text_map(metadata):
        raise ValueError(f"{path}: __metadata__ must map text to text")
    tensors: dict[str, StoredTensor] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            tensors[name], begin, end = _read_entry(path, entry, data_start)
        except ValueError as error:
            raise ValueError(f"{path}: tensor {name!r}: {error}") from error
        places.append((begin, end, name))
    _check_places(path, places, data_size)
    return tensors


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Makes the beginning of a file, up to the first byte of the first tensor.

    Args:
        tensors: Name, dtype and shape of each tensor, in the order of their bytes.

    Returns:
        Length and header, padded so that the tensors begin at a multiple of 8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a file.

    Raises:
        ValueError: It does not fill whole bytes.
    """
    bits = prod(shape) * BITS_OF_DTYPE[dtype]
    if bits % 8:
        raise ValueError(f"{prod(shape)} elements of {dtype} do not fill whole bytes")
    return bits // 8


def parse_json(text: bytes, *, source: Path) -> dict[str, Any]:
    """Parses a JSON object from a file, without duplicate keys.

    Raises:
        ValueError: It is not one; the message names the file.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError(f"{source}: JSON nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"key {name!r} occurs twice")
        result[name] = value
    return result


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as a dictionary, where the data behind it begins, and its size."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: not a regular file")
    with path.open("rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        if file_size < 8:
            raise ValueError(f"{path}: {file_size} bytes is too short for a safetensors file")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: header of {length} bytes is above the limit of {MAX_HEADER_BYTES}; "
                "this is no safetensors file"
            )
        if length > file_size - 8:
            raise ValueError(
                f"{path}: truncated: the header has {length} bytes, the file {file_size}"
            )
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError(f"{path}: the header does not begin with '{{'")
    return parse_json(text, source=path), 8 + length, file_size - 8 - length


def _read_entry(path: Path, entry: object, data_start: int) -> tuple[StoredTensor, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("an entry has exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_OF_DTYPE:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not _is_sizes(shape):
        raise ValueError(f"shape {shape!r} is not a list of whole numbers")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {offsets!r} is not a begin and an end")
    num_bytes = tensor_bytes(dtype, tuple(shape))
    begin, end = offsets
    if end - begin != num_bytes:
        raise ValueError(
            f"{dtype} of shape {shape} takes {num_bytes} bytes, its data_offsets {end - begin}"
        )
    tensor = StoredTensor(
        path=path, dtype=dtype, shape=tuple(shape), num_bytes=num_bytes, start=data_start + begin
    )
    return tensor, begin, end


def _check_places(path: Path, places: list[tuple[int, int, str]], data_size: int) -> None:
    """Checks that the tensors fill the data exactly: no overlap, no gap, nothing left over."""
    position, previous = 0, "the header"
    for begin, end, name in sorted(places):
        if begin != position:
            fault = "overlaps" if begin < position else "leaves a gap after"
            raise ValueError(f"{path}: tensor {name!r} {fault} {previous}")
        if end > data_size:
            raise ValueError(
                f"{path}: truncated: tensor {name!r} ends at byte {end} of the data, "
                f"which has {data_size}"
            )
        position, previous = end, repr(name)
    if position != data_size:
        raise ValueError(f"{path}: {data_size - position} bytes behind the last tensor")


def _is_sizes(value: object) -> bool:
    # The limits keep the arithmetic on a hostile header small.
    return (
        isinstance(value, list)
        and len(value) <= _MAX_AXES
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def _is_text_map(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values())
