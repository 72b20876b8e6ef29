"""Cuts the plan of a parameter to consecutive elements of it, flattened.

The one thing to know: Megatron-Core's distributed optimizer gives a rank elements `start:stop` of
each flattened parameter, wherever that cuts. Such a run of elements is at most three rectangles
(the end of a row, whole rows, the beginning of a row); each becomes a parameter with a plan of its
own, so that optimizer state is saved and loaded in any layout by the code that does it for weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from mtrain.bridge.plan import ParameterPlan, Shape
from mtrain.bridge.spans import Piece, clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A rectangle of a flattened parameter.

    Attributes:
        plan: Its plan, under a name of its own.
        offset: Elements of the run before it.
    """

    plan: ParameterPlan
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.plan.shape)


@dataclass(frozen=True, slots=True)
class _Rectangle:
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int


def cut_parameter(parameter: ParameterPlan, *, start: int, stop: int) -> list[Fragment]:
    """Plans elements `start:stop` of a parameter.

    Experts that are stacked count as rows below each other.

    Args:
        parameter: Its plan.
        start: First element.
        stop: The element after the last.

    Returns:
        Fragments in the order of their elements, at most three.
    """
    pieces, shape = _stacked(parameter)
    *between, num_columns = shape[1:] or (1,)
    assert prod(between) == 1, f"{parameter.name}: {parameter.shape}"
    fragments: list[Fragment] = []
    offset = 0
    for rectangle in _rectangles(num_columns, start=start, stop=stop):
        size = (rectangle.num_rows, *between, rectangle.num_columns)
        plan = replace(
            parameter,
            name=f"{parameter.name}[{len(fragments)}]",
            shape=size[: len(shape)],
            pieces=tuple(cut for piece in pieces for cut in _within(piece, rectangle)),
        )
        fragments.append(Fragment(plan=plan, offset=offset))
        offset += prod(size)
    return fragments


def _stacked(parameter: ParameterPlan) -> tuple[list[Piece], Shape]:
    """Pieces and shape with experts as rows below each other."""
    pieces, shape = list(parameter.pieces), parameter.shape
    if any(piece.expert is not None for piece in pieces):
        num_experts, num_rows, *columns = shape
        shape = (num_experts * num_rows, *columns)
        pieces = [_shifted(piece, num_rows) for piece in pieces]
    return pieces, shape


def _shifted(piece: Piece, rows_of_expert: int) -> Piece:
    assert piece.expert is not None
    rows = piece.local[0].shifted(piece.expert * rows_of_expert)
    return Piece(piece.hf_name, piece.hf, (rows, *piece.local[1:]))


def _rectangles(num_columns: int, *, start: int, stop: int) -> Iterator[_Rectangle]:
    while start < stop:
        row, column = divmod(start, num_columns)
        if column or stop - start < num_columns:
            width = min(num_columns - column, stop - start)
            rectangle = _Rectangle(row, 1, column, width)
        else:
            rectangle = _Rectangle(row, (stop - start) // num_columns, 0, num_columns)
        yield rectangle
        start += rectangle.num_rows * rectangle.num_columns


def _within(piece: Piece, rectangle: _Rectangle) -> Iterator[Piece]:
    """The part of a piece that lies in a rectangle, counted from its corner."""
    rows = (rectangle.first_row, rectangle.num_rows)
    columns = (rectangle.first_column, rectangle.num_columns)
    num_axes = len(piece.local)
    limits = (rows,) if num_axes == 1 else (rows, *[(0, 1)] * (num_axes - 2), columns)
    axes = [
        [
            (theirs, ours.shifted(-first))
            for ours, theirs in clip(local, hf, start=first, stop=first + size)
        ]
        for local, hf, (first, size) in zip(piece.local, piece.hf, limits, strict=True)
    ]
    for spans in product(*axes):
        yield Piece(
            piece.hf_name,
            tuple(theirs for theirs, _ in spans),
            tuple(ours for _, ours in spans),
        )
