"""Reads a PEFT adapter: which projections it adapts, how, and where its tensors are.

The one thing to know: the tensors in the file are the truth. Ranks come from their shapes, layers
and projections from their names; each must fit the model, and none may be left over. Of the config
only the scale is taken, and its ranks must agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtrain.bridge.file_plan import fixed_dtypes
from mtrain.bridge.rules import Rule, WeightTable
from mtrain.bridge.safetensors_header import read_header
from mtrain.bridge.sources import StoredShape
from mtrain.lora.adapter_settings import AdapterSettings, read_settings, scale_ratio
from mtrain.lora.fused_experts import FusedFactors
from mtrain.lora.model_names import file_names
from mtrain.lora.plan import PEFT_PREFIX, AdaptedLinear, Adapter, LoraPlan, module_name
from mtrain.lora.saved_modules import find_saved_modules, saved_names
from mtrain.lora.stored_factors import (
    StoredProjection,
    find_fused,
    find_projections,
    fused_projections,
)

if TYPE_CHECKING:
    from mtrain.bridge.sources import TensorSource

WEIGHTS_FILE = "adapter_model.safetensors"

# float16 and bfloat16 have no common dtype but float32.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_Place = tuple[Rule, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """An adapter in a folder.

    Attributes:
        folder: The folder.
        lora: What it adapts.
        config: Its adapter_config.json.
        base: Name or path of the model it was trained on, as its author wrote it.
        dropout: Dropout that it was trained with.
        dtype: The widest dtype of its tensors, e.g. "bfloat16"; those that always have the same
            dtype do not count.
        fused: Factors of all experts at once in its file.
        source: Opens what holds its tensors.
        stored_names: Canonical name -> name in the file, of tensors that have another one there.
    """

    folder: Path
    lora: LoraPlan
    config: Mapping[str, Any]
    base: str | None
    dropout: float
    dtype: str
    fused: tuple[FusedFactors, ...] = ()
    source: Callable[[Sequence[FusedFactors]], AbstractContextManager[TensorSource]]
    stored_names: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def open(self) -> Iterator[TensorSource]:
        """Gives its tensors by their canonical names, one linear an expert; read when asked for."""
        with self.source(self.fused) as source:
            yield _Renamed(source, self.stored_names)


def read_adapter(folder: Path, table: WeightTable) -> StoredAdapter:
    """Reads an adapter that PEFT or mtrain made; values are read by `StoredAdapter.open`.

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors.
        table: Weights of the model that it is for.

    Raises:
        ValueError: It is not sound, does not fit the model, or needs what is not built.
    """
    settings = read_settings(folder)
    path = _weights_file(folder)
    return stored_adapter(
        read_header(path),
        table,
        folder=folder,
        path=path,
        settings=settings,
        source=functools.partial(_open_file, path),
    )


def stored_adapter(
    tensors: Mapping[str, StoredShape],
    table: WeightTable,
    *,
    folder: Path,
    path: Path,
    settings: AdapterSettings,
    source: Callable[[Sequence[FusedFactors]], AbstractContextManager[TensorSource]],
) -> StoredAdapter:
    """Finds out what an adapter adapts from the names and shapes of its tensors.

    Args:
        tensors: The tensors by PEFT's names.
        table: Weights of the model that it is for.
        folder: Its folder.
        path: The file that describes its tensors, for messages.
        settings: What its config says.
        source: Opens what holds its tensors.

    Raises:
        ValueError: It is not sound, does not fit the model, or needs what is not built.
    """
    try:
        _check_kinds(tensors)
        canonical = file_names(tensors, table)
        tensors = {canonical.get(name, name): tensor for name, tensor in tensors.items()}
        fused = find_fused(tensors, table)
        projections = [
            *find_projections(tensors, table, settings),
            *(projection for factors in fused for projection in fused_projections(factors)),
        ]
        left = set(tensors) - {name for projection in projections for name in projection.tensors}
        left -= _copied_embeddings(tensors, projections)
        modules_to_save = find_saved_modules(tensors, left, table, settings)
        left -= {name for rule in modules_to_save for name in saved_names(rule)}
        _check_nothing_left(left, table)
        if not projections:
            raise ValueError("has no factors of an adapter")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return StoredAdapter(
        folder=folder,
        lora=LoraPlan(
            linears=_linears(projections, table, settings), modules_to_save=modules_to_save
        ),
        config=settings.config,
        base=settings.base,
        dropout=settings.dropout,
        dtype=_widest_dtype(tensors, table),
        fused=tuple(fused),
        source=source,
        stored_names={name: stored for stored, name in canonical.items()},
    )


@dataclass(frozen=True, slots=True)
class _Renamed:
    """A source by canonical names."""

    source: TensorSource
    stored_names: Mapping[str, str]

    def slices(self, name: str) -> Any:
        """An object that gives parts of a tensor when it is indexed with slices."""
        return self.source.slices(self.stored_names.get(name, name))


def _open_file(path: Path, fused: Sequence[FusedFactors]) -> AbstractContextManager[TensorSource]:
    # Here, not above: it imports torch, which finding out what is adapted does without.
    from mtrain.lora.adapter_file import AdapterReader

    return AdapterReader(path, fused)


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt"})
    found = (
        f"; {', '.join(pickles[:10])} can run code and is never opened: convert it to safetensors"
        if pickles
        else ""
    )
    raise ValueError(f"{folder}: has no {WEIGHTS_FILE}{found}")


def _check_kinds(tensors: Mapping[str, StoredShape]) -> None:
    for name, tensor in tensors.items():
        if "lora_magnitude_vector" in name:
            raise ValueError(f"{name}: DoRA is not built")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; quantised adapters are not built")


def _widest_dtype(tensors: Mapping[str, StoredShape], table: WeightTable) -> str:
    fixed = {PEFT_PREFIX + name for name in fixed_dtypes(table)}
    found = {tensor.dtype for name, tensor in tensors.items() if name not in fixed}
    if found == {"F16", "BF16"}:
        return "float32"
    return next(name for dtype, name in _DTYPES.items() if dtype in found)


def _copied_embeddings(
    tensors: Mapping[str, StoredShape], projections: Sequence[StoredProjection]
) -> set[str]:
    """Base weights that PEFT stores beside an adapter of the embedding or the output layer."""
    weights = [
        projection.rule.hf[projection.source]
        for projection in projections
        if projection.rule.place != "layers"
    ]
    named = {f"{PEFT_PREFIX}{module_name(weight)}.base_layer.weight": weight for weight in weights}
    return {
        name
        for name, weight in named.items()
        if name in tensors and tensors[name].shape == weight.shape
    }


def _check_nothing_left(left: set[str], table: WeightTable) -> None:
    if left:
        names = ", ".join(sorted(left)[:10]) + (
            f" and {len(left) - 10} more" if len(left) > 10 else ""
        )
        raise ValueError(
            f"does not fit the model, which has {table.num_layers} layers: nothing there takes "
            f"{names}"
        )


def _linears(
    projections: Sequence[StoredProjection], table: WeightTable, settings: AdapterSettings
) -> tuple[AdaptedLinear, ...]:
    """Collects projections to linears, and layers that are the same."""
    lookup_names = [name for projection in projections for name in projection.lookup_names]
    values = settings.ranks_and_alphas(lookup_names)
    at_place: dict[_Place, dict[int, Adapter]] = {}
    for projection in projections:
        adapters = at_place.setdefault((projection.rule, projection.layer), {})
        if projection.source in adapters:
            raise ValueError(
                f"{settings.path.parent}: has experts of layer {projection.layer} twice, fused and "
                "one by one"
            )
        adapters[projection.source] = _adapter(projection, values, settings)
    layers: dict[tuple[Rule, tuple[Adapter | None, ...]], list[int]] = {}
    for rule, layer in sorted(
        at_place, key=lambda place: (table.rules.index(place[0]), place[1] or 0)
    ):
        adapters = at_place[rule, layer]
        alike = layers.setdefault((rule, tuple(map(adapters.get, range(len(rule.hf))))), [])
        if layer is not None:
            alike.append(layer)
    return tuple(
        AdaptedLinear(rule=rule, adapters=adapters, layers=tuple(alike))
        for (rule, adapters), alike in layers.items()
    )


def _adapter(
    projection: StoredProjection,
    values: Mapping[str, tuple[int, float]],
    settings: AdapterSettings,
) -> Adapter:
    alphas = set()
    for name in projection.lookup_names:
        rank, alpha = values[name]
        if rank != projection.stored_rank:
            raise ValueError(
                f"{settings.path}: {name} has rank {rank} there, and rank {projection.stored_rank} "
                f"in {WEIGHTS_FILE}"
            )
        alphas.add(alpha)
    if len(alphas) > 1:
        raise ValueError(
            f"{settings.path}: experts of {projection.lookup_names[0]} and others of its layer "
            f"have different alphas: {sorted(alphas)[:10]}"
        )
    ratio = scale_ratio(projection.rank, projection.stored_rank, use_rslora=settings.use_rslora)
    # Rounded, so that the square root does not let alpha drift from save to save.
    alpha = float(f"{alphas.pop() * ratio:.14g}") if ratio != 1 else alphas.pop()
    return Adapter(rank=projection.rank, alpha=alpha, use_rslora=settings.use_rslora)
