"""Loads a Hugging Face checkpoint into the model chunks of one rank.

Every rank reads its own slices of every tensor, straight from memory-mapped files into place, and
talks to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from mtrain.bridge.ledger import check_checkpoint, check_model
from mtrain.bridge.plan import Backend, ParameterPlan, Plan, plan_rank
from mtrain.bridge.rules import IgnoredKey, WeightTable
from mtrain.bridge.safetensors_folder import Checkpoint
from mtrain.bridge.slices import read_box, tensors_by_name, view_box
from mtrain.parallel import ParallelLayout


def load_weights(
    chunks: Sequence[torch.nn.Module],
    checkpoint: Checkpoint,
    *,
    table: WeightTable,
    layout: ParallelLayout,
    rank: int,
    backend: Backend,
) -> dict[str, str]:
    """Fills every parameter of the chunks from a checkpoint.

    Values are converted to the dtype of the parameter. All checks come before the first read and
    give the same answer on every rank.

    Args:
        chunks: Bare model chunks of this rank, on any device.
        checkpoint: From `open_checkpoint`.
        table: From `weight_table`, for the config.json of the checkpoint.
        layout: Parallel sizes.
        rank: Global rank.
        backend: Spelling of the norms in the chunks.

    Returns:
        Tensors of the checkpoint that were left out on purpose, each with the reason.

    Raises:
        ValueError: A tensor or parameter is left over, missing or of the wrong shape.
    """
    ignored = check_checkpoint(table, checkpoint)
    plan = plan_rank(table, layout=layout, rank=rank, backend=backend)
    with CheckpointReader(checkpoint) as files, torch.no_grad():
        _check_copies(files, ignored)
        fill_tensors(tensors_by_name(chunks), files, plan)
    return {name: entry.reason for name, entry in ignored.items()}


class TensorSource(Protocol):
    """Where Hugging Face tensors come from: files, or values that are computed."""

    def slices(self, name: str) -> Any:
        """A tensor, or something that gives parts of it when it is indexed with slices."""
        ...


@torch.no_grad()
def fill_tensors(
    tensors: Sequence[Mapping[str, torch.Tensor]], source: TensorSource, plan: Plan
) -> None:
    """Fills the tensors of each model chunk, all that are given and no others.

    Args:
        tensors: Tensors of each chunk by Megatron name.
        source: Gives the Hugging Face tensors that the plan names.
        plan: Plan of this rank.

    Raises:
        ValueError: A tensor is not in the plan, or one of the plan is missing or has another shape.
    """
    check_model(plan, [{name: tuple(t.shape) for name, t in named.items()} for named in tensors])
    for parameter in plan:
        _fill(tensors[parameter.chunk][parameter.name], parameter, source)


class CheckpointReader:
    """The files of a checkpoint, each opened when it is first needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def slices(self, name: str) -> Any:
        """The slice object of a tensor; indexing it gives a view of the mapped file."""
        path = self._checkpoint.tensors[name].path
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[path].get_slice(name)


def _fill(parameter: torch.Tensor, plan: ParameterPlan, source: TensorSource) -> None:
    if plan.num_padding:
        parameter.zero_()
    for piece in plan.pieces:
        values = read_box(source.slices(piece.hf_name), piece.hf)
        view_box(parameter, piece.local, expert=piece.expert).copy_(values)


def _check_copies(files: CheckpointReader, ignored: dict[str, IgnoredKey]) -> None:
    """Refuses an ignored tensor that is said to be a copy of another one but is not."""
    for name, entry in ignored.items():
        if entry.copy_of is None:
            continue
        copy, original = files.slices(name)[:], files.slices(entry.copy_of)[:]
        if copy.dtype != original.dtype or not torch.equal(copy, original):
            raise ValueError(
                f"{name} should be a copy of {entry.copy_of} ({entry.reason}), but differs from it"
            )
