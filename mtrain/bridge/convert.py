"""Writes weights from any source as safetensors files, without a model and without collectives.

The one thing to know: every file is written by one thread of one rank, front to back; other threads
read a few blocks of rows ahead of it. What is in the files does not depend on the number of ranks,
and memory does not depend on the size of the checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.file_plan import cut_by_size, file_name
from mtrain.bridge.plan import Shape
from mtrain.bridge.safetensors_folder import WEIGHTS_STEM
from mtrain.bridge.safetensors_header import tensor_bytes
from mtrain.bridge.safetensors_writer import SafetensorsWriter
from mtrain.bridge.sources import StoredShape, StoredWeights, TensorSource
from mtrain.bridge.written import WrittenFile, write_index

# From 32 MiB on, malloc maps fresh pages for every block, which takes longer than to fill them.
_BLOCK_BYTES = 8 * 2**20
_MAX_THREADS = 16


@dataclass(frozen=True, slots=True)
class _Share:
    """A file to write: its name, and name, dtype and shape of its tensors."""

    name: str
    entries: tuple[tuple[str, str, Shape], ...]
    num_bytes: int


def write_weights(
    weights: StoredWeights,
    folder: Path,
    *,
    max_shard_size: int,
    rank: int,
    world_size: int,
    stem: str = WEIGHTS_STEM,
) -> list[WrittenFile]:
    """Writes the files of this rank; all ranks together write all tensors.

    Args:
        weights: What to write, in its dtypes and its order.
        folder: An existing folder without weight files.
        max_shard_size: Most bytes of tensors in a file; a larger tensor has a file for itself.
        rank: This rank.
        world_size: Ranks that share the work.
        stem: How the names of the files begin.

    Returns:
        The files of this rank, the index among those of the first.

    Raises:
        OSError: A file could not be written.
    """
    shares = _plan(weights.tensors, max_shard_size=max_shard_size, stem=stem)
    mine = _of_rank(shares, rank=rank, world_size=world_size)
    num_files = max(1, min(len(mine), num_threads()))
    with (
        weights.open() as source,
        io_threads(num_threads()) as readers,
        ThreadPoolExecutor(num_files) as writers,
    ):
        ahead = 1 + num_threads() // num_files
        written = list(
            writers.map(lambda share: _write(share, source, folder, readers, ahead=ahead), mine)
        )
    if rank == 0 and len(shares) > 1:
        weight_map = {name: share.name for share in shares for name, _, _ in share.entries}
        num_bytes = sum(share.num_bytes for share in shares)
        written.append(write_index(folder, weight_map, num_bytes=num_bytes, stem=stem))
    return written


def num_threads() -> int:
    """Threads of a rank that read, convert and write; its share of the machine's cores."""
    return max(1, min(_MAX_THREADS, torch.get_num_threads()))


@contextmanager
def io_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for work of their own; torch would start as many again in each of them.

    Args:
        count: How many.
    """
    of_torch = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads
    finally:
        # What a thread sets is also the start of those that come later.
        torch.set_num_threads(of_torch)


def row_blocks(shape: Shape, *, itemsize: int) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of blocks of bounded size; at least a row each.

    A tensor without axes is one row.
    """
    num_rows = shape[0] if shape else 1
    row_bytes = max(1, tensor_bytes("U8", shape[1:]) * itemsize)
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _plan(
    tensors: Mapping[str, StoredShape], *, max_shard_size: int, stem: str
) -> tuple[_Share, ...]:
    sized = (
        ((name, tensor.dtype, tensor.shape), tensor_bytes(tensor.dtype, tensor.shape))
        for name, tensor in tensors.items()
    )
    parts = list(cut_by_size(sized, max_size=max_shard_size))
    return tuple(
        _Share(file_name(number, len(parts), stem=stem), entries, num_bytes)
        for number, (entries, num_bytes) in enumerate(parts, start=1)
    )


def _of_rank(shares: Sequence[_Share], *, rank: int, world_size: int) -> list[_Share]:
    """Each file goes to the rank with the fewest bytes so far."""
    load = [0] * world_size
    mine = []
    for share in shares:
        writer = load.index(min(load))
        load[writer] += share.num_bytes
        if writer == rank:
            mine.append(share)
    return mine


def _write(
    share: _Share, source: TensorSource, folder: Path, readers: ThreadPoolExecutor, *, ahead: int
) -> WrittenFile:
    waiting: deque[Future[torch.Tensor]] = deque()
    with SafetensorsWriter(folder / share.name, share.entries) as writer:
        try:
            for block in _blocks(share, source):
                waiting.append(readers.submit(_read, *block))
                if len(waiting) > ahead:
                    writer.append(waiting.popleft().result())
            while waiting:
                writer.append(waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()
    return writer.written


def _blocks(share: _Share, source: TensorSource) -> Iterator[tuple[Any, int, int]]:
    """The blocks of each tensor in turn: something that gives rows, the first and the last."""
    for name, dtype, shape in share.entries:
        stored = source.slices(name)
        for start, stop in row_blocks(shape, itemsize=tensor_bytes(dtype, (1,))):
            yield stored, start, stop


@torch.no_grad()
def _read(stored: Any, start: int, stop: int) -> torch.Tensor:
    """The bytes of some rows."""
    part = stored[start:stop]
    assert not part.shape or part.shape[0] == stop - start, f"{start}:{stop} gave {part.shape}"
    return part.contiguous().flatten().view(torch.uint8)
