"""Loads a checkpoint into the model chunks of one rank.

Every rank reads its own slices of every tensor, straight from the files into place, and talks to
nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mtrain.bridge.convert import io_threads, num_threads, row_blocks
from mtrain.bridge.ledger import check_checkpoint, check_model
from mtrain.bridge.plan import ParameterPlan, Plan, plan_rank
from mtrain.bridge.rules import IgnoredKey, WeightTable
from mtrain.bridge.slices import read_box, tensors_by_name, view_box
from mtrain.bridge.sources import StoredWeights, TensorSource
from mtrain.bridge.spans import box_shape, clip
from mtrain.parallel import ParallelLayout


def load_weights(
    chunks: Sequence[torch.nn.Module],
    checkpoint: StoredWeights,
    *,
    table: WeightTable,
    layout: ParallelLayout,
    rank: int,
) -> dict[str, str]:
    """Fills every parameter of the chunks from a checkpoint.

    Values are converted to the dtype of the parameter. All checks come before the first read and
    give the same answer on every rank.

    Args:
        chunks: Bare model chunks of this rank, on any device.
        checkpoint: From `open_checkpoint` or another format.
        table: From `weight_table`, for the config.json of the checkpoint.
        layout: Parallel sizes.
        rank: Global rank.

    Returns:
        Tensors of the checkpoint that were left out on purpose, each with the reason.

    Raises:
        ValueError: A tensor or parameter is left over, missing or of the wrong shape.
    """
    ignored = check_checkpoint(table, checkpoint)
    plan = plan_rank(table, layout=layout, rank=rank)
    with checkpoint.open() as files, torch.no_grad():
        _check_copies(files, ignored)
        fill_tensors(tensors_by_name(chunks), files, plan)
    return {name: entry.reason for name, entry in ignored.items()}


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
    with io_threads(num_threads()) as threads:
        list(threads.map(lambda p: _fill(tensors[p.chunk][p.name], p, source), plan))


@torch.no_grad()
def _fill(parameter: torch.Tensor, plan: ParameterPlan, source: TensorSource) -> None:
    if plan.num_padding:
        parameter.zero_()
    for piece in plan.pieces:
        stored, rows = source.slices(piece.hf_name), piece.hf[0]
        # In blocks, so that what is read is still in the cache when it is copied.
        shape = (rows.extent, *box_shape(piece.hf[1:]))
        for start, stop in row_blocks(shape, itemsize=parameter.element_size()):
            for theirs, ours in clip(
                rows, piece.local[0], start=rows.start + start, stop=rows.start + stop
            ):
                values = read_box(stored, (theirs, *piece.hf[1:]))
                target = view_box(parameter, (ours, *piece.local[1:]), expert=piece.expert)
                values = values.reshape(target.shape)
                if target.is_cuda:
                    # Else the driver copies it to such memory, for one thread at a time.
                    values = values.pin_memory()
                target.copy_(values, non_blocking=True)


def _check_copies(files: TensorSource, ignored: dict[str, IgnoredKey]) -> None:
    """Refuses an ignored tensor that is said to be a copy of another one but is not."""
    for name, entry in ignored.items():
        if entry.copy_of is None:
            continue
        copy, original = files.slices(name)[:], files.slices(entry.copy_of)[:]
        if copy.dtype != original.dtype or not torch.equal(copy, original):
            raise ValueError(
                f"{name} should be a copy of {entry.copy_of} ({entry.reason}), but differs from it"
            )
