"""A folder that all ranks write: staged, flushed, published by one rename.

The one thing to know: it is written under a hidden name and renamed when every byte is on disk, so
a crash at any moment leaves what was there before, and at worst a hidden folder that nobody reads.
Only rank 0 renames and deletes; the other ranks write their files and wait.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from mtrain.bridge.written import WrittenFile
from mtrain.checkpoint.manifest import MANIFEST_FILE, read_manifest, write_manifest
from mtrain.parallel import World

__all__ = [
    "LATEST_FILE",
    "Contents",
    "PendingFiles",
    "SaveError",
    "agree",
    "complete_folder",
    "discard",
    "flush",
    "make_folder",
    "publish_folder",
    "stage_folder",
    "write_atomically",
    "write_files",
]

LATEST_FILE = "latest_checkpointed_iteration.txt"

STAGED = ".staged-"
# Files of a model or an adapter that loaders look for, and what was found out about them.
_WEIGHTS = re.compile(
    r"\.safetensors$|\.safetensors\.index\.json$|^adapter_config\.json$|^adapter_tensors\.json$"
    r"|^base_model\.json$|^precision\.json$"
)
_ITERATION = re.compile(r"iter_\d{7,}|release")

T = TypeVar("T")
# Writes files of this rank and returns their records.
PendingFiles = Callable[[], Iterable[WrittenFile]]


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What goes into a folder.

    Attributes:
        write: Called on all ranks with the folder; returns what writes the files of this rank. It
            may use collectives, and then does not raise when this rank cannot write: what it
            returned does, so that no rank waits for another one.
        num_bytes: About how much all ranks write.
        source: What the folder is made from, for its manifest; that of the first rank counts.
        sources: Folders that are being read, which must stay as they are.
        folders: Folders in it that are there when `write` is called.
        finish: Called on the first rank with the folder when all ranks have written; does what
            needs the files of all of them, and returns records of those that it made.
    """

    write: Callable[[Path], Iterable[PendingFiles]]
    num_bytes: int
    source: Mapping[str, Any]
    sources: Sequence[Path] = ()
    folders: Sequence[str] = ()
    finish: Callable[[Path], Iterable[WrittenFile]] | None = None

    def __add__(self, other: Contents) -> Contents:
        """Both in one folder; that which is added last has nothing to finish."""
        assert other.finish is None, "only one of them can have it"
        return replace(
            self,
            write=lambda folder: [*self.write(folder), *other.write(folder)],
            num_bytes=self.num_bytes + other.num_bytes,
            source={**self.source, **other.source},
            sources=[*self.sources, *other.sources],
            folders=[*self.folders, *other.folders],
        )


def publish_folder(
    final: Path, contents: Contents, *, world: World, exist_ok: bool = False
) -> None:
    """Writes a folder on all ranks, and gives it its name when all are done.

    Args:
        final: Its name.
        contents: What goes into it.
        world: This rank; every rank must call this.
        exist_ok: Whether a folder that is there and not empty gets the files, in the place of its
            weights. That is not one step: cut short, it leaves the folder incomplete.

    Raises:
        SaveError: It failed on a rank, with the path and the reason. All ranks raise.
    """
    staged = stage_folder(final, contents, world=world, exist_ok=exist_ok)
    try:
        of_ranks = agree(final, world, lambda: write_files(staged, contents.write(staged)))
        files = [file for of_rank in of_ranks for file in of_rank]

        def complete() -> None:
            if world.is_first_rank:
                complete_folder(staged, final, contents, files)

        agree(final, world, complete)
    except SaveError:
        discard(staged, world)
        raise


def stage_folder(final: Path, contents: Contents, *, world: World, exist_ok: bool = False) -> Path:
    """Makes the hidden folder that all ranks write into; all ranks call it.

    Raises:
        SaveError: There is no room, or the name is taken. All ranks raise.
    """

    def stage() -> Path | None:
        if not world.is_first_rank:
            return None
        _check_free(final, contents.sources, exist_ok)
        return _stage(final, contents)

    staged = agree(final, world, stage)[0]
    assert staged is not None
    return staged


def write_files(staged: Path, pending: Iterable[PendingFiles]) -> list[WrittenFile]:
    """Writes the files of this rank; they are on disk then."""
    files = [file for write in pending for file in write()]
    for file in files:
        flush(staged / file.name)
    return files


def complete_folder(
    staged: Path, final: Path, contents: Contents, files: Sequence[WrittenFile]
) -> None:
    """Gives a folder its name; on the first rank, when all files of all ranks are on disk.

    Everything before the rename is on disk; everything after it can be lost and made again.
    """
    made = write_files(staged, [lambda: contents.finish(staged)]) if contents.finish else []
    write_manifest(staged, [*files, *made], source=contents.source)
    for folder, _, _ in os.walk(staged, topdown=False):
        flush(Path(folder))
    if final.is_dir() and any(final.iterdir()):
        _move_into(staged, final)
    else:
        staged.rename(final)
    flush(final.parent)


def discard(staged: Path, world: World) -> None:
    """Removes what was written of a folder that will not be complete."""
    if world.is_first_rank:
        shutil.rmtree(staged, ignore_errors=True)


def agree(final: Path, world: World, work: Callable[[], T]) -> list[T]:
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


def _stage(final: Path, contents: Contents) -> Path:
    """Makes the hidden folder to write into."""
    make_folder(final.parent)
    free = shutil.disk_usage(final.parent).free
    if contents.num_bytes > free:
        raise ValueError(f"it needs about {contents.num_bytes} bytes, and {free} are free")
    staged = final.parent / f".{final.name}{STAGED}{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for name in contents.folders:
        (staged / name).mkdir()
    return staged


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
        flush(Path(folder))


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


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small text file so that a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}{STAGED}{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, whose names outlive a power cut; it may be there.

    Raises:
        OSError: It cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        flush(folder.parent)


def flush(path: Path) -> None:
    """Waits until the bytes of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
