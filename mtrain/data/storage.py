"""Tokenised samples on disk: one Arrow file, memory-mapped, read without copies.

The one thing to know: reading is safe from any number of processes and threads and costs no memory
of its own; the page cache is shared. The file is one of Hugging Face's `datasets`, which is not
imported for it: that takes a second on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow

__all__ = ["IGNORED", "Encoded", "Sample", "TokenizedDataset", "write_samples"]

# The label of a position without loss.
IGNORED = -100

_FILE_NAME = "data.arrow"
_IDS = {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}
# What `datasets` writes there, so that it can open the file (`datasets.Dataset.from_file`).
_FEATURES = {
    "input_ids": _IDS,
    "labels": _IDS,
    "length": {"dtype": "int32", "_type": "Value"},
    "place": {"dtype": "string", "_type": "Value"},
}
_SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "labels": pyarrow.list_(pyarrow.int32()),
        "length": pyarrow.int32(),
        "place": pyarrow.string(),
    },
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample to be stored. `input_ids` and `labels` are int32 [length]."""

    input_ids: np.ndarray
    labels: np.ndarray
    place: str
    truncated: bool


def write_samples(folder: Path, chunks: Iterable[Sequence[Encoded]]) -> None:
    """Write samples, chunk by chunk, into a new folder.

    Args:
        folder: Is created.
        chunks: A few hundred samples each; one chunk is held in memory.
    """
    folder.mkdir(parents=True)
    with pyarrow.ipc.new_stream(folder / _FILE_NAME, _SCHEMA) as writer:
        for chunk in chunks:
            if chunk:
                writer.write_batch(_as_batch(chunk))


def _as_batch(chunk: Sequence[Encoded]) -> pyarrow.RecordBatch:
    """A chunk in the form of the file.

    Out of buffers, because whatever makes arrays of Python's objects (`pyarrow.array`) imports
    pandas, which takes half a second.
    """
    lengths = np.array([len(sample.input_ids) for sample in chunk], dtype=np.int32)
    places = [sample.place.encode() for sample in chunk]

    def as_lists(arrays: list[np.ndarray]) -> pyarrow.ListArray:
        return pyarrow.ListArray.from_arrays(
            _as_array(_offsets(lengths)), _as_array(np.concatenate(arrays))
        )

    return pyarrow.record_batch(
        [
            as_lists([sample.input_ids for sample in chunk]),
            as_lists([sample.labels for sample in chunk]),
            _as_array(lengths),
            pyarrow.StringArray.from_buffers(
                len(places),
                pyarrow.py_buffer(_offsets([len(place) for place in places])),
                pyarrow.py_buffer(b"".join(places)),
            ),
        ],
        schema=_SCHEMA,
    )


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _as_array(values: np.ndarray) -> pyarrow.Array:
    assert values.dtype == np.int32, values.dtype
    return pyarrow.Array.from_buffers(
        pyarrow.int32(), len(values), [None, pyarrow.py_buffer(values)]
    )


class Sample(NamedTuple):
    """One document. `input_ids` and `labels` are int32 [length], read-only views of the file."""

    input_ids: np.ndarray
    labels: np.ndarray


class TokenizedDataset:
    """Random access to the samples of a prepared folder.

    `lengths`: tokens of every sample, int32 [num_samples].
    """

    def __init__(self, folder: Path) -> None:
        """Map the file; only the lengths are read.

        Raises:
            ValueError: The folder holds no prepared data.
        """
        path = folder / _FILE_NAME
        if not path.is_file():
            raise ValueError(f"{folder}: no prepared data ({_FILE_NAME}) here")
        mapped = pyarrow.memory_map(str(path)).read_buffer()
        table = pyarrow.ipc.open_stream(mapped).read_all()
        lengths = [_as_numpy(chunk) for chunk in table.column("length").chunks]
        self.lengths: np.ndarray = np.concatenate(lengths or [np.empty(0, np.int32)])
        self._places = table.column("place")
        # Everything is found by its place in the file: samples of a batch lie in many chunks.
        self._file = np.frombuffer(mapped, dtype=np.int32)
        self._input_ids = _Lists(table.column("input_ids"), self._file)
        self._labels = _Lists(table.column("labels"), self._file)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        return self.samples(np.array([index]))[0]

    def samples(self, indices: np.ndarray) -> list[Sample]:
        """Samples by number, int64 [num_indices].

        Raises:
            IndexError: There is none with such a number.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"samples {indices.min()} to {indices.max()} of {len(self)}")
        lengths = self.lengths[indices]
        ids, labels = self._input_ids.starts(indices), self._labels.starts(indices)
        bounds = np.stack([ids, ids + lengths, labels, labels + lengths], axis=1).tolist()
        file = self._file
        return [Sample(file[i:j], file[k:end]) for i, j, k, end in bounds]

    def place(self, index: int) -> str:
        """File and line that a sample comes from, for messages about it."""
        return self._places[index].as_py()


class _Lists:
    """A column of lists in a file.

    Args:
        column: Lists of int32, in chunks.
        file: int32, all of it; places in it are counted in values.
    """

    def __init__(self, column: pyarrow.ChunkedArray, file: np.ndarray) -> None:
        chunks = column.chunks
        first_address = file.ctypes.data

        def places(arrays: list[pyarrow.Array]) -> np.ndarray:
            found = [
                (array.buffers()[1].address - first_address) // file.itemsize + array.offset
                for array in arrays
            ]
            return np.array(found, dtype=np.int64)

        self._file = file
        self._first_rows = np.cumsum([0, *map(len, chunks)])
        self._offsets = places([chunk.offsets for chunk in chunks])
        self._values = places([chunk.values for chunk in chunks])

    def starts(self, rows: np.ndarray) -> np.ndarray:
        """Where lists begin in the file, int64 [num_rows].

        Args:
            rows: Numbers of lists, int64 [num_rows].
        """
        chunk = np.searchsorted(self._first_rows, rows, side="right") - 1
        offsets = self._offsets[chunk] + rows - self._first_rows[chunk]
        return self._values[chunk] + self._file[offsets]


def _as_numpy(array: pyarrow.Array) -> np.ndarray:
    """The int32 values, not copied; `to_numpy` imports pandas as well."""
    assert array.type == pyarrow.int32(), array.type
    assert array.null_count == 0
    _, values = array.buffers()
    return np.frombuffer(values, dtype=np.int32)[array.offset : array.offset + len(array)]
