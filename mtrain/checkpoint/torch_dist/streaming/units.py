"""The chunks of a torch_dist checkpoint: which there are, who writes them, and what is in each.

The one thing to know: a chunk is a parameter of a layer or of an expert, so it is small, and it is
made from Hugging Face tensors only when it is written. Ranks take runs of consecutive chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from mtrain.bridge.converted import TORCH_DTYPES
from mtrain.bridge.global_tensors import GlobalParameter, global_parameters, has_equal_layers
from mtrain.bridge.plan import Shape
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.slices import read_box, view_box
from mtrain.bridge.sources import StoredWeights, TensorSource
from mtrain.bridge.spans import Piece, Span, clip

_WITHOUT_STATE = ("embedding.word_embeddings", "output_layer")
# Parameters that are larger are cut along their rows; see `_BLOCK_BYTES` of `bridge/convert.py`.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A chunk to write: some rows of a parameter of the whole model.

    Attributes:
        parameter: The parameter.
        expert: Which expert; None where there are none.
        start: First row.
        shape: Shape of the rows.
        dtype: Their dtype.
        stacked: Whether the checkpoint stacks layers.
    """

    parameter: GlobalParameter
    expert: int | None
    start: int
    shape: Shape
    dtype: torch.dtype
    stacked: bool

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    def sharded(self) -> ShardedTensor:
        """Its description in Megatron-Core's words, without data."""
        front = self.parameter.front(stacked=self.stacked, expert=self.expert)
        offsets = [(axis, index, size) for axis, (index, size) in enumerate(front)]
        num_parts = self.parameter.shape[0] // self.shape[0]
        if num_parts > 1:
            offsets.append((len(front), self.start // self.shape[0], num_parts))
        return ShardedTensor.from_rank_offsets(
            self.parameter.key(stacked=self.stacked),
            torch.empty(self.shape, dtype=self.dtype, device="meta"),
            *offsets,
            prepend_axis_num=len(front),
            allow_shape_mismatch=self.parameter.may_be_padded,
        )

    def empty_states(self) -> list[ShardedObject]:
        """The states of 8-bit scaling that its module would have, which Megatron-Core asks for.

        Transformer Engine's linears and norms have one, and so has attention, here beside the
        projection that comes before it.
        """
        module, _, kind = self.parameter.name.rpartition(".")
        has_none = module in _WITHOUT_STATE or module.endswith(".router")
        if self.start or kind != "weight" or has_none:
            return []
        modules = [module]
        if module.endswith(".linear_qkv"):
            modules.append(f"{module.removesuffix('linear_qkv')}core_attention")
        front = self.parameter.front(stacked=self.stacked, expert=self.expert) or ((0, 1),)
        offsets, sizes = zip(*front, strict=True)
        return [
            ShardedObject(
                replace(self.parameter, name=f"{name}._extra_state").key(stacked=self.stacked),
                None,
                sizes,
                offsets,
            )
            for name in modules
        ]

    def make(self, source: TensorSource) -> torch.Tensor:
        """Its values, with an axis of one for each that is in front."""
        new = torch.zeros if self.parameter.has_gaps else torch.empty
        tensor = new(self.shape, dtype=self.dtype)
        for piece in self.parameter.pieces_of(self.expert):
            for theirs, ours in _clipped(piece, self.start, self.start + self.shape[0]):
                target = view_box(tensor, (ours.shifted(-self.start), *piece.local[1:]))
                values = read_box(source.slices(piece.hf_name), (theirs, *piece.hf[1:]))
                target.copy_(values)
        num_axes = len(self.parameter.front(stacked=self.stacked, expert=self.expert))
        return tensor.view(*[1] * num_axes, *self.shape)


def plan_units(table: WeightTable, weights: StoredWeights) -> list[Unit]:
    """All chunks of a checkpoint, in the order of the model."""
    stacked = has_equal_layers(table)
    units = []
    for parameter in global_parameters(table):
        dtype = _common_dtype(parameter, weights)
        size = _rows_at_once(parameter.shape, itemsize=dtype.itemsize)
        units += [
            Unit(
                parameter=parameter,
                expert=expert,
                start=start,
                shape=(size, *parameter.shape[1:]),
                dtype=dtype,
                stacked=stacked,
            )
            for expert in parameter.experts
            for start in range(0, parameter.shape[0], size)
        ]
    return units


def _common_dtype(parameter: GlobalParameter, weights: StoredWeights) -> torch.dtype:
    names = {piece.hf_name for piece in parameter.pieces}
    dtypes = {TORCH_DTYPES[weights.tensors[name].dtype] for name in names}
    result = dtypes.pop()
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


def _rows_at_once(shape: Shape, *, itemsize: int) -> int:
    """Rows of a chunk: as many as fit the bound, in equal parts, as Megatron-Core wants them."""
    num_rows, row_bytes = shape[0], prod(shape[1:]) * itemsize
    fewest = -(-num_rows * row_bytes // _CHUNK_BYTES)
    parts = next((n for n in range(max(1, fewest), 8 * fewest + 1) if num_rows % n == 0), 1)
    return num_rows // parts


def units_of_rank(units: Sequence[Unit], *, rank: int, world_size: int) -> list[Unit]:
    """What a rank writes: a run of consecutive units, so that files are read front to back."""
    total = sum(unit.num_bytes for unit in units)
    mine, before = [], 0
    for unit in units:
        middle = before + unit.num_bytes / 2
        if int(middle * world_size / total) == rank:
            mine.append(unit)
        before += unit.num_bytes
    return mine


def _clipped(piece: Piece, start: int, stop: int) -> Iterator[tuple[Span, Span]]:
    """The rows of a piece that lie in some rows of the parameter: (there, here)."""
    for ours, theirs in clip(piece.local[0], piece.hf[0], start=start, stop=stop):
        yield theirs, ours
