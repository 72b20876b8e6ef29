"""The folder of a run: its checkpoints, the one to go on from, and which are kept.

The one thing to know: a folder called `checkpoint-<step>` is complete; only `mtrain.checkpoint
.folder` gives it that name. What is hidden here is left over from a crash, and removed by the next
run.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from mtrain.checkpoint.folder import LATEST_FILE, STAGED, flush, make_folder, write_atomically
from mtrain.config.resume import list_checkpoints, run_version
from mtrain.parallel import World

__all__ = [
    "Retention",
    "continues_in",
    "create_run_folder",
    "latest_checkpoint",
    "name_latest",
    "remove_leftovers",
    "remove_surplus",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints are kept.

    Attributes:
        limit: How many; None keeps all. The newest one always stays.
        protected: A folder that is never deleted, such as the one training started from.
    """

    limit: int | None = None
    protected: Path | None = None


def create_run_folder(
    output_dir: Path,
    *,
    add_version: bool,
    started: datetime,
    world: World,
    resumed: Path | None = None,
) -> Path:
    """Makes the folder of a run, or finds that of a run that goes on.

    All ranks get the name that rank 0 chose. A run goes on in its own folder when its newest
    checkpoint is continued, and that is in `output_dir`. What crashes left there is removed.

    Args:
        output_dir: Where runs are collected.
        add_version: Make a folder `v<N>-<date>-<time>` of its own in it, N counting up from 0.
            Otherwise the run takes `output_dir` itself.
        started: Time in the name.
        world: This rank.
        resumed: The checkpoint that is continued; None for a new run.

    Raises:
        ValueError: The folder cannot be made, or it holds checkpoints already. All ranks raise.
    """
    answer: list[Path | str] = [""]
    if world.is_first_rank:
        try:
            if resumed is not None and continues_in(output_dir, resumed):
                run = resumed.resolve().parent
                remove_leftovers(run)
                answer = [run]
            else:
                answer = [_make_run_folder(output_dir, add_version=add_version, started=started)]
        except OSError as error:
            answer = [f"--output_dir {output_dir}: cannot be made: {error.strerror}"]
        except ValueError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0, group=world.group)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    return answer[0]


def _make_run_folder(output_dir: Path, *, add_version: bool, started: datetime) -> Path:
    make_folder(output_dir)
    if not add_version:
        if found := list_checkpoints(output_dir):
            raise ValueError(
                f"--output_dir {output_dir}: holds {found[-1].name} of another run; choose another "
                "folder or --add_version true"
            )
        remove_leftovers(output_dir)
        return output_dir
    versions = map(run_version, output_dir.iterdir())
    version = max((number for number in versions if number is not None), default=-1) + 1
    while True:
        folder = output_dir / f"v{version}-{started:%Y%m%d-%H%M%S}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run started at the same time
            version += 1
        else:
            flush(output_dir)
            return folder


def continues_in(output_dir: Path, resumed: Path) -> bool:
    """Whether a run that continues this checkpoint does so in the folder that holds it."""
    resumed, output_dir = resumed.resolve(), output_dir.resolve()
    run = resumed.parent
    is_version = run.parent == output_dir and run_version(run) is not None
    return (run == output_dir or is_version) and list_checkpoints(run)[-1:] == [resumed]


def remove_leftovers(run: Path) -> None:
    """Removes the hidden folders of saves and deletions that were cut short."""
    for path in run.glob(f".*{STAGED}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that the run's tracker file names, or else the newest complete one."""
    tracker = run / LATEST_FILE
    if tracker.is_file():
        named = run / f"checkpoint-{tracker.read_text().strip()}"
        if named.is_dir():
            return named
    return next(reversed(list_checkpoints(run)), None)


def name_latest(run: Path, step: int) -> None:
    """Writes which checkpoint is the newest."""
    write_atomically(run / LATEST_FILE, f"{step}\n")


def remove_surplus(run: Path, retention: Retention) -> None:
    """Deletes the oldest checkpoints above the limit; a failure is a warning, training goes on."""
    if retention.limit is None:
        return
    keep = {path.resolve() for path in (latest_checkpoint(run), retention.protected) if path}
    surplus = list_checkpoints(run)[: -retention.limit]
    for checkpoint in surplus:
        if checkpoint.resolve() in keep:
            continue
        try:
            _delete(checkpoint)
        except OSError as error:
            logger.warning("cannot delete %s: %s", checkpoint, error)


def _delete(checkpoint: Path) -> None:
    """Hides it for good first: a deletion cut short must not look like a complete checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}{STAGED}deleted")
    checkpoint.rename(doomed)
    flush(checkpoint.parent)
    shutil.rmtree(doomed)
