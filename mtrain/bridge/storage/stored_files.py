"""Files of tensors that are stored in another form than they arrive in, or only copied.

The one thing to know: canonical tensors arrive front to back, slab by slab of the stored tensors
that they belong to. So a file keeps one slab (all projections of one expert, say), puts it into its
form when it is complete, and passes it on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from mtrain.bridge.convert import row_blocks
from mtrain.bridge.safetensors_header import tensor_bytes
from mtrain.bridge.safetensors_reader import DTYPES
from mtrain.bridge.safetensors_writer import SafetensorsWriter, TensorFile
from mtrain.bridge.sources import StoredWeights, TensorSource
from mtrain.bridge.storage.arrangement import Arrangement
from mtrain.bridge.storage.composed import ComposedSlices
from mtrain.bridge.storage.decoded import SCALE_SUFFIX
from mtrain.bridge.storage.fp8_blocks import quantize
from mtrain.bridge.storage.stored_as import Entry, StoredAs
from mtrain.bridge.written import WrittenFile


class FileRecord(Protocol):
    """A file that is on disk when its record is asked for."""

    @property
    def written(self) -> WrittenFile:
        """The record of the file."""
        ...


class AssembledFile:
    """A file that takes canonical tensors and holds them in another form; see `TensorFile`.

    Args:
        file: Takes what is stored.
        stored: The stored tensors of the file, in its order.
        tensors: Name, dtype and shape of the canonical tensors, in the order that they arrive in.
        form: Says which stored tensors are written in 8-bit floats.
    """

    def __init__(
        self,
        file: TensorFile,
        stored: Sequence[Arrangement],
        tensors: Sequence[Entry],
        form: StoredAs,
    ) -> None:
        self._file = file
        self._stored = stored
        self._form = form
        self._dtypes = {name: dtype for name, dtype, _ in tensors}
        self._stack = ExitStack()
        self._kept: TensorSource | None = None
        self._scales: list[torch.Tensor] = []
        self._steps = self._all_steps()
        self._begin()

    def __enter__(self) -> AssembledFile:
        self._stack.enter_context(self._file)
        if self._form.quantized is not None:
            self._kept = self._stack.enter_context(self._form.quantized.source.open())
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)  # type: ignore[arg-type]

    def append(self, part: torch.Tensor) -> None:
        """Takes the next bytes of the canonical tensors: uint8 [num_bytes] on the CPU."""
        while part.numel():
            assert self._missing, "more bytes than the tensors have"
            taken, part = part[: self._missing], part[self._missing :]
            self._missing -= taken.numel()
            if self._slab is None:
                self._file.append(taken)
            else:
                end = self._slab.numel() - self._missing
                self._slab[end - taken.numel() : end] = taken
            if not self._missing:
                self._finish(self._slab)
                self._begin()

    @property
    def written(self) -> WrittenFile:
        """The record of the file, once the `with` block ended well."""
        return self._file.written

    def _begin(self) -> None:
        """Gets ready for the next slab that has any bytes."""
        self._slab: torch.Tensor | None = None
        for num_bytes, is_kept, finish in self._steps:
            self._missing, self._finish = num_bytes, finish
            if num_bytes:
                self._slab = torch.empty(num_bytes, dtype=torch.uint8) if is_kept else None
                return
        self._missing, self._finish = 0, _nothing

    def _all_steps(self) -> Iterator[tuple[int, bool, partial[None]]]:
        """Bytes of each slab, whether it is kept until it is complete, and what follows then."""
        for one in self._stored:
            is_passed_on = one.is_plain and not self._form.is_quantized(one.name)
            for index, names in enumerate(one.slabs):
                num_bytes = sum(
                    tensor_bytes(self._dtypes[name], shape)
                    for name, shape in zip(names, one.part_shapes, strict=True)
                )
                finish = _nothing if is_passed_on else partial(self._write_slab, one, index)
                yield num_bytes, not is_passed_on, finish

    def _write_slab(self, stored: Arrangement, index: int, slab: torch.Tensor) -> None:
        tensors = self._tensors_of(stored, index, slab)
        if stored.is_plain:
            (values,) = tensors.values()
        else:
            key = slice(index, index + 1) if stored.is_stacked else slice(None)
            values = ComposedSlices(stored, tensors.__getitem__)[key]
        if not self._form.is_quantized(stored.name):
            self._file.append(_bytes_of(values))
            return
        self._write_quantized(stored, index, values)

    def _write_quantized(self, stored: Arrangement, index: int, values: torch.Tensor) -> None:
        form = self._form.quantized
        assert form is not None and self._kept is not None, "known and open"
        kept = self._kept.slices(f"{stored.name}{SCALE_SUFFIX}")
        quantized, scales = quantize(
            values,
            form.blocks,
            kept=kept[index : index + 1] if stored.is_stacked else kept[:],
            scale_dtype=DTYPES[form.scale_dtypes[stored.name]],
        )
        self._file.append(_bytes_of(quantized))
        # Factors are a tensor of their own, behind that of the values.
        self._scales.append(_bytes_of(scales))
        if index == len(stored.slabs) - 1:
            self._file.append(torch.cat(self._scales))
            self._scales.clear()

    def _tensors_of(
        self, stored: Arrangement, index: int, slab: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        tensors, end = {}, 0
        for name, shape in zip(stored.slabs[index], stored.part_shapes, strict=True):
            begin, end = end, end + tensor_bytes(self._dtypes[name], shape)
            tensors[name] = slab[begin:end].view(DTYPES[self._dtypes[name]]).view(shape)
        return tensors


class CopiedFile:
    """A file of tensors that are copied from another checkpoint when its record is asked for.

    Args:
        path: The file; it must not exist.
        entries: Name, dtype and shape of each tensor.
        source: The checkpoint that has them.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], source: StoredWeights) -> None:
        self._path, self._entries, self._source = path, entries, source

    @property
    def written(self) -> WrittenFile:
        """Writes the file, in blocks of rows, and returns its record; once only."""
        with (
            SafetensorsWriter(self._path, self._entries) as writer,
            self._source.open() as source,
        ):
            for name, dtype, shape in self._entries:
                values = source.slices(name)
                for start, stop in row_blocks(shape, itemsize=tensor_bytes(dtype, (1,))):
                    writer.append(_bytes_of(values[start:stop]))
        return writer.written


def _bytes_of(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().flatten().view(torch.uint8)


def _nothing(slab: torch.Tensor | None) -> None:
    """What follows a tensor that was passed on as it came."""
