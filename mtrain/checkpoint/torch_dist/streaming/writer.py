"""Writes a torch_dist checkpoint from any source, in a stream.

The one thing to know: Megatron-Core's `dist_checkpointing.save` is handed tensors without data,
which it checks and describes in its own files, and a strategy of ours, which makes each chunk when
it is written. So no rank ever holds more than a chunk for each of its threads, where Megatron-Core
needs the model in memory. Ranks share the chunks evenly, whatever the parallel layout.
Source: Megatron-Core's `TorchDistSaveShardedStrategy`; torch.distributed.checkpoint's planners.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from torch.distributed.checkpoint import (
    CheckpointException,
    FileSystemWriter,
    SavePlan,
    SavePlanner,
    WriteItem,
    save,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from xxhash import xxh3_128

from mtrain.bridge.convert import io_threads, num_threads
from mtrain.bridge.global_tensors import has_equal_layers
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.save import DTYPE_NAMES
from mtrain.bridge.sources import StoredWeights, TensorSource
from mtrain.bridge.written import FileHasher, WrittenFile, WrittenTensor
from mtrain.checkpoint.torch_dist.entries import frame_of
from mtrain.checkpoint.torch_dist.streaming.units import Unit, plan_units, units_of_rank

_Place = tuple[str, tuple[int, ...]]
# Hashed twice, checked and written at a time.
_STEP_BYTES = 2**20


def _empty_state() -> bytes:
    """An object that is None, as Megatron-Core stores objects."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()


_EMPTY_STATE = _empty_state()


def save_torch_dist(
    weights: StoredWeights,
    folder: Path,
    *,
    table: WeightTable,
    rank: int,
    world_size: int,
    iteration: int,
    with_states: bool = True,
) -> list[WrittenFile]:
    """Writes all tensors of a model, or of an adapter, as a torch_dist folder.

    All ranks call it; the process group has to be there.

    Args:
        weights: Where the tensors come from, with their dtypes.
        folder: An empty folder.
        table: What they are.
        rank: This rank.
        world_size: Ranks that share the work.
        iteration: Number of the training step, for Megatron-LM.
        with_states: Whether to write the empty states that Megatron-Core's loader asks for.

    Returns:
        The data files of this rank; Megatron-Core's own files beside them are not among them.

    Raises:
        OSError: A rank could not write; on all of them.
    """
    units = plan_units(table, weights)
    mine = units_of_rank(units, rank=rank, world_size=world_size)
    sharded = [unit.sharded() for unit in mine]
    if with_states:
        sharded += [state for unit in mine for state in unit.empty_states()]
    state_dict: dict[str, Any] = {str(number): entry for number, entry in enumerate(sharded)}
    # What Megatron-LM looks for when it loads a checkpoint.
    state_dict |= {"checkpoint_version": 3.0, "iteration": iteration}
    with weights.open() as source:
        strategy = _StreamingStrategy(mine, source)
        dist_checkpointing.save(
            state_dict,
            str(folder),
            strategy,
            content_metadata={
                "singleton_local_shards": False,
                "non_homogeneous_layers": not has_equal_layers(table),
            },
        )
    return strategy.written


class _StreamingStrategy(SaveShardedStrategy):
    """Writes chunks that are made one by one; Megatron-Core calls `save`."""

    def __init__(self, units: Sequence[Unit], source: TensorSource) -> None:
        super().__init__("torch_dist", 1)
        self._units = units
        self._source = source
        self.written: list[WrittenFile] = []

    @property
    def can_handle_sharded_objects(self) -> bool:
        """The empty states are some."""
        return True

    def save(
        self, sharded_state_dict: dict[str, ShardedTensor | ShardedObject], checkpoint_dir: str
    ) -> None:
        """Writes the units that the tensors describe, and the states."""
        units = {_place(unit.sharded()): unit for unit in self._units}
        items = [
            _tensor_item(entry) if isinstance(entry, ShardedTensor) else _state_item(entry)
            for entry in sharded_state_dict.values()
        ]
        writer = _StreamingWriter(checkpoint_dir)
        planner = _StreamingPlanner(items, units, self._source)
        try:
            save({}, storage_writer=writer, planner=planner)
        except CheckpointException as error:
            raise OSError(_first_reason(error)) from error
        self.written = writer.written


def _first_reason(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {cause}"


def _place(tensor: ShardedTensor) -> _Place:
    return tensor.key, tensor.global_offset


def _state_item(state: ShardedObject) -> WriteItem:
    return WriteItem(index=MetadataIndex(state.unique_key), type=WriteItemType.BYTE_IO)


def _tensor_item(tensor: ShardedTensor) -> WriteItem:
    offsets = torch.Size(tensor.global_offset)
    sizes = torch.Size([*[1] * tensor.prepend_axis_num, *tensor.local_shape])
    return WriteItem(
        index=MetadataIndex(tensor.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(tensor.global_shape),
        ),
    )


class _StreamingPlanner(SavePlanner):
    """Says what this rank writes, and makes it when the writer asks."""

    def __init__(
        self, items: list[WriteItem], units: dict[_Place, Unit], source: TensorSource
    ) -> None:
        self._items = items
        self._units = units
        self._source = source

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to do: the items are there."""

    def create_local_plan(self) -> SavePlan:
        """What this rank writes."""
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What all ranks write; that chunks cover all was checked by Megatron-Core."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Makes the chunk of an item, or an empty state."""
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(_EMPTY_STATE)
        return self._units[index.fqn, tuple(index.offset)].make(self._source)


class _StreamingWriter(FileSystemWriter):
    """A file for each thread, written item by item; torch's own keeps what it wrote in memory."""

    def __init__(self, path: str) -> None:
        super().__init__(path, sync_files=True)
        self.written: list[WrittenFile] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the items of this rank."""
        prefix = plan.storage_data.prefix
        parts = [part for part in _evenly(plan.items, num_threads()) if part]
        names = [f"{prefix}{number}.distcp" for number in range(len(parts))]
        with io_threads(max(1, len(parts))) as threads:
            done = threads.map(self._write_file, names, parts, [planner] * len(parts))
            results = []
            for written, of_file in done:
                self.written.append(written)
                results += of_file
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_file(
        self, name: str, items: Sequence[WriteItem], planner: SavePlanner
    ) -> tuple[WrittenFile, list[WriteResult]]:
        results, tensors = [], {}
        with _HashingFile(Path(self.path) / name) as file:
            for item in items:
                data = planner.resolve_data(item)
                offset = file.num_bytes
                if isinstance(data, torch.Tensor):
                    tensors[chunk_name(item.index)] = file.append_tensor(data)
                else:
                    file.append(data.getbuffer())
                size = file.num_bytes - offset
                place = _StorageInfo(name, offset, size)
                results.append(
                    WriteResult(index=item.index, size_in_bytes=size, storage_data=place)
                )
        return replace(file.written, tensors=tensors), results


class _HashingFile:
    """A new file that is hashed while it is written, and on disk when it is left well."""

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._hasher = FileHasher(path.name, ())
        self._file = path.open("xb", buffering=0)

    def __enter__(self) -> _HashingFile:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())

    def append(self, data: bytes | memoryview) -> None:
        """Writes the next bytes."""
        self._hasher.add_header(data)
        self.num_bytes += len(data)
        rest = memoryview(data)
        while rest:
            # An unbuffered file may take less than it was given.
            rest = rest[self._file.write(rest) :]

    def append_tensor(self, tensor: torch.Tensor) -> WrittenTensor:
        """Writes a contiguous tensor as `torch.save` would, while its bytes are in the cache."""
        frame = frame_of(tuple(tensor.shape), tensor.dtype)
        values, checksum = xxh3_128(), 0
        data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        self.append(frame.before)
        for start in range(0, len(data), _STEP_BYTES):
            part = data[start : start + _STEP_BYTES]
            checksum = zlib.crc32(part, checksum)
            values.update(part)
            self.append(part)
        self.append(frame.after(checksum))
        return WrittenTensor(
            dtype=DTYPE_NAMES[tensor.dtype],
            shape=tuple(tensor.shape),
            digest=values.hexdigest(),
        )

    @property
    def written(self) -> WrittenFile:
        """The record of the file, without its tensors."""
        return self._hasher.result()


def chunk_name(index: MetadataIndex) -> str:
    """How a manifest calls a chunk: the key and where the chunk begins."""
    return f"{index.fqn}[{','.join(map(str, index.offset))}]"


def _num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    if data is None:
        return len(_EMPTY_STATE)
    return prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _evenly(items: Sequence[WriteItem], num_parts: int) -> list[list[WriteItem]]:
    """Runs of consecutive items with about as many bytes each."""
    sizes = [_num_bytes(item) for item in items]
    total, before = max(1, sum(sizes)), 0
    parts: list[list[WriteItem]] = [[] for _ in range(num_parts)]
    for item, size in zip(items, sizes, strict=True):
        parts[int((before + size / 2) * num_parts / total)].append(item)
        before += size
    return parts
