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
from typing import TYPE_CHECKING

import numpy as np
import pyarrow

if TYPE_CHECKING:
    from mtrain.data.encode import Encoded

__all__ = ["IGNORED", "Sample", "TokenizedDataset", "write_samples"]

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
                writer.write_table(_as_table(chunk))


def _as_table(chunk: Sequence[Encoded]) -> pyarrow.Table:
    lengths = np.array([len(sample.input_ids) for sample in chunk], dtype=np.int32)
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

    def as_lists(arrays: list[np.ndarray]) -> pyarrow.ListArray:
        return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(np.concatenate(arrays)))

    return pyarrow.table(
        {
            "input_ids": as_lists([sample.input_ids for sample in chunk]),
            "labels": as_lists([sample.labels for sample in chunk]),
            "length": lengths,
            "place": [sample.place for sample in chunk],
        },
        schema=_SCHEMA,
    )


@dataclass(frozen=True, slots=True)
class Sample:
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
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        self.lengths: np.ndarray = table.column("length").to_numpy()
        self._places = table.column("place")
        self._input_ids = [_views(chunk) for chunk in table.column("input_ids").chunks]
        self._labels = [_views(chunk) for chunk in table.column("labels").chunks]
        rows = [len(offsets) - 1 for offsets, _ in self._input_ids]
        self._first_rows = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        chunk = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        row = index - int(self._first_rows[chunk])
        offsets, ids = self._input_ids[chunk]
        label_offsets, labels = self._labels[chunk]
        return Sample(
            ids[offsets[row] : offsets[row + 1]],
            labels[label_offsets[row] : label_offsets[row + 1]],
        )

    def place(self, index: int) -> str:
        """File and line that a sample comes from, for messages about it."""
        return self._places[index].as_py()


def _views(lists: pyarrow.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and flat values, both without a copy."""
    return lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=True)
