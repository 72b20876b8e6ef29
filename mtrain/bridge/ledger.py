"""Accounts for every tensor on both sides before a single one is read.

The Hugging Face side is compared with the whole model, not with what this rank needs, so that every
rank comes to the same verdict without talking to the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from mtrain.bridge.plan import Plan, Shape, hf_tensors
from mtrain.bridge.rules import IgnoredKey, WeightTable
from mtrain.bridge.sources import StoredWeights

_READABLE_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_LISTED = 10


def check_checkpoint(table: WeightTable, checkpoint: StoredWeights) -> dict[str, IgnoredKey]:
    """Compares a checkpoint with the tensors that the model needs.

    Args:
        table: Weights of the model.
        checkpoint: What is on disk.

    Returns:
        The tensors that are left out on purpose, and why.

    Raises:
        ValueError: A tensor is missing, unknown, or has a wrong shape or a dtype that is not
            built; the first ten of each kind are named.
    """
    expected = hf_tensors(table)
    ignored: dict[str, IgnoredKey] = {}
    surplus: list[str] = []
    for name in checkpoint.tensors:
        if name not in expected:
            entry = _find_ignored(name, table)
            if entry:
                ignored[name] = entry
            else:
                surplus.append(name)
    faults = listed("missing", [name for name in expected if name not in checkpoint.tensors])
    faults += listed("not part of the model", surplus)
    faults += listed("wrong shape", _wrong_shapes(expected, checkpoint))
    faults += listed("dtype not supported", _wrong_dtypes(expected, checkpoint))
    if faults:
        raise ValueError(f"{checkpoint.folder}: does not fit its config.json: {'; '.join(faults)}")
    return ignored


def carried_names(table: WeightTable, checkpoint: StoredWeights) -> list[str]:
    """The tensors of a checkpoint that the model does not have, and that saves copy.

    Args:
        table: Weights of the model.
        checkpoint: What is on disk.
    """
    return [name for name, entry in _carried(table, checkpoint) if entry.copy_of is None]


def copied_names(table: WeightTable, checkpoint: StoredWeights) -> dict[str, str]:
    """The tensors of a checkpoint that are copies of others, and that saves make again.

    Args:
        table: Weights of the model.
        checkpoint: What is on disk.

    Returns:
        What each is a copy of.
    """
    return {name: entry.copy_of for name, entry in _carried(table, checkpoint) if entry.copy_of}


def _carried(table: WeightTable, checkpoint: StoredWeights) -> Iterator[tuple[str, IgnoredKey]]:
    expected = hf_tensors(table)
    for name in checkpoint.tensors:
        entry = _find_ignored(name, table) if name not in expected else None
        if entry is not None and entry.is_carried:
            yield name, entry


def check_model(plan: Plan, shapes: list[Mapping[str, Shape]]) -> None:
    """Compares the parameters of the model chunks of this rank with its plan.

    Args:
        plan: Plan of this rank.
        shapes: Shape of every parameter and persistent buffer, for each chunk.

    Raises:
        ValueError: A parameter would not be filled, or one in the plan does not exist or has
            another shape; the first ten of each kind are named.
    """
    planned = {(parameter.chunk, parameter.name): parameter.shape for parameter in plan}
    assert len(planned) == len(plan), "a plan fills a parameter twice"
    actual = {
        (chunk, name): shape for chunk, named in enumerate(shapes) for name, shape in named.items()
    }
    faults = listed("no rule fills", [_text(key) for key in actual if key not in planned])
    faults += listed("not in the model", [_text(key) for key in planned if key not in actual])
    faults += listed(
        "wrong shape",
        [
            f"{_text(key)} has {actual[key]}, planned is {shape}"
            for key, shape in planned.items()
            if key in actual and actual[key] != shape
        ],
    )
    if faults:
        raise ValueError(f"the Megatron model does not fit its weight table: {'; '.join(faults)}")


def _find_ignored(name: str, table: WeightTable) -> IgnoredKey | None:
    return next((entry for entry in table.ignored if re.fullmatch(entry.pattern, name)), None)


def _wrong_shapes(expected: Mapping[str, Shape], checkpoint: StoredWeights) -> list[str]:
    return [
        f"{name} has {checkpoint.tensors[name].shape}, expected is {shape}"
        for name, shape in expected.items()
        if name in checkpoint.tensors and checkpoint.tensors[name].shape != shape
    ]


def _wrong_dtypes(expected: Mapping[str, Shape], checkpoint: StoredWeights) -> list[str]:
    return [
        f"{name} ({checkpoint.tensors[name].dtype})"
        for name in expected
        if name in checkpoint.tensors and checkpoint.tensors[name].dtype not in _READABLE_DTYPES
    ]


def _text(key: tuple[int, str]) -> str:
    chunk, name = key
    return f"{name} (chunk {chunk})" if chunk else name


def listed(title: str, names: Sequence[str]) -> list[str]:
    """A fault and the first ten names that have it, as one text; nothing where there are none."""
    if not names:
        return []
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return [f"{title}: {', '.join(names[:_MAX_LISTED])}{more}"]
