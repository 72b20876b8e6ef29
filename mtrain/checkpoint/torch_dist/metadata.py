"""The `.metadata` file of a torch_dist checkpoint: which tensors, and where their chunks are.

The one thing to know: torch stores it as a pickle, which could run code. Here it is read with a
list of the few classes that hold plain data, and everything else in it is refused. That is the only
pickle that mtrain reads; `common.pt` beside it is never opened.
Source: torch.distributed.checkpoint's `FileSystemWriter.finish` and `Metadata`.
"""

from __future__ import annotations

import collections
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

METADATA_FILE = ".metadata"
_MAX_BYTES = 2**30
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
# What pickle raises for bytes that are none, besides an UnpicklingError.
_BROKEN = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


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
        chunks: The chunks.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_metadata(folder: Path) -> dict[str, GlobalTensor]:
    """Reads which tensors a folder of `.distcp` files holds; no tensor is read.

    Objects that are no tensors (states of Transformer Engine, of random generators) are left out.

    Raises:
        ValueError: The file is missing, holds more than plain data, or does not fit the files.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no torch_dist checkpoint ({METADATA_FILE} is missing)")
    stored = _unpickle(path)
    try:
        places = {(index.fqn, tuple(index.offset or ())): at for index, at in stored[1].items()}
        sizes: dict[Path, int] = {}
        tensors = {}
        for key, entry in stored[0].items():
            if isinstance(entry, metadata.TensorStorageMetadata):
                tensors[key] = _global_tensor(folder, key, entry, places, sizes)
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the metadata of a checkpoint: {error!r}") from error
    return tensors


def _global_tensor(
    folder: Path,
    key: str,
    entry: metadata.TensorStorageMetadata,
    places: Mapping[tuple[str, tuple[int, ...]], Any],
    sizes: dict[Path, int],
) -> GlobalTensor:
    shape = tuple(entry.size)
    chunks = []
    for chunk in entry.chunks:
        offsets, extent = tuple(chunk.offsets), tuple(chunk.sizes)
        at = places[key, offsets]
        path = _file(folder, at.relative_path)
        if path not in sizes:
            sizes[path] = path.stat().st_size
        if at.transform_descriptors:
            raise ValueError(f"{path}: {key} is stored with {at.transform_descriptors}; not built")
        if at.offset < 0 or at.length < 0 or at.offset + at.length > sizes[path]:
            raise ValueError(
                f"{path}: truncated: {key} ends at byte {at.offset + at.length}, the file has "
                f"{sizes[path]}"
            )
        ends = zip(offsets, extent, shape, strict=True)
        if any(start < 0 or size < 0 or start + size > whole for start, size, whole in ends):
            raise ValueError(f"{folder}: {key}: a chunk at {offsets} lies outside of {shape}")
        chunks.append(Chunk(offsets, extent, path, at.offset, at.length))
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
        raise ValueError(f"{folder}: {key}: its chunks do not cover {shape}")
    dtype = _DTYPE_NAMES.get(entry.properties.dtype)
    if dtype is None:
        raise ValueError(f"{folder}: {key}: dtype {entry.properties.dtype} is not built")
    return GlobalTensor(dtype=dtype, shape=shape, chunks=tuple(chunks))


def _file(folder: Path, name: str) -> Path:
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"{folder}: {METADATA_FILE} names the file {name!r}; only a plain name")
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
        with path.open("rb") as file:
            content = _DataUnpickler(file).load()
        names, places = content.state_dict_metadata, content.storage_data
    except _BROKEN as error:
        raise ValueError(f"{path}: not the metadata of a checkpoint: {error}") from error
    if not isinstance(names, dict) or not isinstance(places, dict):
        raise ValueError(f"{path}: not the metadata of a checkpoint")
    return names, places


class _MCoreMetadata(metadata.Metadata):
    """What Megatron-Core 0.15 and older called its metadata, with a dictionary more."""


class _Ignored:
    """Stands for classes that only matter while a checkpoint is written."""

    def __init__(self, *args: object) -> None:
        """Takes what it is given."""


def _layout(name: str) -> torch.layout:
    """torch.serialization's `_get_layout`, for the one layout that weights have."""
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"layout {name!r}")
    return torch.strided


# A class may be named here only if making one of it and setting its attributes does nothing else.
_ALLOWED: dict[tuple[str, str], Callable[..., Any] | torch.dtype] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _MCoreMetadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Ignored,
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
        )
    },
    **{
        (kind.__module__, kind.__name__): _Ignored
        for kind in (
            filesystem._StoragePrefix,
            planner.SavePlan,
            planner.TensorWriteData,
            planner.WriteItem,
            planner.WriteItemType,
        )
    },
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPE_NAMES},
}


class _DataUnpickler(pickle.Unpickler):
    """Refuses every name that is not on the list, before anything is called."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")
        return _ALLOWED[module, name]
