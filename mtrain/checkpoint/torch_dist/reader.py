"""Reads a torch_dist checkpoint by Hugging Face names, in any parallel layout.

The one thing to know: it answers the same questions as a folder of safetensors files
(`StoredWeights`), so loading, converting and comparing need no code of their own. Of a chunk, only
the rows that are asked for are read, straight into place.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mtrain.bridge.global_tensors import GlobalParameter, global_parameters, places_by_name
from mtrain.bridge.ledger import listed
from mtrain.bridge.plan import Shape, hf_tensors
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_reader import DTYPES
from mtrain.bridge.sources import TensorShape
from mtrain.bridge.spans import Box, Piece, clip
from mtrain.checkpoint.torch_dist.entries import StoredValues, find_values
from mtrain.checkpoint.torch_dist.metadata import Chunk, GlobalTensor, read_metadata

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
        self._open: dict[Path, int] = {}
        self._found: dict[Chunk, StoredValues] = {}
        self._lock = threading.Lock()

    def slices(self, name: str) -> _Slices:
        """An object that gives parts of a tensor when it is indexed with slices."""
        return _Slices(self, name, self._checkpoint.tensors[name].shape)

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of a tensor, the elements of a vector being its rows."""
        known = self._checkpoint.tensors[name]
        result = torch.empty((stop - start, *known.shape[1:]), dtype=DTYPES[known.dtype])
        num_filled = 0
        for parameter, piece in self._checkpoint.places[name]:
            for rows, local in clip(piece.hf[0], piece.local[0], start=start, stop=stop):
                here = _runs((rows.shifted(-start), *piece.hf[1:]))
                there = _runs((local, *piece.local[1:]))
                for ours, theirs in zip(here, there, strict=True):
                    target = result[_slices(ours)]
                    self._fill(target, parameter, piece.expert, theirs)
                    num_filled += target.numel()
        assert num_filled == result.numel(), f"{name} has no rows {start}:{stop}"
        return result

    def _fill(
        self, target: torch.Tensor, parameter: GlobalParameter, expert: int | None, box: Box
    ) -> None:
        """Reads a box of a parameter."""
        tensor, stacked = _stored(parameter, self._checkpoint.stored)
        front = [index for index, _ in parameter.front(stacked=stacked, expert=expert)]
        starts = [*front, *(span.start for span in box)]
        stops = [*(index + 1 for index in front), *(span.start + span.size for span in box)]
        target = target[(None,) * len(front)]
        for chunk in tensor.chunks_in(starts, stops):
            low = [max(pair) for pair in zip(starts, chunk.offsets, strict=True)]
            ends = zip(stops, chunk.offsets, chunk.sizes, strict=True)
            high = [min(stop, offset + size) for stop, offset, size in ends]
            if all(first < last for first, last in zip(low, high, strict=True)):
                inside = [first - offset for first, offset in zip(low, chunk.offsets, strict=True)]
                self._read_chunk(target[_box(low, high, starts)], chunk, inside, tensor.dtype)

    def _read_chunk(
        self, target: torch.Tensor, chunk: Chunk, starts: Sequence[int], dtype: str
    ) -> None:
        """Reads the box of a chunk that begins at `starts`, as large as the target."""
        values, descriptor = self._find(chunk, dtype)
        places = zip(starts, values.strides, strict=True)
        first = values.start + target.itemsize * sum(at * stride for at, stride in places)
        ends = zip(target.shape, values.strides, strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in ends)
        if target.is_contiguous() and _is_dense(target.shape, values.strides):
            _read_into(target, chunk.path, descriptor, first)
            return
        # With what lies between.
        around = torch.empty(extent, dtype=target.dtype)
        _read_into(around, chunk.path, descriptor, first)
        target.copy_(torch.as_strided(around, target.shape, values.strides))

    def _find(self, chunk: Chunk, dtype: str) -> tuple[StoredValues, int]:
        """Where the values of a chunk are, and the open file."""
        with self._lock:
            if chunk.path not in self._open:
                self._open[chunk.path] = os.open(chunk.path, os.O_RDONLY | os.O_CLOEXEC)
            descriptor, found = self._open[chunk.path], self._found.get(chunk)
        if found is None:
            found = find_chunk(chunk, descriptor, DTYPES[dtype])
            with self._lock:
                self._found[chunk] = found
        return found, descriptor


def find_chunk(chunk: Chunk, descriptor: int, dtype: torch.dtype) -> StoredValues:
    """Where the values of a chunk are.

    Raises:
        ValueError: The file holds something else there.
    """
    try:
        return find_values(descriptor, chunk.start, chunk.num_bytes, shape=chunk.sizes, dtype=dtype)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{chunk.path}: cannot be read at byte {chunk.start}: {reason}") from error


def _read_into(target: torch.Tensor, path: Path, descriptor: int, position: int) -> None:
    missing = memoryview(target.view(-1).view(torch.uint8).numpy())
    while missing:
        count = os.preadv(descriptor, [missing], position)
        if not count:
            raise OSError(f"{path}: was cut short while it was read")
        missing, position = missing[count:], position + count


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements of a box lie side by side, in their order."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _runs(box: Box) -> Iterator[Box]:
    """A box whose spans repeat, as boxes whose spans do not."""
    return itertools.product(*(span.runs for span in box))


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(span.start, span.start + span.size) for span in box)


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
    # Multi-token prediction may be left out.
    has_next_tokens = any(parameter.name.startswith("mtp.") for parameter in parameters)
    left_out = _NO_WEIGHTS if has_next_tokens else (*_NO_WEIGHTS, "mtp.")
    surplus = [
        key
        for key in stored
        if key not in used and not key.startswith(left_out) and "_extra_state" not in key
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
