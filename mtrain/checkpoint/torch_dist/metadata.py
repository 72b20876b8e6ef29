"""The `.metadata` file of a torch_dist checkpoint: which tensors, and where their chunks are.

The one thing to know: torch stores it as a pickle, which could run code. Here it is read with a
list of the few names that it needs, and everything else in it is refused (`plain_pickle`).
`common.pt` beside it is never opened.
Source: torch.distributed.checkpoint's `FileSystemWriter.finish` and `Metadata`.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from mtrain.checkpoint.torch_dist.plain_pickle import Record, read_pickle

METADATA_FILE = ".metadata"
_MAX_BYTES = 2**30
# Chunks lie on a grid, of which each is one cell or a few.
_MAX_CELLS = 2**22
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.distcp")
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a global tensor and where it is stored.

    Attributes:
        offsets: Its first position on each axis.
        sizes: Its shape.
        path: The file.
        start: First byte of the entry in the file; it is a tensor as `torch.save` writes it.
        num_bytes: Size of the entry.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalTensor:
    """A tensor of the whole model, in chunks that cover it.

    Attributes:
        dtype: Its dtype in the words of the safetensors format.
        shape: Its shape.
        chunks: The chunks, in the order of their offsets.
        largest: The largest size of a chunk on each axis.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    largest: tuple[int, ...]

    def chunks_in(self, starts: Sequence[int], stops: Sequence[int]) -> Sequence[Chunk]:
        """Chunks that may overlap a box; among very many, these are soon found."""
        first = tuple(start - size + 1 for start, size in zip(starts, self.largest, strict=True))
        last = tuple(stop - 1 for stop in stops)
        low = bisect_left(self.chunks, first, key=_place_of)
        return self.chunks[low : bisect_right(self.chunks, last, key=_place_of)]


def _place_of(chunk: Chunk) -> tuple[int, ...]:
    return chunk.offsets


def read_metadata(folder: Path) -> dict[str, GlobalTensor]:
    """Reads which tensors a folder of `.distcp` files holds; no tensor is read.

    Objects that are no tensors (states of Transformer Engine, of random generators) are left out.

    Raises:
        ValueError: The file is missing, holds more than plain data, or does not fit the files.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no torch_dist checkpoint ({METADATA_FILE} is missing)")
    names, places = _unpickle(path)
    files: dict[str, tuple[Path, int]] = {}
    try:
        at = {(index.fqn, _offset(index)): place for index, place in places.items()}
        return {
            key: _global_tensor(folder, key, entry, at, files)
            for key, entry in names.items()
            if isinstance(entry, _Tensor)
        }
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the metadata of a checkpoint: {error!r:.400}") from error


def _global_tensor(
    folder: Path,
    key: str,
    entry: _Tensor,
    places: Mapping[tuple[str, tuple[int, ...]], Any],
    files: dict[str, tuple[Path, int]],
) -> GlobalTensor:
    if not isinstance(key, str) or not key.isprintable():
        raise ValueError(f"{folder}: {METADATA_FILE} names a tensor {key!r:.200}")
    shape = _lengths(entry.size)
    chunks = []
    for stored in entry.chunks:
        offsets, extent = _lengths(stored.offsets), _lengths(stored.sizes)
        if not len(offsets) == len(extent) == len(shape):
            raise ValueError(f"{folder}: {key}: a chunk at {offsets} has other axes than {shape}")
        ends = zip(offsets, extent, shape, strict=True)
        if any(start + size > whole for start, size, whole in ends):
            raise ValueError(f"{folder}: {key}: a chunk at {offsets} lies outside of {shape}")
        path, start, num_bytes = _place(folder, key, places[key, offsets], files)
        chunks.append(Chunk(offsets, extent, path, start, num_bytes))
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape) or _overlap(chunks):
        raise ValueError(f"{folder}: {key}: its chunks do not cover {shape}, each place once")
    dtype = _DTYPE_NAMES.get(entry.properties.dtype)
    if dtype is None:
        raise ValueError(f"{folder}: {key}: dtype {entry.properties.dtype!r:.200} is not built")
    return GlobalTensor(
        dtype=dtype,
        shape=shape,
        chunks=tuple(sorted(chunks, key=_place_of)),
        largest=tuple(max(sizes) for sizes in zip(*(chunk.sizes for chunk in chunks), strict=True)),
    )


def _offset(index: Any) -> tuple[int, ...]:
    # Torch leaves it out where there is none.
    return tuple(getattr(index, "offset", None) or ())


def _lengths(values: Any) -> tuple[int, ...]:
    """A shape or a position, which a hostile file may give as anything."""
    for value in (result := tuple(values)):
        if type(value) is not int or value < 0:
            raise TypeError(f"{value!r:.200} is no length")
    return result


def _place(
    folder: Path, key: str, at: Any, files: dict[str, tuple[Path, int]]
) -> tuple[Path, int, int]:
    """(file, first byte, bytes) of a chunk."""
    if at.relative_path not in files:
        found = _file(folder, at.relative_path)
        files[at.relative_path] = found, found.stat().st_size
    path, file_bytes = files[at.relative_path]
    if transforms := getattr(at, "transform_descriptors", None):
        raise ValueError(f"{path}: {key} is stored with {transforms!r:.200}; not built")
    start, num_bytes = _lengths((at.offset, at.length))
    if start + num_bytes > file_bytes:
        raise ValueError(
            f"{path}: truncated: {key} ends at byte {start + num_bytes}, the file has {file_bytes}"
        )
    return path, start, num_bytes


def _overlap(chunks: Sequence[Chunk]) -> bool:
    """Whether a place is in two chunks, so that another may be in none though the sizes fit."""
    if len(chunks) < 2:
        return False
    boxes = [tuple(zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in chunks]
    cuts = [
        sorted({end for start, size in axis for end in (start, start + size)})
        for axis in zip(*boxes, strict=True)
    ]
    seen: set[tuple[int, ...]] = set()
    for box in boxes:
        cells = itertools.product(
            *(
                range(bisect_left(cut, start), bisect_left(cut, start + size))
                for cut, (start, size) in zip(cuts, box, strict=True)
            )
        )
        for cell in cells:
            if cell in seen or len(seen) == _MAX_CELLS:
                return True
            seen.add(cell)
    return False


def _file(folder: Path, name: str) -> Path:
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"{folder}: {METADATA_FILE} names the file {name!r:.200}; only a plain name"
        )
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder}: {name} is missing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path}: links to {path.resolve()}, outside the checkpoint folder")
    return path


def _unpickle(path: Path) -> tuple[dict[str, Any], dict[Any, Any]]:
    """What is stored under which name, and where."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: larger than {_MAX_BYTES} bytes; this is no metadata")
    try:
        content = read_pickle(path.read_bytes(), _ALLOWED)
        names, places = content.state_dict_metadata, content.storage_data
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not the metadata of a checkpoint: {error!s:.400}") from error
    if not isinstance(names, dict) or not isinstance(places, dict):
        raise ValueError(f"{path}: not the metadata of a checkpoint")
    return names, places


class _Tensor(Record):
    """What is stored about a tensor."""

    size: Any
    properties: Any
    chunks: Any


class _Properties(Record):
    """Dtype and layout of a tensor."""

    dtype: torch.dtype

    def __setstate__(self, state: Sequence[Any]) -> None:
        """Takes what torch stores, of which only the dtype matters."""
        self.dtype = state[0]


_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    _METADATA: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    # Of its versions up to 0.15.
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
}
_ALLOWED: dict[tuple[str, str], type | torch.dtype] = {
    **{(module, name): Record for module, names in _RECORDS.items() for name in names},
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "TensorProperties"): _Properties,
    # None of these can be changed, nor does calling one do anything else than make one.
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPE_NAMES},
}
