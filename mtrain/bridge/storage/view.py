"""A checkpoint by the canonical tensors of its model, whatever form its files hold them in.

The one thing to know: a part of a canonical tensor is a part of the stored one, so nothing is read
that is not needed: the rows of one expert, or of one projection. Only where they are stored
transposed are the other rows of that expert read with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrain.bridge.ledger import listed
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.sources import StoredShape, StoredWeights, TensorShape, TensorSource
from mtrain.bridge.storage.arrangement import Arrangement, Shape, find_arrangements
from mtrain.bridge.storage.bounds import bounds_of, slices_of
from mtrain.bridge.storage.decoded import DecodedWeights, decoded
from mtrain.bridge.storage.quantization import Fp8Blocks


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a canonical tensor is in stored ones."""

    arrangement: Arrangement
    slab: int
    part: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrangedWeights:
    """A checkpoint by canonical names; see `StoredWeights`.

    Attributes:
        decoded: What is in the files, without quantisation.
        arrangements: The stored tensors that consist of canonical ones.
        tensors: All canonical tensors, and what is stored besides.
        places: Where those are that are not stored by themselves.
    """

    decoded: DecodedWeights
    arrangements: tuple[Arrangement, ...]
    tensors: Mapping[str, StoredShape]
    places: Mapping[str, _Place]

    @property
    def checkpoint(self) -> StoredWeights:
        """What is in the files."""
        return self.decoded.checkpoint

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.checkpoint.folder

    @contextmanager
    def open(self) -> Iterator[TensorSource]:
        """Gives the tensors; read when asked for."""
        with self.decoded.open() as stored:
            yield _ArrangedSource(stored, self.places) if self.places else stored


def arranged(
    checkpoint: StoredWeights, table: WeightTable, *, blocks: Fp8Blocks | None = None
) -> ArrangedWeights:
    """A checkpoint by canonical names.

    Args:
        checkpoint: What is in the files.
        table: Weights of its model.
        blocks: How its 8-bit floats are scaled; in blocks of 128 x 128 if None.

    Raises:
        ValueError: A form is there in part, twice, or in another shape; the first ten of each kind
            are named. What is missing or left over besides is for `check_checkpoint`.
    """
    plain, faults = decoded(checkpoint, blocks or Fp8Blocks())
    found, more = find_arrangements(table, plain.tensors)
    # A tensor of which half is missing is there, so that its other half is what is told.
    texts = [
        text
        for kind in dict.fromkeys((*faults, *more))
        for text in listed(kind, [*faults.get(kind, ()), *more.get(kind, ())])
    ]
    if texts:
        raise ValueError(f"{checkpoint.folder}: does not fit its config.json: {'; '.join(texts)}")
    by_name = {one.name: one for one in found}
    tensors: dict[str, StoredShape] = {}
    places: dict[str, _Place] = {}
    for name, tensor in plain.tensors.items():
        if name not in by_name:
            tensors[name] = tensor
            continue
        for part_name, shape, place in _places(by_name[name]):
            tensors[part_name] = TensorShape(tensor.dtype, shape)
            places[part_name] = place
    return ArrangedWeights(decoded=plain, arrangements=found, tensors=tensors, places=places)


def _places(arrangement: Arrangement) -> Iterator[tuple[str, Shape, _Place]]:
    for slab, names in enumerate(arrangement.slabs):
        for part, name in enumerate(names):
            yield name, arrangement.part_shapes[part], _Place(arrangement, slab, part)


class _ArrangedSource:
    def __init__(self, stored: TensorSource, places: Mapping[str, _Place]) -> None:
        self._stored = stored
        self._places = places

    def slices(self, name: str) -> Any:
        """An object that gives parts of a tensor when it is indexed with slices."""
        place = self._places.get(name)
        if place is None:
            return self._stored.slices(name)
        return _PartSlices(self._stored.slices(place.arrangement.name), place)


class _PartSlices:
    """A canonical tensor inside of a stored one."""

    def __init__(self, stored: Any, place: _Place) -> None:
        self._stored = stored
        self._place = place

    def __getitem__(self, key: Any) -> Any:
        """The part."""
        one, part = self._place.arrangement, self._place.part
        (start, stop), *others = bounds_of(key, one.part_shapes[part])
        step, first = one.row_step, one.first_row(part)
        last = first + (stop - 1) * step + 1 if start < stop else first + start * step
        bounds = ((first + start * step, last), *others)
        if one.is_transposed:
            bounds = bounds[::-1]
        if one.is_stacked:
            bounds = ((self._place.slab, self._place.slab + 1), *bounds)
        values = self._stored[slices_of(bounds)]
        if one.is_stacked:
            values = values[0]
        if one.is_transposed:
            values = values.t()
        return values[::step]
