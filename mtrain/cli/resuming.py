"""A run that goes on where a checkpoint stands: found, verified, and put into a new process.

The one thing to know: the weights are loaded as those of any model or adapter; here comes what is
in `state/`. Nothing is made up: what is missing is an error, unless a flag says to do without.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtrain.bridge.sources import StoredWeights
from mtrain.checkpoint.optimizer_state import load_optimizer_state, open_saved_kind
from mtrain.checkpoint.trainer_state import (
    TrainerState,
    read_random_states,
    read_trainer_state,
)
from mtrain.cli.batches import Batches
from mtrain.cli.preparation import Inputs
from mtrain.cli.saving import TrainingRun, data_order
from mtrain.config import SftConfig
from mtrain.config.resume import STATE_FOLDER, changed_flags
from mtrain.config.saved_arguments import read_arguments
from mtrain.data.storage import TokenizedDataset
from mtrain.parallel import ParallelState
from mtrain.training.optimizer_state import MAIN, OptimizerProgress, restore_progress
from mtrain.training.random_state import reseed, set_random_states

__all__ = [
    "ResumePoint",
    "find_resume_point",
    "merged_adapter",
    "open_batches",
    "restore",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """A checkpoint that a run continues.

    Attributes:
        folder: The checkpoint.
        trainer: Where its run stood.
    """

    folder: Path
    trainer: TrainerState


def find_resume_point(config: SftConfig) -> ResumePoint | None:
    """The checkpoint that the configuration continues; None for a new run.

    Raises:
        ValueError: Its state cannot be read.
    """
    if config.checkpoint.resume_from_checkpoint is None:
        return None
    folder = Path(config.checkpoint.resume_from_checkpoint)
    return ResumePoint(folder=folder, trainer=read_trainer_state(folder))


def open_batches(
    config: SftConfig, inputs: Inputs, state: ParallelState, *, point: ResumePoint | None
) -> Batches:
    """The training batches, from the position of the checkpoint on where there is one.

    Other data, or the same in another order, is trained on from its beginning.
    """
    first_step = first_unit = 0
    if point is not None:
        first_step = point.trainer.step
        if _is_same_data(config, inputs, point):
            first_unit = point.trainer.data_unit
    data = inputs.data
    return Batches(
        config,
        TokenizedDataset(data.train),
        data.report,
        state,
        first_step=first_step,
        first_unit=first_unit,
    )


def _is_same_data(config: SftConfig, inputs: Inputs, point: ResumePoint) -> bool:
    return dict(point.trainer.data) == data_order(config, inputs)


def merged_adapter(config: SftConfig, point: ResumePoint) -> StoredWeights | None:
    """The factors in the state of a checkpoint whose weights have them merged; or None."""
    if not config.tuner.merge_lora:
        return None
    return open_saved_kind(point.folder / STATE_FOLDER, MAIN)


def restore(run: TrainingRun, point: ResumePoint) -> list[str]:
    """Puts the state of a checkpoint into a run whose weights are loaded already.

    Args:
        run: The run, before its first step.
        point: What it continues.

    Returns:
        What the user should know.

    Raises:
        ValueError: The state does not fit the run. All ranks raise.
    """
    config, trainer = run.config, point.trainer
    notes = [f"continues {point.folder} after step {trainer.step} of {run.total_steps}"]
    changed = changed_flags(read_arguments(point.folder), config)
    if changed:
        notes.append(f"changed since then, and used as given now: {', '.join(changed)}")
    if not _is_same_data(config, run.inputs, point):
        notes.append(
            "the data, or their order, are not those of the checkpoint: they are trained on from "
            "their beginning"
        )
    if config.checkpoint.no_load_optim:
        notes.append("the optimizer starts afresh (--no_load_optim true)")
    else:
        _check_optimizer(run, trainer)
        load_optimizer_state(
            run.optimizer_tensors(),
            point.folder / STATE_FOLDER,
            form=run.optimizer_format(),
            state=run.state,
        )
        progress = OptimizerProgress(
            num_updates=trainer.num_updates, loss_scale=dict(trainer.loss_scale)
        )
        restore_progress(run.optimizer, progress)
    run.scheduler.step(trainer.schedule_steps)
    run.meter.restore(trainer.metrics)
    notes += _restore_random_states(run, point)
    return notes


def _check_optimizer(run: TrainingRun, trainer: TrainerState) -> None:
    here = run.belongs_to()
    for name in here.keys() | trainer.belongs_to.keys():
        saved, ours = trainer.belongs_to.get(name), here.get(name)
        if saved != ours:
            raise ValueError(
                f"--resume_from_checkpoint: {name} is {ours}, and the state of the optimizer was "
                f"saved with {saved}; use the same, or start with a fresh optimizer "
                "(--no_load_optim true)"
            )


def _restore_random_states(run: TrainingRun, point: ResumePoint) -> list[str]:
    trainer = point.trainer
    if run.config.checkpoint.no_load_rng:
        return ["random states start afresh (--no_load_rng true)"]
    if trainer.has_random_states and trainer.is_of_layout(run.state.layout):
        set_random_states(read_random_states(point.folder, world=run.state.world))
        return []
    # Others than those at the start of the run, whose first steps would be dropped out alike.
    reseed(run.config.training.seed + trainer.step)
    if run.config.tuner.lora_dropout == 0 or run.inputs.adapter is None:
        return []
    why = "were saved in another layout" if trainer.has_random_states else "were not saved"
    return [f"random states {why}: dropout goes on with fresh ones"]
