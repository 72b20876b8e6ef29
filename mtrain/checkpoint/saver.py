"""Saves the checkpoints of a run, at once or while training goes on.

The one thing to know: whoever writes talks to nobody. The main threads gather what each rank
writes; files are then written without collectives, by a thread in an asynchronous save; and all
ranks agree in their main threads, between two steps, that every file is on disk. Only then does the
checkpoint get its name.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mtrain.bridge.safetensors_writer import DeferredWriter, OpenFile, ThreadedWriter
from mtrain.bridge.written import WrittenFile
from mtrain.checkpoint.folder import (
    Contents,
    PendingFiles,
    SaveError,
    agree,
    complete_folder,
    discard,
    stage_folder,
    write_files,
)
from mtrain.checkpoint.run_folder import Retention, name_latest, remove_surplus
from mtrain.parallel import World

__all__ = ["SaveReport", "Saver"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """A checkpoint that was published.

    Attributes:
        folder: The checkpoint.
        num_bytes: Size of the files that the ranks wrote; what the first one makes of them, such as
            the file of an adapter, is not counted.
        blocked_seconds: How long training stood still.
        total_seconds: From the call to the name.
    """

    folder: Path
    num_bytes: int
    blocked_seconds: float
    total_seconds: float


class Saver:
    """Saves checkpoints of one run, one at a time.

    Args:
        run: Folder of the run.
        world: This rank.
        retention: Which older checkpoints are deleted after a save.
        is_async: Whether training goes on while files are written.
        report: Called on every rank when a checkpoint got its name.
        fail: Called on every rank with the error of a save that failed; raises it, or does not.
    """

    def __init__(
        self,
        run: Path,
        *,
        world: World,
        retention: Retention,
        is_async: bool,
        report: Callable[[SaveReport], None],
        fail: Callable[[SaveError], None],
    ) -> None:
        self._run = run
        self._world = world
        self._retention = retention
        self._is_async = is_async
        self._report = report
        self._fail = fail
        # One thread, also in a synchronous save: the same code, and only one way to fail.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="mtrain-save")
        self._save: _Save | None = None

    @property
    def open_file(self) -> OpenFile:
        """What takes the tensors of a file, for the contents of `save`."""
        return DeferredWriter if self._is_async else ThreadedWriter

    def save(self, step: int, contents: Contents) -> None:
        """Saves `checkpoint-<step>`; every rank must call this.

        An asynchronous save returns when everything that is written is in memory of its own. It
        waits for the one before it.

        Args:
            step: Steps done.
            contents: What goes into the checkpoint.
        """
        self.wait()
        try:
            self._save = _Save(
                self._run / f"checkpoint-{step}",
                contents,
                world=self._world,
                name=functools.partial(self._name, step),
                executor=self._executor,
                is_async=self._is_async,
            )
        except SaveError as error:
            self._fail(error)
        if not self._is_async:
            self.wait()

    def _name(self, step: int) -> None:
        name_latest(self._run, step)
        remove_surplus(self._run, self._retention)

    @property
    def is_working(self) -> bool:
        """Whether this rank is still writing; `advance` has to wait for no rank if none is."""
        return self._save is not None and self._save.is_working

    @property
    def is_pending(self) -> bool:
        """Whether a save is not finished; the same on every rank."""
        return self._save is not None

    def advance(self) -> None:
        """Takes the save that is under way a step further; every rank must call this."""
        if self._save is None:
            return
        try:
            report = self._save.advance()
        except SaveError as error:
            self._save = None
            self._fail(error)
            return
        if report is not None:
            self._save = None
            self._report(report)

    def wait(self) -> None:
        """Waits for the save that is under way; every rank must call this."""
        while self._save is not None:
            self.advance()


class _Save:
    """One checkpoint on its way: its files are written, then it gets its name."""

    def __init__(
        self,
        final: Path,
        contents: Contents,
        *,
        world: World,
        name: Callable[[], None],
        executor: Executor,
        is_async: bool,
    ) -> None:
        self._started = time.monotonic()
        self._final = final
        self._contents = contents
        self._world = world
        self._name = name
        self._executor = executor
        self._num_bytes = 0
        self._is_written = False
        self._staged = stage_folder(final, contents, world=world)
        pending: list[PendingFiles] = []
        try:
            agree(final, world, lambda: pending.extend(contents.write(self._staged)))
        except SaveError:
            discard(self._staged, world)
            raise
        self._work = executor.submit(lambda: write_files(self._staged, pending))
        self._blocked = time.monotonic() - self._started if is_async else None

    @property
    def is_working(self) -> bool:
        """Whether this rank has not done its part of what is under way."""
        return not self._work.done()

    def advance(self) -> SaveReport | None:
        """Waits for what is under way on all ranks, and begins what comes next."""
        try:
            answers = agree(self._final, self._world, self._work.result)
        except SaveError:
            discard(self._staged, self._world)
            raise
        if not self._is_written:
            self._is_written = True
            files = [file for of_rank in answers for file in of_rank]
            self._num_bytes = sum(file.num_bytes for file in files)
            self._work = self._executor.submit(lambda: self._complete(files))
            return None
        total = time.monotonic() - self._started
        return SaveReport(
            folder=self._final,
            num_bytes=self._num_bytes,
            blocked_seconds=total if self._blocked is None else self._blocked,
            total_seconds=total,
        )

    def _complete(self, files: Sequence[WrittenFile]) -> list[WrittenFile]:
        if self._world.is_first_rank:
            complete_folder(self._staged, self._final, self._contents, files)
            self._name()
        return []
