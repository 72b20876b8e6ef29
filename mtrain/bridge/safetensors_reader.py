"""Reads tensors, or parts of them, from the safetensors files of a checkpoint.

The one thing to know: files are read, not mapped. The safetensors library maps them privately and
writable, which counts as memory of the process, as large as the file; pages of a mapping are also
slower to get than bytes, and a file that is cut short meanwhile would kill the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from mtrain.bridge.safetensors_header import StoredTensor, tensor_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class SafetensorsReader:
    """The files of a checkpoint, each opened when it is first needed; a `TensorSource`.

    Args:
        tensors: Where each tensor is, by name.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def slices(self, name: str) -> _Slices:
        """An object that reads parts of a tensor when it is indexed with slices."""
        tensor = self._tensors[name]
        with self._lock:
            if tensor.path not in self._open:
                self._open[tensor.path] = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
            return _Slices(self._open[tensor.path], tensor)


class _Slices:
    """A tensor in a file; its rows are read whole, and then cut along the other axes.

    Of stacked matrices, rows are those of the matrix that is asked for.
    """

    def __init__(self, descriptor: int, tensor: StoredTensor) -> None:
        self._descriptor = descriptor
        self._tensor = tensor

    def __getitem__(self, key: slice | tuple[slice, ...]) -> torch.Tensor:
        """The part, in memory of its own."""
        shape = self._tensor.shape
        if not shape:
            return self._read(0, self._tensor.num_bytes).view(())
        slices = key if isinstance(key, tuple) else (key,)
        begin = 0
        for axis, rows in enumerate(slices):
            start, stop, step = rows.indices(shape[axis])
            assert step == 1, "parts are read without gaps"
            row_bytes = tensor_bytes(self._tensor.dtype, shape[axis + 1 :])
            begin += start * row_bytes
            if stop - start != 1:
                break
        num_rows = max(0, stop - start)
        part = self._read(begin, num_rows * row_bytes)
        whole = part.view(*[1] * axis, num_rows, *shape[axis + 1 :])
        return whole[(*[slice(None)] * (axis + 1), *slices[axis + 1 :])]

    def _read(self, start: int, num_bytes: int) -> torch.Tensor:
        path, dtype = self._tensor.path, DTYPES.get(self._tensor.dtype)
        if dtype is None:
            raise ValueError(f"{path}: torch has no dtype for {self._tensor.dtype}")
        data = torch.empty(num_bytes, dtype=torch.uint8)
        missing, position = memoryview(data.numpy()), self._tensor.start + start
        while missing:
            count = os.preadv(self._descriptor, [missing], position)
            if not count:
                raise OSError(f"{path}: was cut short while it was read")
            missing, position = missing[count:], position + count
        return data.view(dtype)
