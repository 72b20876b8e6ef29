"""Decides which rank writes which tensors into which file, for the whole world at once.

Pure arithmetic that every rank repeats, so saving needs no agreement. A file has one writer and
never mixes pipeline stages or owners of experts: tensors then only travel inside a tensor-parallel
group, and no two machines write to one file, which network file systems do not take well. Only
where all experts of a layer are one stored tensor do they travel between owners of experts.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from mtrain.bridge.plan import TensorHome, locate_tensors
from mtrain.bridge.rules import WeightTable, filled, layers_of
from mtrain.bridge.safetensors_folder import WEIGHTS_STEM
from mtrain.bridge.safetensors_header import tensor_bytes
from mtrain.bridge.storage.arrangement import Arrangement, as_it_is
from mtrain.bridge.storage.stored_as import CANONICAL, Entry, StoredAs
from mtrain.parallel import ParallelLayout

Group = Literal["tp", "etp", "ep", "copied"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One safetensors file to write.

    Attributes:
        name: Its name in the folder.
        entries: Name, dtype and shape of what is in it, in order.
        stored: What the tensors in it consist of, in the same order; empty for a file of tensors
            that are copied.
        tensors: Name, dtype and shape of the canonical tensors that it is made of, in the order in
            which they are needed.
        num_bytes: Size of the entries together.
        group: Whether its tensors are split as dense parameters ("tp"), as the experts of one owner
            ("etp") or as those of all owners ("ep"), or are copied.
        members: Global ranks that hold all parts of all its tensors.
        writer: The member that writes the file.
    """

    name: str
    entries: tuple[Entry, ...]
    stored: tuple[Arrangement, ...]
    tensors: tuple[Entry, ...]
    num_bytes: int
    group: Group
    members: tuple[int, ...]
    writer: int


def plan_files(
    table: WeightTable,
    *,
    layout: ParallelLayout,
    dtype: str,
    max_shard_size: int,
    stem: str = WEIGHTS_STEM,
    only: Container[str] | None = None,
    is_data_sharded: bool = False,
    form: StoredAs = CANONICAL,
) -> tuple[WeightFile, ...]:
    """Plans all files of a checkpoint.

    Files go to the member with the fewest bytes to write so far, over all data parallel copies.

    Args:
        table: Weights of the model.
        layout: Parallel sizes.
        dtype: Dtype of the tensors in the words of the format, e.g. "BF16"; of those whose dtype is
            not that of the model, their own.
        max_shard_size: Most bytes of tensors in a file; a larger tensor has a file for itself.
        stem: How the names of the files begin.
        only: Names of the tensors that are saved; None for all.
        is_data_sharded: Whether data parallel ranks hold parts, as of optimizer state, and not
            copies.
        form: The form that they are stored in.

    Raises:
        ValueError: The model cannot be split that way.
    """
    holders = _holders(layout, is_data_sharded=is_data_sharded)
    load = [0] * layout.world_size
    files: list[WeightFile] = []
    for owner, group in _by_owner(table, layout, dtype=dtype, only=only, form=form).items():
        sized = ((one, one.num_bytes) for one in group)
        for together, num_bytes in cut_by_size(sized, max_size=max_shard_size):
            candidates = [(load[rank], rank) for members in holders[owner] for rank in members]
            writer = min(candidates)[1]
            load[writer] += num_bytes
            files.append(
                WeightFile(
                    name="",
                    entries=tuple(entry for one in together for entry in one.entries),
                    stored=tuple(one.stored for one in together),
                    tensors=tuple(tensor for one in together for tensor in one.tensors),
                    num_bytes=num_bytes,
                    group=owner.group,
                    members=next(members for members in holders[owner] if writer in members),
                    writer=writer,
                )
            )
    files += _copies(form, load, max_shard_size=max_shard_size)
    return tuple(_named(files, stem=stem))


def fixed_dtypes(table: WeightTable) -> dict[str, str]:
    """Dtype of the tensors that always have the same one, whatever that of the model, by name."""
    return {
        filled(tensor.name, layer=layer, expert=expert): tensor.dtype
        for rule in table.rules
        for tensor in rule.hf
        if tensor.dtype is not None
        for layer in layers_of(rule)
        for expert in (range(rule.num_experts) if rule.num_experts is not None else (None,))
    }


@dataclass(frozen=True, slots=True)
class _Owner:
    """Who holds a tensor: a pipeline stage, and of experts an expert-parallel rank or all."""

    pp_rank: int
    group: Group
    ep_rank: int | None = None


@dataclass(frozen=True, slots=True)
class _Stored:
    """A stored tensor to write: what is in the file for it, and what that is made of."""

    stored: Arrangement
    entries: tuple[Entry, ...]
    tensors: tuple[Entry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor_bytes(dtype, shape) for _, dtype, shape in self.entries)


def _by_owner(
    table: WeightTable,
    layout: ParallelLayout,
    *,
    dtype: str,
    only: Container[str] | None,
    form: StoredAs,
) -> dict[_Owner, list[_Stored]]:
    """Stored tensors by pipeline stage and, where experts are apart, expert-parallel rank."""
    experts_apart = layout.ep_size > 1 or layout.etp_size != layout.tp_size
    holder, own_dtypes = form.by_canonical(), fixed_dtypes(table)
    owners: dict[_Owner, list[_Stored]] = {}
    done: set[str] = set()
    for home in locate_tensors(table, layout=layout):
        stored = holder.get(home.name) or as_it_is(home.name, home.shape)
        if stored.name in done or (only is not None and home.name not in only):
            continue
        done.add(stored.name)
        stored_dtype = own_dtypes.get(home.name, dtype)
        one = _Stored(
            stored,
            form.entries(stored, stored_dtype),
            tuple((name, stored_dtype, shape) for name, shape in stored.canonical),
        )
        owner = owners.setdefault(_owner(home, stored, experts_apart=experts_apart), [])
        owner.append(one)
        owner += [
            _Stored(copy, ((copy.name, stored_dtype, home.shape),), one.tensors)
            for copy in form.copies_of(home.name, home.shape)
        ]
    return owners


def _owner(home: TensorHome, stored: Arrangement, *, experts_apart: bool) -> _Owner:
    if home.ep_rank is None or not experts_apart:
        return _Owner(home.pp_rank, "tp")
    if stored.is_stacked:
        return _Owner(home.pp_rank, "ep")
    return _Owner(home.pp_rank, "etp", home.ep_rank)


def _holders(
    layout: ParallelLayout, *, is_data_sharded: bool
) -> dict[_Owner, list[tuple[int, ...]]]:
    """The groups that hold all parts of an owner's tensors: one for each data-parallel copy."""
    ranks_of: dict[tuple[_Owner, object], list[int]] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        copy, copy_of_experts = (at.dp_rank, at.cp_rank), at.edp_rank
        if is_data_sharded:
            copy, copy_of_experts = (0, 0), 0
        for owner, which in (
            (_Owner(at.pp_rank, "tp"), copy),
            (_Owner(at.pp_rank, "etp", at.ep_rank), copy_of_experts),
            (_Owner(at.pp_rank, "ep"), copy_of_experts),
        ):
            ranks_of.setdefault((owner, which), []).append(rank)
    holders: dict[_Owner, list[tuple[int, ...]]] = {}
    for (owner, _), ranks in ranks_of.items():
        holders.setdefault(owner, []).append(tuple(ranks))
    return holders


def _copies(form: StoredAs, load: list[int], *, max_shard_size: int) -> Iterator[WeightFile]:
    """Files of the tensors that are copied, each by the rank that has least to write."""
    if form.carried is None:
        return
    sized = ((entry, tensor_bytes(*entry[1:])) for entry in form.carried.entries)
    for entries, num_bytes in cut_by_size(sized, max_size=max_shard_size):
        writer = load.index(min(load))
        load[writer] += num_bytes
        yield WeightFile(
            name="",
            entries=entries,
            stored=(),
            tensors=(),
            num_bytes=num_bytes,
            group="copied",
            members=(writer,),
            writer=writer,
        )


def cut_by_size(
    sized: Iterable[tuple[T, int]], *, max_size: int
) -> Iterator[tuple[tuple[T, ...], int]]:
    """Cuts a list into parts, in order, each with its size.

    Args:
        sized: The items and their sizes.
        max_size: Largest part, unless a single item is larger.
    """
    part: list[T] = []
    total = 0
    for item, size in sized:
        if part and total + size > max_size:
            yield tuple(part), total
            part, total = [], 0
        part.append(item)
        total += size
    if part:
        yield tuple(part), total


def file_name(number: int, num_files: int, *, stem: str) -> str:
    """Name of one of the files of a checkpoint.

    Args:
        number: Which one, from 1.
        num_files: How many there are.
        stem: How their names begin.
    """
    return (
        f"{stem}.safetensors"
        if num_files == 1
        else (f"{stem}-{number:05}-of-{num_files:05}.safetensors")
    )


def _named(files: list[WeightFile], *, stem: str) -> Iterator[WeightFile]:
    for number, file in enumerate(files, start=1):
        yield replace(file, name=file_name(number, len(files), stem=stem))
