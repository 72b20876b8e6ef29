"""The optimizer's state as safetensors files under Hugging Face (or PEFT) names.

The one thing to know: moments and main parameters have the shape of the weights, so the rules that
save and load weights save and load them too, whole tensors by whole tensors. That is why a run
resumes in any parallel layout, and bit for bit in the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from mtrain.bridge.file_plan import cut_by_size, plan_files
from mtrain.bridge.fragments import Fragment, cut_parameter
from mtrain.bridge.gather import TensorLookup
from mtrain.bridge.load import fill_tensors
from mtrain.bridge.plan import Plan, plan_rank
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.safetensors_writer import OpenFile
from mtrain.bridge.save import DTYPE_NAMES, save_tensors
from mtrain.bridge.sources import StoredWeights, TensorSource
from mtrain.bridge.written import WrittenFile
from mtrain.checkpoint.folder import PendingFiles
from mtrain.config.resume import STATE_FOLDER
from mtrain.parallel import ParallelLayout, ParallelState

__all__ = [
    "OptimizerFormat",
    "OptimizerTensors",
    "StateOfParameter",
    "load_optimizer_state",
    "open_saved_kind",
    "optimizer_bytes",
    "save_optimizer_state",
]

# Chunk and name of a parameter, and the elements of it that a rank updates.
_Run = tuple[int, str, int, int]

# State that is read at once, where the optimizer does not keep it as float32.
_BATCH_BYTES = 2 * 2**30


class StateOfParameter(Protocol):
    """What the optimizer of this rank remembers of (a part of) a parameter.

    Attributes:
        chunk: Index of the model chunk.
        name: Name of the parameter in it.
        start: First element of the flattened parameter.
        stop: The element after the last.
    """

    @property
    def chunk(self) -> int:
        """See above."""
        ...

    @property
    def name(self) -> str:
        """See above."""
        ...

    @property
    def start(self) -> int:
        """See above."""
        ...

    @property
    def stop(self) -> int:
        """See above."""
        ...

    def read(self, kind: str) -> torch.Tensor:
        """What is remembered under this name: float32 [stop - start]."""
        ...

    def write(self, kind: str, values: torch.Tensor) -> None:
        """Sets it; `values` may be what `read` returned."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerTensors:
    """All that an optimizer remembers as tensors, on this rank.

    Attributes:
        parameters: What this rank updates.
        trained: Chunk and name of every trained parameter that this rank holds.
        kinds: What is saved of them: a moment, or the main parameters, by name.
        only: For a kind that not all trained parameters have: chunk and name of those that do.
        is_sharded: Whether data parallel ranks update different parts.
    """

    parameters: Sequence[StateOfParameter]
    trained: frozenset[tuple[int, str]]
    kinds: tuple[str, ...]
    only: Mapping[str, frozenset[tuple[int, str]]]
    is_sharded: bool

    def having(self, kind: str) -> frozenset[tuple[int, str]]:
        """Chunk and name of the parameters that have this kind."""
        return self.only.get(kind, self.trained)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerFormat:
    """How the state is written.

    Attributes:
        table: The weights that are trained: of the model, or of an adapter.
        max_shard_size: Most bytes of tensors in a file.
    """

    table: WeightTable
    max_shard_size: int


def _stem(kind: str) -> str:
    return f"optimizer_{kind}"


def save_optimizer_state(
    tensors: OptimizerTensors,
    folder: Path,
    *,
    form: OptimizerFormat,
    state: ParallelState,
    open_file: OpenFile,
) -> list[PendingFiles]:
    """Writes the state of all ranks; all ranks call it.

    Args:
        tensors: What this rank has.
        folder: An existing folder.
        form: How it is written.
        state: This rank.
        open_file: As for `save_weights`.

    Returns:
        What writes the files of this rank, or raises the OSError of one that it could not write.
    """
    layout = state.layout
    everyone: list[list[_Run]] = [[]] * layout.world_size
    dist.all_gather_object(everyone, _runs(tensors.parameters), group=state.world.group)

    @functools.cache
    def cut_of(rank: int) -> list[list[Fragment]]:
        return _cut(everyone[rank], form=form, layout=layout, rank=rank)

    def plan_member(rank: int) -> Plan:
        return tuple(fragment.plan for fragments in cut_of(rank) for fragment in fragments)

    pending: list[PendingFiles] = []
    for kind, names in _names_of_kinds(tensors, form=form, state=state).items():
        files = plan_files(
            form.table,
            layout=layout,
            dtype=DTYPE_NAMES[torch.float32],
            max_shard_size=form.max_shard_size,
            stem=_stem(kind),
            only=names,
            is_data_sharded=tensors.is_sharded,
        )
        finish = save_tensors(
            files,
            folder,
            _lookup(tensors.parameters, cut_of(state.rank), kind),
            plan_member=plan_member,
            state=state,
            stem=_stem(kind),
            open_file=open_file,
        )
        pending.append(functools.partial(_records, finish))
    return pending


def _records(finish: PendingFiles) -> list[WrittenFile]:
    """Records without those of the tensors, which have the names of the weights."""
    return [replace(file, name=f"{STATE_FOLDER}/{file.name}", tensors={}) for file in finish()]


def optimizer_bytes(tensors: OptimizerTensors, *, state: ParallelState) -> int:
    """About how much `save_optimizer_state` writes on all ranks; all ranks call it."""
    ours = sum(4 * (one.stop - one.start) for one in tensors.parameters) * len(tensors.kinds)
    size = torch.tensor(float(ours), dtype=torch.float64, device=state.device)
    dist.all_reduce(size, group=state.world.group)
    # Data parallel copies are written once.
    return int(size.item()) // (1 if tensors.is_sharded else state.layout.dp_size)


def load_optimizer_state(
    tensors: OptimizerTensors, folder: Path, *, form: OptimizerFormat, state: ParallelState
) -> None:
    """Fills what this rank's optimizer remembers from the files of any layout.

    Args:
        tensors: What this rank has.
        folder: Where `save_optimizer_state` wrote.
        form: As there.
        state: This rank.

    Raises:
        ValueError: The files hold the state of other parameters, or of fewer. All ranks raise.
    """
    runs = _runs(tensors.parameters)
    cut = _cut(runs, form=form, layout=state.layout, rank=state.rank)
    for kind, names in _names_of_kinds(tensors, form=form, state=state).items():
        stored = open_saved_kind(folder, kind)
        _check_names(folder, kind, set(stored.tensors), names)
        sized = (
            ((one, fragments), 4 * (one.stop - one.start))
            for one, fragments in zip(tensors.parameters, cut, strict=True)
            if (one.chunk, one.name) in tensors.having(kind)
        )
        with stored.open() as source:
            for batch, _ in cut_by_size(sized, max_size=_BATCH_BYTES):
                _fill(batch, kind, source)


def open_saved_kind(folder: Path, kind: str) -> StoredWeights:
    """One kind of what `save_optimizer_state` wrote, by the names of the weights.

    Raises:
        ValueError: There are none.
    """
    return open_checkpoint(folder, stem=_stem(kind))


def _fill(
    batch: Iterable[tuple[StateOfParameter, list[Fragment]]], kind: str, source: TensorSource
) -> None:
    values = [(one, one.read(kind), fragments) for one, fragments in batch]
    num_chunks = 1 + max(one.chunk for one, _, _ in values)
    named: list[dict[str, torch.Tensor]] = [{} for _ in range(num_chunks)]
    for one, flat, fragments in values:
        for fragment in fragments:
            named[one.chunk][fragment.plan.name] = _view(flat, fragment)
    fill_tensors(named, source, tuple(f.plan for _, _, fragments in values for f in fragments))
    for one, flat, _ in values:
        one.write(kind, flat)


def _view(flat: torch.Tensor, fragment: Fragment) -> torch.Tensor:
    return flat[fragment.offset : fragment.offset + fragment.size].view(fragment.plan.shape)


def _runs(parameters: Iterable[StateOfParameter]) -> list[_Run]:
    return [(one.chunk, one.name, one.start, one.stop) for one in parameters]


def _cut(
    runs: Iterable[_Run], *, form: OptimizerFormat, layout: ParallelLayout, rank: int
) -> list[list[Fragment]]:
    """The fragments that each run of a rank is made of."""
    plan = plan_rank(form.table, layout=layout, rank=rank)
    whole = {(parameter.chunk, parameter.name): parameter for parameter in plan}
    return [
        cut_parameter(whole[chunk, name], start=start, stop=stop)
        for chunk, name, start, stop in runs
    ]


def _lookup(
    parameters: Sequence[StateOfParameter], cut: Sequence[list[Fragment]], kind: str
) -> TensorLookup:
    """Finds fragments, those of each parameter in turn, by the names in their plans."""
    found = {
        (one.chunk, fragment.plan.name): (one, fragment)
        for one, fragments in zip(parameters, cut, strict=True)
        for fragment in fragments
    }
    # What is not kept as float32 is converted at each reading, and experts are asked for one by
    # one: gate, up and down of one expert are in two parameters.
    read = functools.lru_cache(maxsize=4)(lambda one: one.read(kind))

    def lookup(chunk: int, name: str, expert: int | None) -> torch.Tensor:
        assert expert is None, "experts are rows of a fragment"
        one, fragment = found[chunk, name]
        return _view(read(one), fragment)

    return lookup


def _names_of_kinds(
    tensors: OptimizerTensors, *, form: OptimizerFormat, state: ParallelState
) -> dict[str, frozenset[str]]:
    """Hugging Face names of what all ranks have, by kind; kinds that nobody has are left out."""
    of_trained = _names_everywhere(tensors.trained, form=form, state=state)
    names = {
        kind: _names_everywhere(tensors.only[kind], form=form, state=state)
        if kind in tensors.only
        else of_trained
        for kind in tensors.kinds
    }
    return {kind: found for kind, found in names.items() if found}


def _names_everywhere(
    having: frozenset[tuple[int, str]], *, form: OptimizerFormat, state: ParallelState
) -> frozenset[str]:
    """Hugging Face names of the parameters that are given, on all ranks."""
    layout, at = state.layout, state.coordinates
    # One rank speaks for those that hold copies. Not for those that hold other shards: a shard of
    # queries, keys and values may have rows of one of the three only.
    speaks_for_dense = at.dp_rank == at.cp_rank == 0
    speaks_for_experts = at.edp_rank == 0
    ours: set[str] = set()
    if speaks_for_dense or speaks_for_experts:
        plan = plan_rank(form.table, layout=layout, rank=state.rank)
        ours = {
            piece.hf_name
            for parameter in plan
            if (parameter.chunk, parameter.name) in having
            for piece in parameter.pieces
            if (speaks_for_dense if piece.expert is None else speaks_for_experts)
        }
    everyone: list[set[str]] = [set()] * layout.world_size
    dist.all_gather_object(everyone, ours, group=state.world.group)
    return frozenset().union(*everyone)


def _check_names(folder: Path, kind: str, stored: set[str], wanted: frozenset[str]) -> None:
    """Refuses a state that is not that of the trained parameters; never fresh moments instead."""
    for problem, names in (
        ("has nothing for", wanted - stored),
        ("has it for parameters that are not trained now:", stored - wanted),
    ):
        if names:
            listed = ", ".join(sorted(names)[:10])
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            raise ValueError(
                f"{folder}: the saved {kind} of the optimizer {problem} {listed}{more}; train the "
                "same parameters, or start with a fresh optimizer (--no_load_optim true)"
            )
