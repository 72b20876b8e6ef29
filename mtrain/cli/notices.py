"""The lines that a run says about itself before its first step and when it is stopped."""

from __future__ import annotations

import signal
from pathlib import Path

from mtrain.cli.resuming import ResumePoint
from mtrain.cli.saving import TrainingRun
from mtrain.platform.device import device_info

__all__ = ["finished_notice", "start_notice", "stop_notice"]


def start_notice(run: TrainingRun, *, trained: str, folder: Path) -> str:
    """What is trained, on what, and where it goes.

    Args:
        run: The run.
        trained: What is trained.
        folder: Its folder.
    """
    layout = run.state.layout
    sizes = {
        "TP": layout.tp_size,
        "PP": layout.pp_size,
        "VPP": layout.num_chunks,
        "EP": layout.ep_size,
        "ETP": layout.etp_size,
        "DP": layout.dp_size,
    }
    split = " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
    return (
        f"{run.inputs.source.family.name}: {trained} are trained on {device_info().name} "
        f"({split}, {run.backend} backend); checkpoints go to {folder}"
    )


def finished_notice(point: ResumePoint, *, total_steps: int) -> str:
    """What is said when there is nothing left to train.

    Args:
        point: The checkpoint that was to be continued.
        total_steps: Length of the run.
    """
    return (
        f"the run is finished: {point.folder} has {point.trainer.step} of {total_steps} steps; for "
        "more, raise --num_train_epochs or --train_iters"
    )


def stop_notice(signum: int) -> str:
    """What is said after a signal ended training early.

    Args:
        signum: The signal.
    """
    return (
        f"stopped by {signal.Signals(signum).name} after a save; the same command with "
        "--resume_from_checkpoint auto goes on"
    )
