"""Decides which rank writes which tensors into which file, for the whole world at once.

Pure arithmetic that every rank repeats, so saving needs no agreement. A file has one writer and
never mixes pipeline stages or owners of experts: tensors then only travel inside a tensor-parallel
group, and no two machines write to one file, which network file systems do not take well.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from mtrain.bridge.plan import Shape, TensorHome, locate_tensors
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_folder import WEIGHTS_STEM
from mtrain.bridge.safetensors_header import tensor_bytes
from mtrain.parallel import ParallelLayout

Group = Literal["tp", "etp"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One safetensors file to write.

    Attributes:
        name: Its name in the folder.
        tensors: Name and shape of its tensors, in order.
        num_bytes: Size of the tensors together.
        group: Whether its tensors are split as dense parameters ("tp") or as experts ("etp").
        members: Global ranks that hold all parts of all its tensors.
        writer: The member that writes the file.
    """

    name: str
    tensors: tuple[tuple[str, Shape], ...]
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
) -> tuple[WeightFile, ...]:
    """Plans all files of a checkpoint.

    Files go to the member with the fewest bytes to write so far, over all data parallel copies.

    Args:
        table: Weights of the model.
        layout: Parallel sizes.
        only: Names of the tensors that are saved; None for all.
        is_data_sharded: Whether data parallel ranks hold parts, as of optimizer state, and not
            copies.
        dtype: Dtype of the tensors in the words of the format, e.g. "BF16".
        max_shard_size: Most bytes of tensors in a file; a larger tensor has a file for itself.
        stem: How the names of the files begin.

    Raises:
        ValueError: The model cannot be split that way.
    """
    holders = _holders(layout, is_data_sharded=is_data_sharded)
    load = [0] * layout.world_size
    files: list[WeightFile] = []
    for owner, homes in _by_owner(table, layout).items():
        group: Group = "tp" if owner[1] is None else "etp"
        if only is not None:
            homes = [home for home in homes if home.name in only]
        for tensors, num_bytes in _cut(homes, dtype=dtype, max_shard_size=max_shard_size):
            candidates = [(load[rank], rank) for members in holders[owner] for rank in members]
            writer = min(candidates)[1]
            load[writer] += num_bytes
            members = next(members for members in holders[owner] if writer in members)
            files.append(
                WeightFile(
                    name="",
                    tensors=tensors,
                    num_bytes=num_bytes,
                    group=group,
                    members=members,
                    writer=writer,
                )
            )
    return tuple(_named(files, stem=stem))


_Owner = tuple[int, int | None]


def _by_owner(table: WeightTable, layout: ParallelLayout) -> dict[_Owner, list[TensorHome]]:
    """Tensors by pipeline stage and, where experts are apart, expert-parallel rank."""
    experts_apart = layout.ep_size > 1 or layout.etp_size != layout.tp_size
    owners: dict[_Owner, list[TensorHome]] = {}
    for home in locate_tensors(table, layout=layout):
        ep_rank = home.ep_rank if experts_apart else None
        owners.setdefault((home.pp_rank, ep_rank), []).append(home)
    return owners


def _holders(
    layout: ParallelLayout, *, is_data_sharded: bool
) -> dict[_Owner, list[tuple[int, ...]]]:
    """The groups that hold all parts of an owner's tensors: one for each data-parallel copy."""
    dense: dict[tuple[int, int, int], list[int]] = {}
    expert: dict[tuple[int, int, int], list[int]] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        copy, copy_of_experts = (at.dp_rank, at.cp_rank), at.edp_rank
        if is_data_sharded:
            copy, copy_of_experts = (0, 0), 0
        dense.setdefault((at.pp_rank, *copy), []).append(rank)
        expert.setdefault((at.pp_rank, at.ep_rank, copy_of_experts), []).append(rank)
    holders: dict[_Owner, list[tuple[int, ...]]] = {}
    for (pp_rank, _, _), ranks in dense.items():
        holders.setdefault((pp_rank, None), []).append(tuple(ranks))
    for (pp_rank, ep_rank, _), ranks in expert.items():
        holders.setdefault((pp_rank, ep_rank), []).append(tuple(ranks))
    return holders


def _cut(
    homes: Iterable[TensorHome], *, dtype: str, max_shard_size: int
) -> Iterator[tuple[tuple[tuple[str, Shape], ...], int]]:
    """Cuts a list of tensors into files, in order."""
    sized = (((home.name, home.shape), tensor_bytes(dtype, home.shape)) for home in homes)
    yield from cut_by_size(sized, max_size=max_shard_size)


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
