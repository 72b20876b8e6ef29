"""The folder of a run and its checkpoints: staged, flushed, published by one rename.

The one thing to know: a folder called `checkpoint-<step>` is complete. It is written under a hidden
name beside it and renamed when every byte is on disk, so a crash at any moment leaves the older
checkpoints as they were and at worst a hidden folder that nobody reads. Only rank 0 renames and
deletes; the other ranks write their files and wait.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from mtrain.bridge.written import WrittenFile
from mtrain.checkpoint.manifest import MANIFEST_FILE, read_manifest, write_manifest
from mtrain.parallel import World

__all__ = [
    "LATEST_FILE",
    "Retention",
    "SaveError",
    "create_run_folder",
    "latest_checkpoint",
    "list_checkpoints",
    "publish_checkpoint",
    "publish_folder",
    "write_atomically",
]

LATEST_FILE = "latest_checkpointed_iteration.txt"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_VERSION = re.compile(r"v(\d+)-\d{8}-\d{6}")
_STAGED = ".staged-"
# Files of a model or an adapter that loaders look for, and what was found out about them.
_WEIGHTS = re.compile(
    r"\.safetensors$|\.safetensors\.index\.json$|^adapter_config\.json$|^adapter_tensors\.json$"
    r"|^base_model\.json$|^precision\.json$"
)
_ITERATION = re.compile(r"iter_\d{7,}|release")

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


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
    output_dir: Path, *, add_version: bool, started: datetime, world: World
) -> Path:
    """Makes the folder of a run; all ranks get the name that rank 0 chose.

    Args:
        output_dir: Where runs are collected.
        add_version: Make a folder `v<N>-<date>-<time>` of its own in it, N counting up from 0.
            Otherwise the run takes `output_dir` itself.
        started: Time in the name.
        world: This rank.

    Raises:
        ValueError: The folder cannot be made, or it holds checkpoints already. All ranks raise.
    """
    answer: list[Path | str] = [""]
    if world.is_first_rank:
        try:
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
    output_dir.mkdir(parents=True, exist_ok=True)
    if not add_version:
        if found := list_checkpoints(output_dir):
            raise ValueError(
                f"--output_dir {output_dir}: holds {found[-1].name} of another run; choose another "
                "folder or --add_version true"
            )
        return output_dir
    matches = (_VERSION.fullmatch(path.name) for path in output_dir.iterdir())
    version = max((int(match[1]) for match in matches if match), default=-1) + 1
    while True:
        folder = output_dir / f"v{version}-{started:%Y%m%d-%H%M%S}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run started at the same time
            version += 1
        else:
            return folder


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in run.iterdir()]
    numbered = [(int(match[1]), path) for match, path in matches if match and path.is_dir()]
    return [path for _, path in sorted(numbered)]


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that the run's tracker file names, or else the newest complete one."""
    tracker = run / LATEST_FILE
    if tracker.is_file():
        named = run / f"checkpoint-{tracker.read_text().strip()}"
        if named.is_dir():
            return named
    return max(list_checkpoints(run), default=None, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def publish_checkpoint(
    run: Path,
    step: int,
    write: Callable[[Path], Iterable[WrittenFile]],
    *,
    world: World,
    num_bytes: int,
    retention: Retention,
    source: Mapping[str, Any],
    finish: Callable[[Path], Iterable[WrittenFile]] | None = None,
) -> Path:
    """Writes `run/checkpoint-<step>` on all ranks, and publishes it when all are done.

    Args:
        run: Folder of the run.
        step: Steps done.
        write: As for `publish_folder`.
        world: This rank; every rank must call this.
        num_bytes: As for `publish_folder`.
        retention: Which older checkpoints are deleted afterwards.
        source: As for `publish_folder`.
        finish: As for `publish_folder`.

    Returns:
        The published folder.

    Raises:
        SaveError: It failed on a rank, with the path and the reason. All ranks raise.
    """
    final = run / f"checkpoint-{step}"
    publish_folder(
        final,
        write,
        world=world,
        num_bytes=num_bytes,
        source=source,
        sources=[retention.protected] if retention.protected else [],
        finish=finish,
    )
    _agree(final, world, lambda: _track(run, step) if world.is_first_rank else None)
    if world.is_first_rank:
        _retain(run, retention)
    return final


def publish_folder(
    final: Path,
    write: Callable[[Path], Iterable[WrittenFile]],
    *,
    world: World,
    num_bytes: int,
    source: Mapping[str, Any],
    sources: Sequence[Path] = (),
    exist_ok: bool = False,
    finish: Callable[[Path], Iterable[WrittenFile]] | None = None,
) -> None:
    """Writes a folder on all ranks, and gives it its name when all are done.

    Args:
        final: Its name.
        write: Writes this rank's files into the folder it is given and returns records of those
            that stay. It may use collectives, but then has to end on every rank when it fails on
            one.
        world: This rank; every rank must call this.
        num_bytes: About how much all ranks write; checked against the free space first.
        source: What the folder is made from, for its manifest; that of the first rank counts.
        sources: Folders that are being read, which must stay as they are.
        exist_ok: Whether a folder that is there and not empty gets the files, in the place of its
            weights. That is not one step: cut short, it leaves the folder incomplete.
        finish: Called on the first rank with the folder when all ranks have written; does what
            needs the files of all of them, and returns records of those that it made.

    Raises:
        SaveError: It failed on a rank, with the path and the reason. All ranks raise.
    """

    def stage() -> Path | None:
        if not world.is_first_rank:
            return None
        _check_free(final, sources, exist_ok)
        return _stage(final, num_bytes)

    staged = _agree(final, world, stage)[0]
    assert staged is not None
    try:
        of_ranks = _agree(final, world, lambda: _flushed(staged, write))
        files = [file for of_rank in of_ranks for file in of_rank]

        def complete() -> None:
            if world.is_first_rank:
                made = _flushed(staged, finish) if finish is not None else []
                _publish(staged, final, [*files, *made], source)

        _agree(final, world, complete)
    except SaveError:
        if world.is_first_rank:
            shutil.rmtree(staged, ignore_errors=True)
        raise


def _agree(final: Path, world: World, work: Callable[[], T]) -> list[T]:
    """Runs work on every rank and returns its answers in rank order; raises if it failed on any.

    Errors of the file system and of the user end the save; anything else is a bug and is raised
    where it happened.
    """
    result: T | None = None
    problem: str | None = None
    try:
        result = work()
    except (OSError, ValueError) as error:
        problem = f"rank {world.rank}: {error}"
    answers: list[tuple[Any, str | None]] = [(None, None)] * world.size
    dist.all_gather_object(answers, (result, problem), group=world.group)
    if problems := [text for _, text in answers if text]:
        raise SaveError(f"cannot save {final}: {'; '.join(problems[:4])}")
    return [answer for answer, _ in answers]


def _check_free(final: Path, sources: Sequence[Path], exist_ok: bool) -> None:
    """Refuses to write into a folder that is in use."""
    if not final.exists():
        return
    in_use = [final, *(path for path in _replaced(final) if path.is_dir())]
    if any(path.samefile(source) for path in in_use for source in sources):
        what = "the model was loaded from it"
    elif not final.is_dir():
        what = "it is a file"
    elif exist_ok and (iteration := _foreign_iteration(final)):
        what = f"{iteration} in it was written by no export"
    elif exist_ok or not any(final.iterdir()):
        return
    else:
        what = "it exists already"
    raise ValueError(f"{what} and will not be overwritten; choose another --output_dir")


def _stage(final: Path, num_bytes: int) -> Path:
    """Makes the hidden folder to write into."""
    final.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(final.parent).free
    if num_bytes > free:
        raise ValueError(f"it needs about {num_bytes} bytes, and {free} are free")
    staged = final.parent / f".{final.name}{_STAGED}{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    return staged


def _flushed(staged: Path, write: Callable[[Path], Iterable[WrittenFile]]) -> list[WrittenFile]:
    """Records of what this rank wrote; it is on disk then."""
    files = list(write(staged))
    for file in files:
        _fsync(staged / file.name)
    return files


def _publish(
    staged: Path, final: Path, files: Iterable[WrittenFile], source: Mapping[str, Any]
) -> None:
    """Everything before the rename is on disk; everything after it can be lost and made again."""
    write_manifest(staged, files, source=source)
    for folder, _, _ in os.walk(staged, topdown=False):
        _fsync(Path(folder))
    if final.is_dir() and any(final.iterdir()):
        _move_into(staged, final)
    else:
        staged.rename(final)
    _fsync(final.parent)


def _move_into(staged: Path, final: Path) -> None:
    """Puts files into a folder with others; old weights go first, new ones come last."""
    (final / MANIFEST_FILE).unlink(missing_ok=True)
    for path in _replaced(final):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            (final / LATEST_FILE).unlink(missing_ok=True)
        else:
            path.unlink()
    files = (path for path in staged.rglob("*") if path.is_file())
    for path in sorted(files, key=_place_in_order):
        target = final / path.relative_to(staged)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    shutil.rmtree(staged)
    for folder, _, _ in os.walk(final, topdown=False):
        _fsync(Path(folder))


def _replaced(final: Path) -> list[Path]:
    """The weights in a folder: files, and folders of Megatron-Core's iterations."""
    if not final.is_dir():
        return []
    return [
        path
        for path in final.iterdir()
        if (_ITERATION.fullmatch(path.name) and _is_iteration(path))
        or (_WEIGHTS.search(path.name) and not path.is_dir())
    ]


def _foreign_iteration(final: Path) -> str | None:
    """An iteration that no manifest lists: a checkpoint of a training run, which is not ours."""
    iterations = sorted(path.name for path in _replaced(final) if path.is_dir())
    files = read_manifest(final) if iterations and (final / MANIFEST_FILE).is_file() else ()
    own = {file.name.partition("/")[0] for file in files}
    return next((name for name in iterations if name not in own), None)


def _is_iteration(path: Path) -> bool:
    return path.is_dir() and ((path / ".metadata").exists() or any(path.glob("*.distcp")))


def _place_in_order(path: Path) -> tuple[bool, bool, str]:
    return path.name == MANIFEST_FILE, bool(_WEIGHTS.search(path.name)), path.name


def _track(run: Path, step: int) -> None:
    write_atomically(run / LATEST_FILE, f"{step}\n")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small text file so that a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}{_STAGED}{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _retain(run: Path, retention: Retention) -> None:
    """Deletes the oldest checkpoints above the limit; a failure is a warning, training goes on."""
    if retention.limit is None:
        return
    keep = {path.resolve() for path in (latest_checkpoint(run), retention.protected) if path}
    surplus = list_checkpoints(run)[: -retention.limit]
    for checkpoint in surplus:
        if checkpoint.resolve() in keep:
            continue
        # Hidden first: a deletion that is cut short must not look like a complete checkpoint.
        doomed = run / f".{checkpoint.name}{_STAGED}deleted"
        try:
            checkpoint.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("cannot delete %s: %s", checkpoint, error)
