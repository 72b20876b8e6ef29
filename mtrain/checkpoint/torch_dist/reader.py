"""Reads a torch_dist checkpoint by Hugging Face names, in any parallel layout.

The one thing to know: it answers the same questions as a folder of safetensors files
(`StoredWeights`), so loading, converting and comparing need no code of their own. A chunk is read
whole and the last few are kept, because the tensors of a fused parameter are asked for in turn.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mtrain.bridge.global_tensors import GlobalParameter, global_parameters, places_by_name
from mtrain.bridge.ledger import listed
from mtrain.bridge.plan import Shape, hf_tensors
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.slices import view_box
from mtrain.bridge.sources import TensorShape
from mtrain.bridge.spans import Piece, Span, clip
from mtrain.checkpoint.torch_dist.metadata import (
    BROKEN_PICKLE,
    Chunk,
    GlobalTensor,
    read_metadata,
)

# Chunks that are kept for the next question, besides the last one.
_KEPT_BYTES = 512 * 2**20
# What a checkpoint holds besides the model.
_NO_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchDistCheckpoint:
    """The weights in a torch_dist folder; see `StoredWeights`.

    Attributes:
        folder: The folder with `.metadata` and `.distcp` files.
        tensors: Its tensors by their Hugging Face names.
        stored: Its tensors by Megatron-Core's names.
        places: Where the parts of each Hugging Face tensor are.
    """

    folder: Path
    tensors: Mapping[str, TensorShape]
    stored: Mapping[str, GlobalTensor]
    places: Mapping[str, list[tuple[GlobalParameter, Piece]]]

    @contextmanager
    def open(self) -> Iterator[TorchDistSource]:
        """Gives the tensors by their Hugging Face names; read when asked for."""
        source = TorchDistSource(self)
        try:
            yield source
        finally:
            source.close()


def open_torch_dist(folder: Path, table: WeightTable) -> TorchDistCheckpoint:
    """Compares what a folder holds with what a model needs; no tensor is read.

    Args:
        folder: The folder with `.metadata`.
        table: Weights of the model, or of an adapter.

    Raises:
        ValueError: A parameter is missing, unknown or of another shape; the first ten are named.
    """
    stored = read_metadata(folder)
    parameters = global_parameters(table)
    _check_parameters(folder, parameters, stored)
    places = places_by_name(parameters)
    dtypes = {name: _stored(parts[0][0], stored)[0].dtype for name, parts in places.items()}
    tensors = {name: TensorShape(dtypes[name], shape) for name, shape in hf_tensors(table).items()}
    return TorchDistCheckpoint(folder=folder, tensors=tensors, stored=stored, places=places)


class TorchDistSource:
    """Reads parts of Hugging Face tensors out of the chunks; a `TensorSource` for any thread."""

    def __init__(self, checkpoint: TorchDistCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, io.BufferedReader] = {}
        self._kept: OrderedDict[Chunk, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def slices(self, name: str) -> _Slices:
        """An object that gives parts of a tensor when it is indexed with slices."""
        return _Slices(self, name, self._checkpoint.tensors[name].shape)

    def close(self) -> None:
        """Closes the files and forgets what was read."""
        self._kept.clear()
        for file in self._files.values():
            file.close()

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of a tensor, the elements of a vector being its rows."""
        shape = self._checkpoint.tensors[name].shape
        whole: torch.Tensor | None = None
        for parameter, piece in self._checkpoint.places[name]:
            for rows, local in clip(piece.hf[0], piece.local[0], start=start, stop=stop):
                part = self._read_box(parameter, piece, local)
                if whole is None and rows.count == 1 and rows.size == stop - start:
                    return part
                if whole is None:
                    whole = torch.empty((stop - start, *shape[1:]), dtype=part.dtype)
                target = view_box(whole, (rows.shifted(-start), *piece.hf[1:]))
                target.copy_(part.view(target.shape))
        assert whole is not None, f"{name} has no rows {start}:{stop}"
        return whole

    def _read_box(self, parameter: GlobalParameter, piece: Piece, rows: Span) -> torch.Tensor:
        """The part of a parameter that a piece stands for, cut to some of its rows."""
        tensor, stacked = _stored(parameter, self._checkpoint.stored)
        front = [index for index, _ in parameter.front(stacked=stacked, expert=piece.expert)]
        box = (rows, *piece.local[1:])
        starts = [*front, *(span.start for span in box)]
        stops = [*(index + 1 for index in front), *(span.start + span.extent for span in box)]
        region = self._read_region(tensor, starts, stops).flatten(0, len(front))
        inside = tuple(span.shifted(-span.start) for span in box)
        part = view_box(region, inside)
        return part.reshape(tuple(span.length for span in box))

    def _read_region(
        self, tensor: GlobalTensor, starts: Sequence[int], stops: Sequence[int]
    ) -> torch.Tensor:
        region: torch.Tensor | None = None
        for chunk in tensor.chunks:
            low = [max(pair) for pair in zip(starts, chunk.offsets, strict=True)]
            ends = zip(stops, chunk.offsets, chunk.sizes, strict=True)
            high = [min(stop, offset + size) for stop, offset, size in ends]
            if any(first >= last for first, last in zip(low, high, strict=True)):
                continue
            inside = _box(low, high, chunk.offsets)
            part = self._chunk(chunk)[inside]
            if low == list(starts) and high == list(stops):
                return part
            if region is None:
                shape = [stop - start for start, stop in zip(starts, stops, strict=True)]
                region = torch.empty(shape, dtype=part.dtype)
            region[_box(low, high, starts)] = part
        assert region is not None, "chunks cover a tensor"
        return region

    def _chunk(self, chunk: Chunk) -> torch.Tensor:
        with self._lock:
            if chunk in self._kept:
                self._kept.move_to_end(chunk)
                return self._kept[chunk]
            if chunk.path not in self._files:
                self._files[chunk.path] = chunk.path.open("rb")
            descriptor = self._files[chunk.path].fileno()
        tensor = _load(chunk, descriptor)
        with self._lock:
            self._kept[chunk] = tensor
            while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return tensor


class _Slices:
    """A tensor that is read when it is indexed with slices, the first along its rows."""

    def __init__(self, source: TorchDistSource, name: str, shape: Shape) -> None:
        self._source = source
        self._name = name
        self._shape = shape

    def __getitem__(self, key: slice | tuple[slice, ...]) -> torch.Tensor:
        """The part; a copy or a view of what was read."""
        rows, *others = key if isinstance(key, tuple) else (key,)
        start, stop, step = rows.indices(self._shape[0])
        assert step == 1, "parts are read without gaps"
        return self._source.read(self._name, start, stop)[(slice(None), *others)]


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


def _load(chunk: Chunk, descriptor: int) -> torch.Tensor:
    file = _FilePart(descriptor, chunk.start, chunk.num_bytes)
    try:
        tensor = torch.load(file, map_location="cpu", weights_only=True)
    except (*BROKEN_PICKLE, OSError) as error:
        # Torch goes on for lines, about how to read it with all that could run code.
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.100}"
        raise ValueError(f"{chunk.path}: cannot be read at byte {chunk.start}: {reason}") from error
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.sizes:
        raise ValueError(f"{chunk.path}: the entry at byte {chunk.start} is no {chunk.sizes}")
    return tensor


def _spellings(parameter: GlobalParameter) -> Iterator[tuple[str, bool]]:
    """Names that a parameter may have in a checkpoint, and whether each stacks layers.

    Megatron-Core without Transformer Engine stores the norm before experts as if it were fused.
    """
    fused = parameter.name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    for name in dict.fromkeys((parameter.name, fused)):
        for stacked in (True, False):
            yield replace(parameter, name=name).key(stacked=stacked), stacked


def _find(
    parameter: GlobalParameter, stored: Mapping[str, GlobalTensor]
) -> tuple[str, bool] | None:
    """Name of a parameter in a checkpoint and whether it stacks layers; None if it is not there."""
    return next((spelling for spelling in _spellings(parameter) if spelling[0] in stored), None)


def _stored(
    parameter: GlobalParameter, stored: Mapping[str, GlobalTensor]
) -> tuple[GlobalTensor, bool]:
    """A parameter as a checkpoint has it, and whether that stacks layers."""
    found = _find(parameter, stored)
    assert found is not None, "opening a checkpoint finds all parameters"
    return stored[found[0]], found[1]


def _box(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(
        slice(first - zero, last - zero)
        for first, last, zero in zip(low, high, origin, strict=True)
    )


def _check_parameters(
    folder: Path, parameters: Sequence[GlobalParameter], stored: Mapping[str, GlobalTensor]
) -> None:
    missing, wrong, used = [], [], set()
    for parameter in parameters:
        found = _find(parameter, stored)
        if found is None:
            missing.append(parameter.key(stacked=False))
            continue
        key, stacked = found
        used.add(key)
        fault = _wrong_shape(parameter, stored[key], stacked)
        if fault:
            wrong.append(f"{key} {fault}")
    surplus = [
        key
        for key in stored
        if key not in used and not key.startswith(_NO_WEIGHTS) and "_extra_state" not in key
    ]
    faults = listed("missing", missing) + listed("not part of the model", surplus)
    faults += listed("wrong shape", wrong)
    if faults:
        raise ValueError(f"{folder}: does not fit its config.json: {'; '.join(faults)}")


def _wrong_shape(parameter: GlobalParameter, tensor: GlobalTensor, stacked: bool) -> str | None:
    front = parameter.front(stacked=stacked, expert=None if not parameter.num_experts else 0)
    expected = (*(size for _, size in front), *parameter.shape)
    shape = tensor.shape
    if parameter.may_be_padded and len(shape) == len(expected) and shape[0] >= expected[0]:
        shape = (expected[0], *shape[1:])
    return None if shape == expected else f"has {tensor.shape}, expected is {expected}"
