"""Rectangles of tensors: what a weight copy reads and what it fills.

The one thing to know: a `Span` may repeat. `Span(start=0, size=2, count=3, step=5)` is positions
0 1, 5 6, 10 11. Interleaved query/key/value rows are then one copy for each projection, whatever
the number of groups, and reading them stays one contiguous slice of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Span:
    """Positions along one axis: `count` runs of `size`, their starts `step` apart."""

    start: int
    size: int
    count: int = 1
    step: int = 0

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.size * self.count

    @property
    def extent(self) -> int:
        """Distance from the first position to the one after the last."""
        return (self.count - 1) * self.step + self.size

    @property
    def runs(self) -> tuple[Span, ...]:
        """The same positions as spans that do not repeat."""
        return tuple(Span(self.start + i * self.step, self.size) for i in range(self.count))

    def shifted(self, distance: int) -> Span:
        """The same positions, `distance` further on."""
        return Span(self.start + distance, self.size, self.count, self.step)


Box = tuple[Span, ...]


def whole(shape: tuple[int, ...]) -> Box:
    """The box that covers a tensor of this shape."""
    return tuple(Span(0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Shape of the tensor that a box picks out."""
    return tuple(span.length for span in box)


def box_size(box: Box) -> int:
    """Number of elements in a box."""
    return prod(box_shape(box))


@dataclass(frozen=True, slots=True)
class Piece:
    """One copy between a Hugging Face tensor and the local shard of a Megatron parameter.

    Attributes:
        hf_name: Name of the Hugging Face tensor.
        hf: Where in that tensor.
        local: Where in the local shard; as many axes, sizes and repeats as `hf`.
        expert: Index on the leading axis of a parameter that stacks experts; None without it.
            `local` does not count this axis.
    """

    hf_name: str
    hf: Box
    local: Box
    expert: int | None = None


def clip(kept: Span, other: Span, *, start: int, stop: int) -> list[tuple[Span, Span]]:
    """Restricts a pair of matching spans to the positions of `kept` in `start:stop`.

    Args:
        kept: The span that is cut.
        other: Its counterpart, with the same `size` and `count`; cut alongside.
        start: First position to keep.
        stop: The position after the last one to keep.

    Returns:
        Matching pairs, at most three: whole runs stay one repeating span, a run that is cut becomes
        a span of its own.
    """
    pairs: list[tuple[Span, Span]] = []
    num_whole = 0
    for index in range(kept.count):
        begin = kept.start + index * kept.step
        low, high = max(begin, start), min(begin + kept.size, stop)
        if low >= high:
            continue
        if high - low == kept.size:
            num_whole += 1
            if num_whole > 1:
                pairs[-1] = (_one_more(pairs[-1][0], kept), _one_more(pairs[-1][1], other))
                continue
        first = other.start + index * other.step + low - begin
        pairs.append((Span(low, high - low), Span(first, high - low)))
    return pairs


def _one_more(span: Span, pattern: Span) -> Span:
    return Span(span.start, span.size, span.count + 1, pattern.step)
