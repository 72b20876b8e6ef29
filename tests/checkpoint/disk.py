"""A disk under watch: the process can end at any change of it, and its power can fail.

The one thing to know: every call of Python that changes a folder passes by, a write of a file as
one change. A process that ended makes no change any more, also not to clean up: what is left is
what SIGKILL leaves. `PowerCut` then says what may be left when the machine loses its power as well:
of a file what was flushed, or more; of a folder the names that were flushed, or those of the end.
"""

import builtins
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock


class Killed(BaseException):
    """The process is gone."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the disk: mkdir, create, write, flush, rename, unlink or rmdir; or a note."""

    kind: str
    path: Path
    target: Path | None = None
    data: bytes = b""


class WatchedDisk:
    """While it is entered, sees all changes below a folder.

    Args:
        root: The folder.
        end_at: Number of the change, from 1, that is not made any more because the process ends.
        is_cut: Whether half of it is made, if it is a write.
    """

    def __init__(self, root: Path, *, end_at: int | None = None, is_cut: bool = False) -> None:
        self.changes: list[Change] = []
        self.ended_at: Change | None = None
        self.root = root
        self._end_at = end_at
        self._is_cut = is_cut
        self._stack = ExitStack()
        self._lock = threading.RLock()

    def __enter__(self) -> "WatchedDisk":
        for name, kind in (("mkdir", "mkdir"), ("rmdir", "rmdir")):
            self._patch(os, name, self._of_path(kind, getattr(os, name)))
        for name in ("unlink", "remove"):
            self._patch(os, name, self._of_path("unlink", getattr(os, name)))
        for name in ("rename", "replace"):
            self._patch(os, name, self._renaming(getattr(os, name)))
        self._patch(os, "fsync", self._flush)
        opening = self._opening(io.open)
        self._patch(io, "open", opening)
        self._patch(builtins, "open", opening)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _patch(self, owner: object, name: str, function: Callable) -> None:
        self._stack.enter_context(mock.patch.object(owner, name, function))

    def note(self, text: str, path: Path) -> None:
        """Remembers when something happened that is no change."""
        self.changes.append(Change(text, path))

    def make(self, change: Change, act: Callable[[bytes], Any]) -> Any:
        """Makes a change, unless the process has ended before."""
        with self._lock:
            if self.ended_at is not None:
                raise Killed
            if len(self.changes) + 1 == self._end_at:
                self.ended_at = change
                if self._is_cut and change.kind == "write":
                    act(change.data[: len(change.data) // 2])
                raise Killed
            result = act(change.data)
            self.changes.append(change)
            return result

    def _of_path(self, kind: str, real: Callable) -> Callable:
        def call(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> None:
            place = absolute(path, dir_fd)
            act = lambda _: real(path, *args, dir_fd=dir_fd, **kwargs)  # noqa: E731
            return self.make(Change(kind, place), act) if self._sees(place) else act(b"")

        return call

    def _renaming(self, real: Callable) -> Callable:
        def call(path: Any, target: Any) -> None:
            change = Change("rename", absolute(path), absolute(target))
            assert self._sees(change.path) == self._sees(change.target)
            if not self._sees(change.path):
                return real(path, target)
            return self.make(change, lambda _: real(path, target))

        return call

    def _flush(self, descriptor: int) -> None:
        # Not really: the tests end no machine.
        self.make(Change("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))), lambda _: None)

    def _opening(self, real: Callable) -> Callable:
        def call(
            path: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *args: Any
        ) -> Any:
            is_path = not isinstance(path, int)
            if not is_path or not set(mode) & set("wxa+") or not self._sees(absolute(path)):
                return real(path, mode, buffering, encoding, *args)
            assert mode.strip("bt") in ("w", "x"), "no other is used"
            place = absolute(path)
            create = lambda _: _Raw(self, place, mode.strip("bt"))  # noqa: E731
            raw = self.make(Change("create", place), create)
            if buffering == 0:
                return raw
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, *args)

        return call

    def _sees(self, path: Path) -> bool:
        return path.is_relative_to(self.root)


class _Raw(io.FileIO):
    """A new file whose writes are changes."""

    def __init__(self, disk: WatchedDisk, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._disk = disk
        self._place = path

    def write(self, data: Any) -> int:
        return self._disk.make(Change("write", self._place, data=bytes(data)), super().write)


def absolute(path: Any, dir_fd: int | None = None) -> Path:
    folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return Path(folder, os.fsdecode(path))


@dataclass(eq=False, slots=True)
class _File:
    content: bytes = b""
    flushed: bytes | None = None


@dataclass(eq=False, slots=True)
class _Folder:
    depth: int
    entries: dict[str, "_File | _Folder"] = field(default_factory=dict)
    flushed: dict[str, "_File | _Folder"] = field(default_factory=dict)


# Paths below the root; folders have no bytes.
Tree = dict[str, bytes | None]


class PowerCut:
    """What a disk that was empty may hold after a power cut.

    Args:
        root: The folder that was watched, which is there for good.
        num_outer: Levels of folders that hold others; names in those below them are lost, or not,
            apart from theirs.
    """

    def __init__(self, root: Path, *, num_outer: int) -> None:
        self._root = root
        self._num_outer = num_outer
        self._top = _Folder(0)

    def apply(self, change: Change) -> None:
        """Makes a change."""
        folder = self._folder(change.path.parent)
        name = change.path.name
        assert change.kind != "create" or name not in folder.entries, "made anew, not emptied"
        if change.kind == "mkdir":
            folder.entries[name] = _Folder(folder.depth + 1)
        elif change.kind == "create":
            folder.entries[name] = _File()
        elif change.kind == "write":
            folder.entries[name].content += change.data
        elif change.kind in ("unlink", "rmdir"):
            del folder.entries[name]
        elif change.kind == "rename":
            target = self._folder(change.target.parent)
            target.entries[change.target.name] = folder.entries.pop(name)
        elif change.kind == "flush":
            node = self._top if change.path == self._root else folder.entries[name]
            if isinstance(node, _File):
                node.flushed = node.content
            else:
                node.flushed = dict(node.entries)

    def _folder(self, path: Path) -> _Folder:
        folder = self._top
        if path != self._root.parent:
            for name in path.relative_to(self._root).parts:
                folder = folder.entries[name]
        return folder

    def trees(self) -> Iterator[Tree]:
        """What may be left, at the extremes."""
        for outer, inner, part in product((False, True), (False, True), (0.0, 0.5, 1.0)):
            yield dict(self._left(self._top, "", outer, inner, part))

    def _left(
        self, folder: _Folder, prefix: str, outer: bool, inner: bool, part: float
    ) -> Iterator[tuple[str, bytes | None]]:
        is_kept = outer if folder.depth < self._num_outer else inner
        for name, node in sorted((folder.entries if is_kept else folder.flushed).items()):
            path = f"{prefix}{name}"
            if isinstance(node, _Folder):
                yield path, None
                yield from self._left(node, f"{path}/", outer, inner, part)
            elif node.flushed is not None:
                yield path, node.flushed
            else:
                yield path, node.content[: int(part * len(node.content))]


def write_tree(tree: Tree, folder: Path) -> None:
    """Makes a folder of what is left."""
    folder.mkdir()
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def read_tree(folder: Path) -> Tree:
    """What is in a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }
