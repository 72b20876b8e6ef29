"""The file of an adapter: its tensors by canonical names, written and read.

Canonical names are PEFT's with one linear an expert. In a file with fused experts they stand for
parts of its tensors; see `mtrain.lora.fused_experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mtrain.bridge.file_plan import fixed_dtypes
from mtrain.bridge.plan import Shape, hf_tensors
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_header import read_header
from mtrain.bridge.safetensors_reader import DTYPES, SafetensorsReader
from mtrain.bridge.safetensors_writer import SafetensorsWriter
from mtrain.bridge.save import DTYPE_NAMES
from mtrain.bridge.sources import TensorSource
from mtrain.bridge.written import WrittenFile
from mtrain.lora.fused_experts import ExpertLayout, FusedFactors, fused_factors
from mtrain.lora.model_names import plan_in_model
from mtrain.lora.plan import LoraPlan, adapter_table


class AdapterReader:
    """The tensors of an adapter by their canonical names; a `TensorSource`.

    Args:
        path: The file.
        fused: Factors of fused parameters in it.
    """

    def __init__(self, path: Path, fused: Iterable[FusedFactors]) -> None:
        self._path = path
        self._stack = ExitStack()
        # Where single experts are: (factors, 0 for A or 1 for B, expert, projection).
        self._places: dict[str, tuple[FusedFactors, int, int, int]] = {}
        for factors in fused:
            for a_name, b_name, expert, source in factors.members():
                self._places[a_name] = (factors, 0, expert, source)
                self._places[b_name] = (factors, 1, expert, source)
        # Experts are asked for one after the other.
        self._last: tuple[str, torch.Tensor] | None = None

    def __enter__(self) -> AdapterReader:
        self._file = self._stack.enter_context(safe_open(self._path, framework="pt"))
        return self

    def __exit__(self, *exception: object) -> None:
        self._last = None
        self._stack.close()

    def slices(self, name: str) -> Any:
        """A tensor, or something that gives parts of it when it is indexed with slices."""
        if name not in self._places:
            return self._file.get_slice(name)
        factors, which, expert, source = self._places[name]
        stored = factors.names[which]
        # Read once: another thread may replace it meanwhile.
        last = self._last
        if last is None or last[0] != stored:
            last = self._last = (stored, self._file.get_tensor(stored))
        take = (factors.take_a, factors.take_b)[which]
        return take(last[1], expert, source)


def write_adapter_file(
    source: TensorSource,
    target: Path,
    *,
    lora: LoraPlan,
    table: WeightTable,
    layout: ExpertLayout,
    dtype: torch.dtype,
) -> WrittenFile:
    """Writes the file of an adapter, tensor by tensor, in the order of the model.

    Args:
        source: Gives the tensors by their canonical names.
        target: The new file.
        lora: The adapters.
        table: Weights of the model.
        layout: Whether to fuse experts.
        dtype: Dtype of all tensors, but of those that have a fixed one.

    Raises:
        OSError: It could not be written.
    """
    fused = fused_factors(lora, table) if layout == "fused" else ()
    fixed = fixed_dtypes(adapter_table(table, lora))
    outputs = list(_outputs(hf_tensors(adapter_table(table, lora)), fused))
    names = _names_in_model(lora, table)
    entries = [
        (
            names.get(output.name, output.name),
            fixed.get(output.first, DTYPE_NAMES[dtype]),
            output.shape,
        )
        for output in outputs
    ]
    with SafetensorsWriter(target, entries) as writer:
        for output, (_, its_dtype, _) in zip(outputs, entries, strict=True):
            tensor = output.make(partial(_read, source, dtype=DTYPES[its_dtype]))
            writer.append(tensor.contiguous().flatten().view(torch.uint8))
    return writer.written


def join_adapter_files(
    parts: Sequence[Path],
    target: Path,
    *,
    lora: LoraPlan,
    table: WeightTable,
    layout: ExpertLayout,
) -> WrittenFile:
    """Writes one file of what several hold; the bytes do not depend on how they were cut.

    Args:
        parts: Files that hold the tensors of the adapter under their canonical names, each once, in
            one dtype but for those that have a fixed one. They stay.
        target: The new file.
        lora: The adapters.
        table: Weights of the model.
        layout: Whether to fuse experts.

    Raises:
        OSError: It could not be written.
    """
    stored = [item for part in parts for item in read_header(part).items()]
    shapes = hf_tensors(adapter_table(table, lora))
    assert sorted((name, tensor.shape) for name, tensor in stored) == sorted(shapes.items()), (
        "parts are not the adapter"
    )
    fixed = fixed_dtypes(adapter_table(table, lora))
    (name,) = {tensor.dtype for name, tensor in stored if name not in fixed}
    (dtype,) = (dtype for dtype, its_name in DTYPE_NAMES.items() if its_name == name)
    with SafetensorsReader(dict(stored)) as source:
        return write_adapter_file(
            source, target, lora=lora, table=table, layout=layout, dtype=dtype
        )


def _read(source: TensorSource, name: str, *, dtype: torch.dtype) -> torch.Tensor:
    return source.slices(name)[:].to(dtype)


def _names_in_model(lora: LoraPlan, table: WeightTable) -> dict[str, str]:
    """Canonical name -> name in the file; PEFT's where transformers calls a module otherwise."""
    in_model = adapter_table(table, plan_in_model(lora, table))
    return dict(zip(hf_tensors(adapter_table(table, lora)), hf_tensors(in_model), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """A tensor to write: one of the source, or a fused one.

    Attributes:
        name: Its name.
        shape: Its shape.
        first: The first of the tensors that it is made of.
        fused: The fused factors that it is one of; None for a copy.
        which: 0 for A, 1 for B.
    """

    name: str
    shape: Shape
    first: str
    fused: FusedFactors | None = None
    which: int = 0

    def make(self, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The tensor, from tensors of the source."""
        return get(self.first) if self.fused is None else self.fused.fuse(get, which=self.which)


def _outputs(shapes: Mapping[str, Shape], fused: Iterable[FusedFactors]) -> Iterator[_Output]:
    """What to write, fused tensors where their first expert would be."""
    places: dict[str, tuple[FusedFactors, int]] = {}
    for factors in fused:
        for a_name, b_name, _, _ in factors.members():
            places[a_name], places[b_name] = (factors, 0), (factors, 1)
    written: set[str] = set()
    for name, shape in shapes.items():
        if name not in places:
            yield _Output(name=name, shape=shape, first=name)
            continue
        factors, which = places[name]
        output = _Output(
            name=factors.names[which],
            shape=factors.shapes[which],
            first=name,
            fused=factors,
            which=which,
        )
        if output.name not in written:
            written.add(output.name)
            yield output
