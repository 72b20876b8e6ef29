"""Saves the model chunks of all ranks as one Hugging Face checkpoint, in bounded memory.

Tensors travel to the writer of their file in buckets of rows, inside their tensor-parallel group
only. Pipeline stages and expert-parallel ranks write their own; data-parallel copies share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

import torch

from mtrain.bridge.file_plan import WeightFile, plan_files
from mtrain.bridge.gather import BlockGatherer, Bucket, TensorLookup, make_buckets
from mtrain.bridge.plan import Backend, Plan, plan_rank
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_folder import WEIGHTS_STEM
from mtrain.bridge.safetensors_writer import SafetensorsWriter
from mtrain.bridge.written import WrittenFile, write_json
from mtrain.parallel import ParallelState

BUCKET_BYTES = 128 * 2**20
# Dtypes that are saved, in the words of the format.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def lookup_in(tensors: Sequence[Mapping[str, torch.Tensor]]) -> TensorLookup:
    """Finds weights to save among the tensors of each model chunk, by Megatron name.

    Experts are stacked on the leading axis there.
    """

    def lookup(chunk: int, name: str, expert: int | None) -> torch.Tensor:
        tensor = tensors[chunk][name]
        return tensor if expert is None else tensor[expert]

    return lookup


def save_weights(
    lookup: TensorLookup,
    folder: Path,
    *,
    table: WeightTable,
    state: ParallelState,
    backend: Backend,
    dtype: torch.dtype,
    max_shard_size: int,
    bucket_bytes: int = BUCKET_BYTES,
    stem: str = WEIGHTS_STEM,
) -> tuple[WrittenFile, ...]:
    """Writes the weights of the model chunks of all ranks.

    All ranks call it. When it returns, the files of this rank are on disk, those of other ranks
    perhaps not yet.

    Args:
        lookup: Finds a weight of this rank, or computes it, when it is needed; see `lookup_in`.
            Only asked for what the table has.
        folder: An existing folder without weight files.
        table: Weights of the model.
        state: This rank in the layout.
        backend: Spelling of the norms.
        dtype: Dtype of all the tensors.
        max_shard_size: Most bytes of tensors in a file.
        bucket_bytes: Most bytes moved at once, if a row is not larger; memory stays below 4 times.
        stem: How the names of the files begin.

    Returns:
        The files of this rank; the first rank's has the index among them.

    Raises:
        OSError: This rank could not write a file. The others do not hear of it from here.
    """
    files = plan_files(
        table,
        layout=state.layout,
        dtype=DTYPE_NAMES[dtype],
        max_shard_size=max_shard_size,
        stem=stem,
    )
    written = _write_groups(
        files,
        folder,
        lookup,
        plan_member=lambda rank: plan_rank(table, layout=state.layout, rank=rank, backend=backend),
        state=state,
        dtype=dtype,
        max_bytes=bucket_bytes,
    )
    if len(files) > 1 and state.is_first_rank:
        weight_map = {name: file.name for file in files for name, _ in file.tensors}
        num_bytes = sum(file.num_bytes for file in files)
        written.append(write_index(folder, weight_map, num_bytes=num_bytes, stem=stem))
    return tuple(written)


def _write_groups(
    files: Sequence[WeightFile],
    folder: Path,
    lookup: TensorLookup,
    *,
    plan_member: Callable[[int], Plan],
    state: ParallelState,
    dtype: torch.dtype,
    max_bytes: int,
) -> list[WrittenFile]:
    """Writes the files of this rank, kind of group by kind of group."""
    written: list[WrittenFile] = []
    error: OSError | None = None
    # Every rank is in one group of each kind. Going through all files of one kind first keeps the
    # order of collectives the same for everybody.
    for kind, group in (("tp", state.groups.tp), ("etp", state.groups.etp)):
        mine = [file for file in files if file.group == kind and state.rank in file.members]
        if not mine:
            continue
        members = mine[0].members
        gatherer = BlockGatherer(
            [plan_member(rank) for rank in members],
            me=members.index(state.rank),
            group=group,
            lookup=lookup,
            dtype=dtype,
            device=state.device,
        )
        try:
            written += _write_files(
                mine, folder, gatherer, state.rank, dtype=dtype, max_bytes=max_bytes
            )
        except OSError as problem:
            error = error or problem
    if error is not None:
        raise error
    return written


@torch.no_grad()
def _write_files(
    files: list[WeightFile],
    folder: Path,
    gatherer: BlockGatherer,
    rank: int,
    *,
    dtype: torch.dtype,
    max_bytes: int,
) -> list[WrittenFile]:
    """Writes the files of one kind of group.

    A rank that cannot write raises at the end: until then it takes part in gathering, so that the
    others do not wait for it.
    """
    staging = _HostBuffer()
    max_elements = max(1, max_bytes // dtype.itemsize)
    error: OSError | None = None
    writers: dict[str, SafetensorsWriter] = {}
    with ExitStack() as stack:
        try:
            for file in files:
                if file.writer == rank:
                    entries = [(name, DTYPE_NAMES[dtype], shape) for name, shape in file.tensors]
                    writer = SafetensorsWriter(folder / file.name, entries)
                    writers[file.name] = stack.enter_context(writer)
        except OSError as caught:
            error = caught
        for file, bucket in _in_turns(files, max_elements=max_elements):
            gathered = gatherer.gather(bucket, writer=file.members.index(file.writer))
            if gathered is not None and error is None:
                try:
                    writers[file.name].append(staging.bytes_of(gathered))
                except OSError as caught:
                    error = caught
        if error is not None:
            raise error
    return [writer.written for writer in writers.values()]


def _in_turns(files: list[WeightFile], *, max_elements: int) -> Iterator[tuple[WeightFile, Bucket]]:
    """A bucket for each writer in turn, so that one can write while others gather."""
    of_writer: dict[int, list[WeightFile]] = {}
    for file in files:
        of_writer.setdefault(file.writer, []).append(file)
    streams = [_buckets_of(queue, max_elements=max_elements) for queue in of_writer.values()]
    for turn in zip_longest(*streams):
        yield from (item for item in turn if item is not None)


def _buckets_of(
    files: list[WeightFile], *, max_elements: int
) -> Iterator[tuple[WeightFile, Bucket]]:
    for file in files:
        for bucket in make_buckets(file.tensors, max_elements=max_elements):
            yield file, bucket


class _HostBuffer:
    """Brings tensors to the CPU through one page-locked buffer, which a GPU fills fastest."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def bytes_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The bytes of a flat tensor; valid until the next call."""
        data = tensor.view(torch.uint8)
        if not data.is_cuda:
            return data
        if self._buffer.numel() < data.numel():
            self._buffer = torch.empty(data.numel(), dtype=torch.uint8, pin_memory=True)
        return self._buffer[: data.numel()].copy_(data)


def write_index(
    folder: Path, weight_map: Mapping[str, str], *, num_bytes: int, stem: str
) -> WrittenFile:
    """Writes the index of a checkpoint of several files.

    Args:
        folder: Its folder.
        weight_map: File of each tensor.
        num_bytes: Size of all tensors together.
        stem: How the names of the files begin.
    """
    content = {
        "metadata": {"total_size": num_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return write_json(folder, f"{stem}.safetensors.index.json", content)
