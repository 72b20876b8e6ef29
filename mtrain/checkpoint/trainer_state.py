"""`state/trainer.json` and the random states: all of a run's state that is not a tensor of weights.

The one thing to know: JSON and safetensors only, and what is read is checked before it is used. A
number that JSON writes is read back exactly, so losses add up to the same bits after a resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.safetensors_header import parse_json, read_header
from mtrain.bridge.safetensors_reader import SafetensorsReader
from mtrain.bridge.safetensors_writer import OpenFile, SafetensorsWriter
from mtrain.bridge.written import WrittenFile, write_json
from mtrain.checkpoint.folder import Contents, PendingFiles
from mtrain.checkpoint.optimizer_state import (
    OptimizerFormat,
    OptimizerTensors,
    optimizer_bytes,
    save_optimizer_state,
)
from mtrain.config.resume import STATE_FOLDER, TRAINER_FILE
from mtrain.parallel import ParallelLayout, ParallelState, World

__all__ = [
    "TrainerState",
    "read_random_states",
    "read_trainer_state",
    "state_contents",
    "write_random_states",
    "write_trainer_state",
]

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Where a run stands.

    Attributes:
        step: Steps done.
        total_steps: Steps that it was to have.
        layout: Sizes of the parallel axes.
        belongs_to: What the optimizer's tensors belong to: dtypes, and the base of an adapter.
        num_updates: Updates made; fewer than steps where float16 skipped some.
        loss_scale: State of the dynamic loss scale; empty without one.
        schedule_steps: Steps that the learning rate schedule has made.
        data: Which data, in which order.
        data_unit: Packs, or samples, of it that were trained on.
        metrics: What the next log line adds to, one list of numbers a rank.
        has_random_states: Whether those of every rank are saved.
    """

    step: int
    total_steps: int
    layout: Mapping[str, int | None]
    belongs_to: Mapping[str, str]
    num_updates: int
    loss_scale: Mapping[str, float]
    schedule_steps: int
    data: Mapping[str, Any]
    data_unit: int
    metrics: Sequence[Sequence[float]]
    has_random_states: bool

    def is_of_layout(self, layout: ParallelLayout) -> bool:
        """Whether the run had the same number of ranks, split in the same way."""
        return dict(self.layout) == dataclasses.asdict(layout)


def write_trainer_state(folder: Path, trainer: TrainerState) -> WrittenFile:
    """Writes it as `state/trainer.json`.

    Args:
        folder: Folder of the checkpoint, which has a folder for the state.
        trainer: What to write.
    """
    content = {"format": _FORMAT, **dataclasses.asdict(trainer)}
    return write_json(folder, f"{STATE_FOLDER}/{TRAINER_FILE}", content)


def state_contents(
    trainer: TrainerState,
    tensors: OptimizerTensors,
    random_states: Mapping[str, torch.Tensor] | None,
    *,
    form: OptimizerFormat,
    state: ParallelState,
    open_file: OpenFile,
) -> Contents:
    """What training continues from, as the folder `state` of a checkpoint; all ranks call it.

    Args:
        trainer: Where the run stands.
        tensors: What this rank's optimizer remembers.
        random_states: Of this rank; None to leave them out.
        form: How the optimizer's tensors are written.
        state: This rank.
        open_file: What takes the tensors of a file.
    """

    def write(folder: Path) -> list[PendingFiles]:
        pending = save_optimizer_state(
            tensors, folder / STATE_FOLDER, form=form, state=state, open_file=open_file
        )
        if random_states is not None:
            pending.append(lambda: [write_random_states(folder, random_states, world=state.world)])
        if state.is_first_rank:
            pending.append(lambda: [write_trainer_state(folder, trainer)])
        return pending

    return Contents(
        write=write,
        num_bytes=optimizer_bytes(tensors, state=state),
        source={},
        folders=(STATE_FOLDER,),
    )


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Reads where the run of a checkpoint stood.

    Raises:
        ValueError: There is no state, or not one that mtrain wrote.
    """
    path = checkpoint / STATE_FOLDER / TRAINER_FILE
    if not path.is_file():
        raise ValueError(f"{checkpoint}: has no state to continue from ({path} is missing)")
    content = parse_json(path.read_bytes(), source=path)
    version = content.pop("format", None)
    if version != _FORMAT:
        raise ValueError(f"{path}: is of format {version}, and this version reads {_FORMAT}")
    for name, (is_sound, wanted) in _FIELDS.items():
        if name not in content or not is_sound(content[name]):
            raise ValueError(f"{path}: {name} is missing or not {wanted}")
    if surplus := content.keys() - _FIELDS.keys():
        raise ValueError(f"{path}: has {', '.join(sorted(surplus))}, which is not known")
    return TrainerState(**content)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _maps_to(is_sound: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_sound, value.values()))


def _is_progress(value: object) -> bool:
    """Whether there are numbers of every rank: samples and tokens, and what else was added up."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(of_rank, list) and len(of_rank) >= 2 and all(map(_is_number, of_rank))
            for of_rank in value
        )
    )


_COUNT = (_is_count, "a whole number, 0 or more")
_FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "step": _COUNT,
    "total_steps": _COUNT,
    "layout": (_maps_to(lambda size: size is None or _is_count(size)), "sizes by name"),
    "belongs_to": (_maps_to(lambda fact: isinstance(fact, str)), "text by name"),
    "num_updates": _COUNT,
    "loss_scale": (_maps_to(_is_number), "numbers by name"),
    "schedule_steps": _COUNT,
    "data": (lambda value: isinstance(value, dict), "values by name"),
    "data_unit": _COUNT,
    "metrics": (_is_progress, "a list of numbers for every rank"),
    "has_random_states": (lambda value: isinstance(value, bool), "true or false"),
}


def write_random_states(
    folder: Path, states: Mapping[str, torch.Tensor], *, world: World
) -> WrittenFile:
    """Writes the random states of this rank.

    Args:
        folder: Folder of the checkpoint, which has a folder for the state.
        states: uint8 [size] on the CPU, by name.
        world: This rank.
    """
    path = folder / _random_file(world)
    entries = [(name, "U8", tuple(state.shape)) for name, state in states.items()]
    with SafetensorsWriter(path, entries) as writer:
        for state in states.values():
            writer.append(state)
    return dataclasses.replace(writer.written, name=_random_file(world), tensors={})


def read_random_states(checkpoint: Path, *, world: World) -> dict[str, torch.Tensor]:
    """The random states of this rank.

    Raises:
        ValueError: They are missing, or the file is not sound.
    """
    path = checkpoint / _random_file(world)
    if not path.is_file():
        raise ValueError(f"{path}: is missing; use --no_load_rng true for fresh random states")
    header = read_header(path)
    for name, stored in header.items():
        if stored.dtype != "U8" or len(stored.shape) != 1:
            raise ValueError(f"{path}: {name} is no random state")
    with SafetensorsReader(header) as reader:
        return {name: reader.slices(name)[:].clone() for name in header}


def _random_file(world: World) -> str:
    return f"{STATE_FOLDER}/rng-{world.rank + 1:05}-of-{world.size:05}.safetensors"
