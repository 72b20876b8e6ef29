"""Saves the model chunks of all ranks as one Hugging Face checkpoint, in bounded memory.

Tensors travel to the writer of their file in buckets of rows, from the ranks that hold parts of
them. Pipeline stages and expert-parallel ranks write their own; data-parallel copies share. What
files hold in another form is put into it by the writer, a slab at a time.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

import torch

from mtrain.bridge.convert import num_threads
from mtrain.bridge.file_plan import WeightFile, plan_files
from mtrain.bridge.gather import BlockGatherer, Bucket, Member, TensorLookup, make_buckets
from mtrain.bridge.plan import Plan, plan_rank
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_folder import WEIGHTS_STEM
from mtrain.bridge.safetensors_writer import OpenFile, SafetensorsWriter, TensorFile
from mtrain.bridge.storage.stored_as import CANONICAL, StoredAs
from mtrain.bridge.storage.stored_files import AssembledFile, CopiedFile, FileRecord
from mtrain.bridge.written import WrittenFile, write_index
from mtrain.parallel import ParallelLayout, ParallelState

BUCKET_BYTES = 128 * 2**20
# Files that a rank fills side by side.
FILES_AT_ONCE = 8
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
    dtype: torch.dtype,
    max_shard_size: int,
    bucket_bytes: int = BUCKET_BYTES,
    stem: str = WEIGHTS_STEM,
    open_file: OpenFile = SafetensorsWriter,
    form: StoredAs = CANONICAL,
) -> Callable[[], list[WrittenFile]]:
    """Writes the weights of the model chunks of all ranks.

    All ranks call it, and then what it returns, which needs no other rank any more. When that
    returns, the files of this rank are on disk, those of other ranks perhaps not yet.

    Args:
        lookup: Finds a weight of this rank, or computes it, when it is needed; see `lookup_in`.
            Only asked for what the table has.
        folder: An existing folder without weight files.
        table: Weights of the model.
        state: This rank in the layout.
        dtype: Dtype of the tensors, but of those that have a fixed one.
        max_shard_size: Most bytes of tensors in a file.
        bucket_bytes: Most bytes moved at once, if a row is not larger; memory stays below 4 times,
            and for each file that is filled a slab of a tensor that has another form there.
        stem: How the names of the files begin.
        open_file: What takes the tensors of a file: `SafetensorsWriter` writes them as they come,
            `DeferredWriter` when it is asked for the record of the file.
        form: The form that they are stored in.

    Returns:
        What gives the files of this rank; the first rank's has the index among them. It raises an
        OSError where this rank could not write; whatever the ranks do together in between, none
        waits for that one.
    """
    files = plan_files(
        table,
        layout=state.layout,
        dtype=DTYPE_NAMES[dtype],
        max_shard_size=max_shard_size,
        stem=stem,
        form=form,
    )
    return save_tensors(
        files,
        folder,
        lookup,
        plan_member=lambda rank: plan_rank(table, layout=state.layout, rank=rank),
        state=state,
        bucket_bytes=bucket_bytes,
        stem=stem,
        open_file=open_file,
        form=form,
    )


def save_tensors(
    files: Sequence[WeightFile],
    folder: Path,
    lookup: TensorLookup,
    *,
    plan_member: Callable[[int], Plan],
    state: ParallelState,
    bucket_bytes: int = BUCKET_BYTES,
    stem: str = WEIGHTS_STEM,
    open_file: OpenFile = SafetensorsWriter,
    form: StoredAs = CANONICAL,
) -> Callable[[], list[WrittenFile]]:
    """Writes files that are planned already; otherwise as `save_weights`.

    Args:
        files: From `plan_files`, the same on all ranks.
        folder: As for `save_weights`.
        lookup: Finds what the plan of this rank names.
        plan_member: What a rank holds; all ranks give the same answer.
        state: This rank.
        bucket_bytes: As for `save_weights`.
        stem: How the names of the files begin.
        open_file: As for `save_weights`.
        form: As the files were planned.
    """
    writers: list[FileRecord] = []
    error: OSError | None = None
    # Every rank is among the members of one list of files of each kind. Going through all of one
    # kind first keeps the order of messages the same for everybody.
    for kind in ("tp", "etp", "ep"):
        mine = [file for file in files if file.group == kind and state.rank in file.members]
        if not mine:
            continue
        members = [_member(rank, kind, plan_member, state.layout) for rank in mine[0].members]
        gatherer = BlockGatherer(members, world=state.world, lookup=lookup)
        try:
            writers += _write_files(
                mine,
                gatherer,
                state.rank,
                max_bytes=bucket_bytes,
                open_file=functools.partial(_open_file, folder, open_file, form),
            )
        except OSError as problem:
            error = error or problem
    if error is not None:
        return functools.partial(_fail, error)
    for file in files:
        if file.group == "copied" and file.writer == state.rank:
            assert form.carried is not None, "else nothing is copied"
            writers.append(CopiedFile(folder / file.name, file.entries, form.carried.source))
    return functools.partial(_records, writers, files, folder, state.is_first_rank, stem)


def _fail(error: OSError) -> list[WrittenFile]:
    raise error


def _records(
    writers: Sequence[FileRecord],
    files: Sequence[WeightFile],
    folder: Path,
    is_first_rank: bool,
    stem: str,
) -> list[WrittenFile]:
    """The files of this rank, once they are written; the first rank writes the index."""
    # Files that are still in memory are written side by side.
    with ThreadPoolExecutor(num_threads()) as threads:
        written = list(threads.map(lambda writer: writer.written, writers))
    if len(files) > 1 and is_first_rank:
        weight_map = {name: file.name for file in files for name, _, _ in file.entries}
        num_bytes = sum(file.num_bytes for file in files)
        written.append(write_index(folder, weight_map, num_bytes=num_bytes, stem=stem))
    return written


def _member(
    rank: int, kind: str, plan_member: Callable[[int], Plan], layout: ParallelLayout
) -> Member:
    at = layout.coordinates(rank)
    shard = at.tp_rank if kind == "tp" else at.etp_rank
    return Member(rank=rank, shard=shard, plan=plan_member(rank))


def _open_file(folder: Path, open_file: OpenFile, form: StoredAs, file: WeightFile) -> TensorFile:
    """What takes the canonical tensors of a file."""
    writer = open_file(folder / file.name, file.entries)
    if all(one.is_plain and not form.is_quantized(one.name) for one in file.stored):
        return writer
    return AssembledFile(writer, file.stored, file.tensors, form)


@torch.no_grad()
def _write_files(
    files: list[WeightFile],
    gatherer: BlockGatherer,
    rank: int,
    *,
    max_bytes: int,
    open_file: Callable[[WeightFile], TensorFile],
) -> list[TensorFile]:
    """Fills the files of one kind of group.

    A rank that cannot write raises at the end: until then it takes part in gathering, so that the
    others do not wait for it.
    """
    staging = _HostBuffer()
    error: OSError | None = None
    writers: dict[str, TensorFile] = {}
    with ExitStack() as stack:
        try:
            for file in files:
                if file.writer == rank:
                    writers[file.name] = stack.enter_context(open_file(file))
        except OSError as caught:
            error = caught
        for file, bucket in _in_turns(files, max_bytes=max_bytes):
            gathered = gatherer.gather(bucket, writer=file.members.index(file.writer))
            if gathered is not None and error is None:
                try:
                    writers[file.name].append(staging.bytes_of(gathered))
                except OSError as caught:
                    error = caught
        if error is not None:
            raise error
    return list(writers.values())


def _in_turns(files: list[WeightFile], *, max_bytes: int) -> Iterator[tuple[WeightFile, Bucket]]:
    """A bucket for each writer in turn, and of each writer for several of its files in turn.

    So that one rank can write while others gather, and one file while another is.
    """
    streams_of: dict[tuple[int, int], list[WeightFile]] = {}
    num_files = Counter[int]()
    for file in files:
        stream = num_files[file.writer] % FILES_AT_ONCE
        num_files[file.writer] += 1
        streams_of.setdefault((file.writer, stream), []).append(file)
    streams = [_buckets_of(queue, max_bytes=max_bytes) for queue in streams_of.values()]
    for turn in zip_longest(*streams):
        yield from (item for item in turn if item is not None)


def _buckets_of(files: list[WeightFile], *, max_bytes: int) -> Iterator[tuple[WeightFile, Bucket]]:
    for file in files:
        for bucket in make_buckets(file.tensors, max_bytes=max_bytes):
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
