"""The vocabulary of a family's weight table: rules and layouts.

A `Rule` ties one Megatron parameter to the Hugging Face tensors it is made of. Its layout says in
which order their rows lie in a tensor-parallel shard. Every layout is a permutation, so the same
rule loads and saves, and it is pure arithmetic: no torch here.

A new layout is a frozen dataclass with the one method of `Layout`; nothing else has to know it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from mtrain.bridge.spans import Span, clip
from mtrain.bridge.storage.forms import StorageForm


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A Hugging Face tensor.

    Attributes:
        name: Its name, with `{layer}` and `{expert}` open.
        shape: Its shape.
        dtype: The precision that it always has, in the words of the safetensors format; None for
            that of the model.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["F32"] | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that a shard takes from one source tensor."""

    source: int
    hf: Span
    local: Span


class Layout(Protocol):
    """How the rows of the sources lie in a shard of the Megatron parameter."""

    def shard(
        self, num_rows: tuple[int, ...], *, num_shards: int, index: int
    ) -> tuple[int, tuple[Rows, ...]]:
        """Arranges one shard.

        Args:
            num_rows: Rows of every source.
            num_shards: Shards that the parameter is split into along its rows.
            index: Which of them.

        Returns:
            Rows of the shard and where they come from; rows from nowhere are padding (zeros).

        Raises:
            ValueError: The rows cannot be split that way.
        """
        ...


@dataclass(frozen=True, slots=True)
class Concatenated:
    """Every source is split by itself; a shard is its parts one after the other.

    One source is a plain copy. Gate and up projections are two: `[gate_r; up_r]`.
    Source: Megatron-Core's `MLP`, which cuts the output of `linear_fc1` in half on every rank.
    """

    def shard(
        self, num_rows: tuple[int, ...], *, num_shards: int, index: int
    ) -> tuple[int, tuple[Rows, ...]]:
        """See `Layout.shard`."""
        rows: list[Rows] = []
        end = 0
        for source, total in enumerate(num_rows):
            size = divided(total, num_shards)
            rows.append(Rows(source, Span(index * size, size), Span(end, size)))
            end += size
        return end, tuple(rows)


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Group by group: the group's rows of every source; a shard is a contiguous part of that.

    Query, key and value are stored as `q1 q2 k1 v1 | q3 q4 k2 v2 | ...`. The interleaved tensor
    does not depend on the tensor-parallel size, and a shard need not begin at a head when there
    are more shards than groups.
    Source: Megatron-Core's `SelfAttention.get_query_key_value_tensors`.
    """

    num_groups: int

    def shard(
        self, num_rows: tuple[int, ...], *, num_shards: int, index: int
    ) -> tuple[int, tuple[Rows, ...]]:
        """See `Layout.shard`."""
        sizes = [divided(total, self.num_groups) for total in num_rows]
        size, group_size = divided(sum(num_rows), num_shards), sum(sizes)
        first = index * size
        rows: list[Rows] = []
        for source, source_size in enumerate(sizes):
            fused = Span(sum(sizes[:source]), source_size, self.num_groups, group_size)
            hf = Span(0, source_size, self.num_groups, source_size)
            rows += [
                Rows(source, theirs, ours.shifted(-first))
                for ours, theirs in clip(fused, hf, start=first, stop=first + size)
            ]
        return size, tuple(rows)


@dataclass(frozen=True, slots=True)
class Padded:
    """One source, rows of zeros added until the shards are equal.

    Used for the vocabulary; no more rows are added than tensor parallelism needs.
    """

    def shard(
        self, num_rows: tuple[int, ...], *, num_shards: int, index: int
    ) -> tuple[int, tuple[Rows, ...]]:
        """See `Layout.shard`."""
        (total,) = num_rows
        size = -(-total // num_shards)
        num_real = min(size, total - index * size)
        if num_real <= 0:
            return size, ()
        return size, (Rows(0, Span(index * size, num_real), Span(0, num_real)),)


@dataclass(frozen=True, slots=True)
class Regrouped:
    """Another layout, of parts of the sources instead of whole ones.

    For tensors that Hugging Face fuses in another order than Megatron: `[q; k; v]` in one tensor,
    or a query and a gate for each head.

    Attributes:
        layout: Arranges the parts as if each were a source.
        parts: Index of the source and its rows, for each part.
    """

    layout: Layout
    parts: tuple[tuple[int, Span], ...]

    def shard(
        self, num_rows: tuple[int, ...], *, num_shards: int, index: int
    ) -> tuple[int, tuple[Rows, ...]]:
        """See `Layout.shard`."""
        assert sum(span.length for _, span in self.parts) == sum(num_rows), "rows left over"
        lengths = tuple(span.length for _, span in self.parts)
        size, rows = self.layout.shard(lengths, num_shards=num_shards, index=index)
        regrouped: list[Rows] = []
        for row in rows:
            source, span = self.parts[row.source]
            regrouped += [
                Rows(source, theirs, ours) for theirs, ours in _within_part(span, row.hf, row.local)
            ]
        return size, tuple(regrouped)


def _within_part(part: Span, hf: Span, local: Span) -> list[tuple[Span, Span]]:
    """Rows `hf` of a part, as rows of its source, beside where they go."""
    if part.count == 1:
        return [(hf.shifted(part.start), local)]
    pairs = []
    # A span inside of a repeating one would repeat twice, so it is taken apart.
    for there, here in zip(hf.runs, local.runs, strict=True):
        start = there.start
        while start < there.start + there.size:
            run, offset = divmod(start, part.size)
            size = min(part.size - offset, there.start + there.size - start)
            first = part.start + run * part.step + offset
            pairs.append((Span(first, size), Span(here.start + start - there.start, size)))
            start += size
    return pairs


@dataclass(frozen=True, slots=True)
class Spaced:
    """Every source begins a fixed number of rows after the one before; the gaps are padding.

    The A factors of a fused linear: one after the other, padded to the largest rank. Not split.
    """

    size: int

    def shard(
        self, num_rows: tuple[int, ...], *, num_shards: int, index: int
    ) -> tuple[int, tuple[Rows, ...]]:
        """See `Layout.shard`."""
        assert num_shards == 1, "A factors are not split along their rows"
        rows = tuple(
            Rows(source, Span(0, total), Span(source * self.size, total))
            for source, total in enumerate(num_rows)
        )
        return len(num_rows) * self.size, rows


@dataclass(frozen=True, slots=True)
class Selected:
    """Rows of some of the sources of another layout, where they lie there; the rest is padding.

    Attributes:
        layout: The other layout.
        num_rows: Rows of all its sources.
        sources: Which of them are there.
    """

    layout: Layout
    num_rows: tuple[int, ...]
    sources: tuple[int, ...]

    def shard(
        self, num_rows: tuple[int, ...], *, num_shards: int, index: int
    ) -> tuple[int, tuple[Rows, ...]]:
        """See `Layout.shard`."""
        assert num_rows == tuple(self.num_rows[source] for source in self.sources)
        size, rows = self.layout.shard(self.num_rows, num_shards=num_shards, index=index)
        selected = tuple(
            replace(part, source=self.sources.index(part.source))
            for part in rows
            if part.source in self.sources
        )
        return size, selected


def filled(name: str, *, layer: int | None = None, expert: int | str | None = None) -> str:
    """A name with its open `{layer}` and `{expert}` filled; None leaves one as it is.

    Args:
        name: Name of a tensor or module.
        layer: Number of the layer.
        expert: Number of the expert, or what stands for all numbers in a pattern.
    """
    if layer is not None:
        name = name.replace("{layer}", str(layer))
    return name if expert is None else name.replace("{expert}", str(expert))


def divided(number: int, parts: int) -> int:
    """Divides exactly.

    Raises:
        ValueError: There is a remainder.
    """
    if number % parts:
        raise ValueError(f"{number} rows or columns cannot be split into {parts} equal parts")
    return number // parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One Megatron parameter, or one a layer, and the Hugging Face tensors it is made of.

    Attributes:
        megatron: Megatron-LM's name, with `{layer}` open: that in torch_dist folders, where a norm
            before a linear belongs to the linear.
        plain: Name in a chunk, where that differs: there norms are modules of their own.
        hf: The source tensors, in the order that the layout expects.
        layout: Order of their rows in a shard; of the columns of the one source if those are split.
        columns: Order of their columns, where that differs; never split.
        split: Axis that tensor parallelism splits; None where every rank holds all of it. Experts
            are split over the expert tensor parallel group, all else over the tensor parallel one.
        place: Pipeline stages that hold it; "mtp" is the last one, for multi-token prediction.
        layers: Layers that have it (counted over the whole model); for `place` "layers" only.
        num_experts: Experts that the parameter stacks on its leading axis, each from its own
            Hugging Face tensors; None where there are none.
        is_duplicate: A second holder of tensors that another rule owns: loaded, never saved. On one
            pipeline stage Megatron-Core shares the parameter, and there is none.
    """

    megatron: str
    hf: tuple[HFTensor, ...]
    plain: str | None = None
    layout: Layout = Concatenated()
    columns: Layout | None = None
    split: Literal["rows", "columns"] | None = None
    place: Literal["first", "layers", "last", "mtp"] = "layers"
    layers: tuple[int, ...] = ()
    num_experts: int | None = None
    is_duplicate: bool = False

    @property
    def name_in_chunk(self) -> str:
        """Name of the parameter in a model chunk, with `{layer}` open."""
        return self.plain or self.megatron


def layers_of(rule: Rule) -> tuple[int | None, ...]:
    """Layers that have a rule's parameter; (None,) for what is not in a layer."""
    return rule.layers if rule.place == "layers" else (None,)


@dataclass(frozen=True, slots=True)
class IgnoredKey:
    """Hugging Face tensors that are left out on purpose.

    Attributes:
        pattern: Regular expression for the full name.
        reason: Why nothing is lost, for the user.
        copy_of: Tensor that must have the same values; None where the values do not matter.
        is_carried: Whether a save has it where the checkpoint that was loaded has it: as it was
            there, or as a copy again.
    """

    pattern: str
    reason: str
    copy_of: str | None = None
    is_carried: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTable:
    """All weights of one model.

    Attributes:
        num_layers: Decoder layers.
        rules: One for each kind of Megatron parameter.
        ignored: What a checkpoint may hold besides.
        forms: Other ways in which a checkpoint may hold the tensors of the rules.
    """

    num_layers: int
    rules: tuple[Rule, ...]
    ignored: tuple[IgnoredKey, ...] = ()
    forms: tuple[StorageForm, ...] = ()
