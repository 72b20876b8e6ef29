"""Brings blocks of Hugging Face tensors from the ranks that hold parts of them to a writer.

The one thing to know: all members call `gather` with the same buckets in the same order, and each
computes from the plans of the others what they send, so only weights are sent, each element once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from mtrain.bridge.plan import ParameterPlan, Plan, Shape
from mtrain.bridge.safetensors_header import tensor_bytes
from mtrain.bridge.safetensors_reader import DTYPES
from mtrain.bridge.slices import view_box
from mtrain.bridge.spans import Piece, box_shape, box_size, clip
from mtrain.parallel import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive rows of a Hugging Face tensor; all blocks of a bucket have the same dtype.

    Attributes:
        name: Name of the tensor.
        start: First row.
        shape: Shape of the block.
        dtype: Its dtype in the words of the safetensors format.
        is_whole: Whether it is all of the tensor.
    """

    name: str
    start: int
    shape: Shape
    dtype: str
    is_whole: bool


Bucket = tuple[Block, ...]
# (chunk, name, expert) -> tensor of that parameter, or of one of the experts that it stacks.
TensorLookup = Callable[[int, str, int | None], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank that holds parts of tensors.

    Attributes:
        rank: Global rank.
        shard: Its index in the tensor-parallel group (of experts: in theirs). Members with the same
            index hold different elements, those with another hold copies of what is not split.
        plan: What it holds.
    """

    rank: int
    shard: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of a parameter inside a block; `block` is its index in the bucket."""

    block: int
    parameter: ParameterPlan
    piece: Piece


def make_buckets(tensors: Iterable[tuple[str, str, Shape]], *, max_bytes: int) -> Iterator[Bucket]:
    """Cuts tensors into buckets, keeping their order.

    Args:
        tensors: Name, dtype and shape of each.
        max_bytes: Most bytes of a bucket, unless a single row has more.
    """
    bucket: list[Block] = []
    room = max_bytes
    for name, dtype, shape in tensors:
        row_bytes = max(1, tensor_bytes(dtype, shape[1:]))
        rows_at_once = max(1, max_bytes // row_bytes)
        for start in range(0, shape[0], rows_at_once):
            num_rows = min(rows_at_once, shape[0] - start)
            if bucket and (num_rows * row_bytes > room or bucket[0].dtype != dtype):
                yield tuple(bucket)
                bucket, room = [], max_bytes
            block = Block(
                name=name,
                start=start,
                shape=(num_rows, *shape[1:]),
                dtype=dtype,
                is_whole=num_rows == shape[0],
            )
            bucket.append(block)
            room -= num_rows * row_bytes
    if bucket:
        yield tuple(bucket)


class BlockGatherer:
    """Gathers buckets from some ranks.

    Args:
        members: The ranks, the same on each.
        world: This rank, which is one of them.
        lookup: Gives the local tensor of a parameter, or of one of its experts.
    """

    def __init__(self, members: list[Member], *, world: World, lookup: TensorLookup) -> None:
        self._members = members
        self._sources = [_sources_by_name(member.plan) for member in members]
        self._me = [member.rank for member in members].index(world.rank)
        self._world = world
        self._lookup = lookup

    def gather(self, bucket: Bucket, *, writer: int) -> torch.Tensor | None:
        """Puts a bucket together on one member.

        Args:
            bucket: What to gather.
            writer: Index of the member that gets it.

        Returns:
            The elements of the blocks one after the other, on the writer; None on the others.
        """
        dtype = DTYPES[bucket[0].dtype]
        parts = [self._parts(member, bucket, writer) for member in range(len(self._members))]
        mine = self._pack(parts[self._me], dtype)
        if self._me != writer:
            if mine.numel():
                self._exchange([(dist.isend, mine, writer)])
            return None
        received = [
            mine if member == writer else self._empty(_num_elements(theirs), dtype)
            for member, theirs in enumerate(parts)
        ]
        self._exchange(
            [
                (dist.irecv, packed, member)
                for member, packed in enumerate(received)
                if member != writer and packed.numel()
            ]
        )
        num_elements = sum(prod(block.shape) for block in bucket)
        held = sum(packed.numel() for packed in received)
        assert held == num_elements, f"{held} of {num_elements} elements of {bucket} are held"
        whole = self._empty(num_elements, dtype)
        views = _split(whole, [block.shape for block in bucket])
        for member_parts, packed in zip(parts, received, strict=True):
            sources = _split(packed, [box_shape(part.piece.hf) for part in member_parts])
            for part, source in zip(member_parts, sources, strict=True):
                target = view_box(views[part.block], part.piece.hf)
                target.copy_(source.view(target.shape))
        return whole

    def _parts(self, member: int, bucket: Bucket, writer: int) -> list[_Part]:
        """What a member contributes to a bucket."""
        is_alike = self._members[member].shard == self._members[writer].shard
        return [
            _Part(index, parameter, clipped)
            for index, block in enumerate(bucket)
            for parameter, piece in self._sources[member].get(block.name, ())
            # Of what is not split every shard has a copy; that of the writer's is taken.
            if parameter.split_over or is_alike
            for clipped in _within(piece, block)
        ]

    def _pack(self, parts: list[_Part], dtype: torch.dtype) -> torch.Tensor:
        packed = self._empty(_num_elements(parts), dtype)
        targets = _split(packed, [box_shape(part.piece.hf) for part in parts])
        for part, target in zip(parts, targets, strict=True):
            parameter = part.parameter
            tensor = self._lookup(parameter.chunk, parameter.name, part.piece.expert)
            assert tensor.dtype == dtype, f"{parameter.name} is {tensor.dtype}"
            source = view_box(tensor, part.piece.local)
            target.view(source.shape).copy_(source)
        return packed

    def _exchange(self, messages: list[tuple[Callable[..., Any], torch.Tensor, int]]) -> None:
        """Sends or receives; each message with the member at its other end."""
        if not messages:
            return
        # As bytes: not every backend knows every dtype. Not by group: sizes differ, and most
        # members have nothing of a bucket.
        operations = [
            dist.P2POp(
                operation, packed.view(torch.uint8), self._members[peer].rank, self._world.group
            )
            for operation, packed, peer in messages
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def _empty(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(num_elements, dtype=dtype, device=self._world.device)


def _num_elements(parts: list[_Part]) -> int:
    return sum(box_size(part.piece.hf) for part in parts)


def _sources_by_name(plan: Plan) -> Mapping[str, list[tuple[ParameterPlan, Piece]]]:
    sources: dict[str, list[tuple[ParameterPlan, Piece]]] = {}
    for parameter in plan:
        if not parameter.is_duplicate:
            for piece in parameter.pieces:
                sources.setdefault(piece.hf_name, []).append((parameter, piece))
    return sources


def _within(piece: Piece, block: Block) -> list[Piece]:
    """The part of a piece that lies in a block, with rows counted from the block's first."""
    if block.is_whole:
        return [piece]
    rows = clip(piece.hf[0], piece.local[0], start=block.start, stop=block.start + block.shape[0])
    return [
        Piece(
            piece.hf_name,
            (theirs.shifted(-block.start), *piece.hf[1:]),
            (ours, *piece.local[1:]),
            piece.expert,
        )
        for theirs, ours in rows
    ]


def _split(flat: torch.Tensor, shapes: list[Shape]) -> list[torch.Tensor]:
    """Cuts consecutive tensors out of a flat one."""
    views, end = [], 0
    for shape in shapes:
        begin, end = end, end + prod(shape)
        views.append(flat[begin:end].view(shape))
    return views
