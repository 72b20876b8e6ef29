"""Canonical tensors in the form that files hold them in: the reverse of `arranged`.

The one thing to know: it is a `StoredWeights` like any other, so whoever writes files asks it for
rows of stored tensors and knows of no form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.safetensors_reader import DTYPES
from mtrain.bridge.sources import StoredShape, StoredWeights, TensorShape, TensorSource
from mtrain.bridge.storage.arrangement import Arrangement, as_it_is
from mtrain.bridge.storage.bounds import bounds_of
from mtrain.bridge.storage.decoded import SCALE_SUFFIX
from mtrain.bridge.storage.fp8_blocks import QuantizedSlices
from mtrain.bridge.storage.stored_as import StoredAs

_Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedWeights:
    """Weights as files hold them; see `StoredWeights`.

    Attributes:
        weights: The canonical tensors.
        form: The form.
        tensors: All stored tensors, in the order of the canonical ones.
        stored: What each of them consists of.
    """

    weights: StoredWeights
    form: StoredAs
    tensors: Mapping[str, StoredShape]
    stored: Mapping[str, Arrangement]

    @property
    def folder(self) -> Path:
        """Folder of the canonical weights."""
        return self.weights.folder

    @contextmanager
    def open(self) -> Iterator[TensorSource]:
        """Gives the stored tensors; read and computed when asked for."""
        with ExitStack() as stack:
            values = stack.enter_context(self.weights.open())
            kept = copied = None
            if self.form.quantized is not None:
                kept = stack.enter_context(self.form.quantized.source.open())
            if self.form.carried is not None:
                copied = stack.enter_context(self.form.carried.source.open())
            yield _ComposedSource(self, values, kept, copied)


def composed(weights: StoredWeights, form: StoredAs) -> StoredWeights:
    """Weights as files hold them.

    Args:
        weights: Canonical tensors, in the dtypes to write.
        form: The form to write them in.
    """
    if form.is_canonical:
        return weights
    holder = form.by_canonical()
    tensors: dict[str, StoredShape] = {}
    stored: dict[str, Arrangement] = {}
    for name, tensor in weights.tensors.items():
        one = holder.get(name) or as_it_is(name, tuple(tensor.shape))
        if one.name in stored:
            continue
        stored[one.name] = one
        dtypes = {weights.tensors[part].dtype for part, _ in one.canonical}
        assert len(dtypes) == 1 or form.is_quantized(one.name), f"{one.name}: {dtypes}"
        for entry, dtype, shape in form.entries(one, tensor.dtype):
            tensors[entry] = TensorShape(dtype, shape)
        for copy in form.copies_of(name, tuple(tensor.shape)):
            stored[copy.name] = copy
            tensors[copy.name] = TensorShape(tensor.dtype, copy.shape)
    if form.carried is not None:
        assert not tensors.keys() & form.carried.tensors.keys(), "copied and written"
        tensors |= form.carried.tensors
    return ComposedWeights(weights=weights, form=form, tensors=tensors, stored=stored)


class _ComposedSource:
    def __init__(
        self,
        composed: ComposedWeights,
        values: TensorSource,
        kept: TensorSource | None,
        copied: TensorSource | None,
    ) -> None:
        self._composed, self._values, self._kept, self._copied = composed, values, kept, copied

    def slices(self, name: str) -> Any:
        """An object that gives parts of a stored tensor when it is indexed with slices."""
        form, stored = self._composed.form, self._composed.stored
        if form.carried is not None and name in form.carried.tensors:
            assert self._copied is not None, "open gives it"
            return self._copied.slices(name)
        if name in stored and not form.is_quantized(name):
            return self._plain(stored[name])
        assert form.quantized is not None and self._kept is not None, f"{name} is not stored"
        base = name if name in stored else name.removesuffix(SCALE_SUFFIX)
        return QuantizedSlices(
            self._plain(stored[base]),
            stored[base].shape,
            form.quantized.blocks,
            kept=self._kept.slices(f"{base}{SCALE_SUFFIX}"),
            scale_dtype=DTYPES[form.quantized.scale_dtypes[base]],
            gives_scales=base != name,
        )

    def _plain(self, stored: Arrangement) -> Any:
        if stored.is_plain:
            return self._values.slices(stored.slabs[0][0])
        return ComposedSlices(stored, self._values.slices)


class ComposedSlices:
    """A stored tensor; parts are put together from canonical tensors when they are asked for.

    Args:
        stored: What it consists of.
        slices: Gives a canonical tensor, or something that gives parts of it.
    """

    def __init__(self, stored: Arrangement, slices: Callable[[str], Any]) -> None:
        self._stored = stored
        self._slices = slices

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The part."""
        bounds = bounds_of(key, self._stored.shape)
        first, last = 0, 1
        if self._stored.is_stacked:
            (first, last), *bounds = bounds
        rows, *others = reversed(bounds) if self._stored.is_transposed else bounds
        columns = tuple(slice(*span) for span in others)
        if not self._stored.is_stacked:
            return self._slab(self._stored.slabs[0], rows, columns)
        # One slab too many where none is asked for: its shape is that of the part.
        names = self._stored.slabs[first : max(last, first + 1)] or self._stored.slabs[:1]
        slabs = [self._slab(of_slab, rows, columns) for of_slab in names]
        return torch.stack(slabs)[: last - first]

    def _slab(self, names: tuple[str, ...], rows: _Span, columns: tuple[slice, ...]) -> Any:
        """Some rows of a slab, and of them some columns, before it is transposed."""
        stored = self._stored
        parts = []
        for part, name in enumerate(names):
            num_rows, first = stored.part_shapes[part][0], stored.first_row(part)
            start, stop = (
                min(max(0, -((first - row) // stored.row_step)), num_rows) for row in rows
            )
            parts.append((self._slices(name)[(slice(start, stop), *columns)], first, start))
        if stored.order == "concatenated":
            values = torch.cat([values for values, _, _ in parts])
        else:
            values = _interleaved(parts, rows, step=stored.row_step)
        return values.t() if stored.is_transposed else values


def _interleaved(
    parts: list[tuple[torch.Tensor, int, int]], rows: _Span, *, step: int
) -> torch.Tensor:
    """Rows of parts one after the other, where each belongs: (values, first row, their number)."""
    example = parts[0][0]
    shape = (rows[1] - rows[0], *example.shape[1:])
    values = torch.empty(shape, dtype=example.dtype, device=example.device)
    for part, first, start in parts:
        values[first + start * step - rows[0] :: step] = part
    return values
