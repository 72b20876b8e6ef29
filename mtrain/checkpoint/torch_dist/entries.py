"""A tensor in a `.distcp` file: the zip archive that `torch.save` makes of it.

The one thing to know: nothing in it is compressed, so the values lie there as they do in memory.
Any rows are read from their place (`find_values`), and all are written to it between the two ends
of the archive (`frame_of`). `torch.load` and `torch.save` move whole tensors under Python's lock.
Source: torch's `serialization.py` (`_save`, `_load`) and `_utils._rebuild_tensor_v2`.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from mtrain.checkpoint.torch_dist.plain_pickle import Record, read_pickle

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_MAX_DESCRIPTION = 2**16
_BROKEN_ARCHIVE = (
    zipfile.BadZipFile,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class _Tensor(Record):
    """What a tensor is made of: storage, first element, shape, strides and more."""


class _TensorWithDtype(_Tensor):
    """The same with a dtype, for those that have no kind of storage."""


class _Parameter(Record):
    """A tensor that is trained."""


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    key: str


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _TensorWithDtype,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("collections", "OrderedDict"): dict,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch", "float8_e4m3fn"): torch.float8_e4m3fn,
    ("torch", "float8_e5m2"): torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class StoredValues:
    """Where the values of a tensor are.

    Attributes:
        start: Byte of its first element, from the start of the file.
        strides: Elements between neighbours on each axis.
    """

    start: int
    strides: tuple[int, ...]


def find_values(
    descriptor: int, start: int, num_bytes: int, *, shape: tuple[int, ...], dtype: torch.dtype
) -> StoredValues:
    """Reads the description of a tensor, and not its values.

    Args:
        descriptor: The file.
        start: First byte of the archive in it.
        num_bytes: Size of the archive.
        shape: The shape that the tensor has to have.
        dtype: The dtype that it has to have.

    Raises:
        ValueError: It is no such tensor, or asks for more than plain data.
    """
    part = _FilePart(descriptor, start, num_bytes)
    try:
        with zipfile.ZipFile(part) as archive:
            members = {info.filename: info for info in archive.infolist()}
        [described] = [name for name in members if name.endswith("/data.pkl")]
        root = described.removesuffix("data.pkl")
        tensor = read_pickle(part.content(members[described]), _ALLOWED, find_stored=_storage)
        order = members.get(f"{root}byteorder")
        if order is not None and part.content(order) != b"little":
            raise ValueError("its bytes are in another order")
        storage, first, strides = _checked(tensor, shape=shape, dtype=dtype)
        values = members[f"{root}data/{storage.key}"]
        ends = zip(shape, strides, strict=True)
        last = first + sum((size - 1) * stride for size, stride in ends)
        if prod(shape) and (last + 1) * dtype.itemsize > values.file_size:
            raise ValueError("its values are cut off")
        return StoredValues(start + part.place(values) + first * dtype.itemsize, strides)
    except _BROKEN_ARCHIVE as error:
        raise ValueError(f"{type(error).__name__}: {error!s:.200}") from error


def _storage(pid: Any) -> _Storage:
    kind, dtype, key, _, _ = pid
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
        raise ValueError(f"{pid!r:.100} is no storage")
    return _Storage(dtype, key)


def _checked(
    tensor: Any, *, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[_Storage, int, tuple[int, ...]]:
    """Storage, first element and strides of a tensor that is what it should be."""
    if isinstance(tensor, _Parameter):
        tensor = tensor.args[0]
    if not isinstance(tensor, _Tensor):
        raise ValueError("it is no tensor")
    storage, first, sizes, strides, *more = tensor.args
    if not isinstance(storage, _Storage):
        raise ValueError("its values are not stored")
    own_dtype = more[2] if isinstance(tensor, _TensorWithDtype) else storage.dtype
    if tuple(sizes) != shape or own_dtype != dtype:
        raise ValueError(f"it is {own_dtype} {sizes}, expected is {dtype} {list(shape)}"[:200])
    strides = tuple(strides)
    if len(strides) != len(shape) or any(type(n) is not int or n < 0 for n in (first, *strides)):
        raise ValueError("it has no place in its storage")
    return storage, first, strides


class _FilePart(io.RawIOBase):
    """A part of a file as a file; several threads may read the same file."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size, self._at = descriptor, start, size, 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read from anywhere."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves on, as in other files."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise ValueError("there is nothing before its start")
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:
        """Reads as much as there is room for."""
        room = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        count = os.preadv(self._descriptor, [room], self._start + self._at) if room else 0
        self._at += count
        return count

    def place(self, member: zipfile.ZipInfo) -> int:
        """First byte of a member of the archive, which has to be stored as it is."""
        self.seek(member.header_offset)
        signature, name_size, extra_size = _LOCAL_HEADER.unpack(self.read(_LOCAL_HEADER.size))
        start = self._at + name_size + extra_size
        is_plain = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
        if signature != _LOCAL_SIGNATURE or not is_plain:
            raise ValueError(f"{member.filename!r:.100} is not stored as it is")
        if start + member.file_size > self._size:
            raise ValueError(f"{member.filename!r:.100} is cut off")
        return start

    def content(self, member: zipfile.ZipInfo) -> bytes:
        """A small member of the archive; torch may leave out its checksum."""
        if member.file_size > _MAX_DESCRIPTION:
            raise ValueError(f"{member.filename!r:.100} is too large for a description")
        self.seek(self.place(member))
        return self.read(member.file_size)


@dataclass(frozen=True, slots=True)
class Frame:
    """What `torch.save` puts around the values of a tensor.

    Attributes:
        before: The bytes in front.
        ends: The bytes behind, cut where the checksum of the values belongs.
    """

    before: bytes
    ends: tuple[bytes, ...]

    def after(self, checksum: int) -> bytes:
        """The bytes behind the values.

        Args:
            checksum: CRC-32 of the values.
        """
        return struct.pack("<L", checksum).join(self.ends)


@functools.lru_cache(maxsize=1024)
def frame_of(shape: tuple[int, ...], dtype: torch.dtype) -> Frame:
    """The frame of a contiguous tensor, taken from what torch makes of zeros."""
    zeros = torch.zeros(shape, dtype=dtype)
    buffer = io.BytesIO()
    torch.save(zeros, buffer)
    with zipfile.ZipFile(buffer) as archive:
        [values] = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
    content = buffer.getbuffer()
    _, name_size, extra_size = _LOCAL_HEADER.unpack_from(content, values.header_offset)
    start = values.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    checksum = zlib.crc32(content[start : start + zeros.nbytes])
    # Once behind the values, and once in the list of members.
    ends = bytes(content[start + zeros.nbytes :]).split(struct.pack("<L", checksum))
    assert len(ends) == 3, f"torch.save wrote {len(ends) - 1} checksums of the values"
    return Frame(bytes(content[:start]), tuple(ends))
