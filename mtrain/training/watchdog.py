"""Ends a run in which nothing happens any more, and says where every rank was.

The one thing to know: each rank watches itself, so that all of them show their stacks; which one
the others waited for can be read from those. A step, an evaluation or a save must end within the
timeout, the first step with all that is compiled in it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["EXIT_HANG", "Watchdog"]

# As timeout(1).
EXIT_HANG = 124

# Steps end on all ranks at about the same time. Whoever ends first makes torchrun end the others.
SECONDS_FOR_OTHERS = 5.0
# Beyond the timeout, for the watching thread to get the interpreter.
FALLBACK_SECONDS = 60.0
# What a pipe takes in one piece (PIPE_BUF), so that lines of two ranks are not mixed.
_PIECE_BYTES = 4096


class Watchdog:
    """While this context is open, the process ends when `beat` is not called for too long.

    Then the stacks of all its threads go to stderr, every line with the rank, and the exit code is
    124. It works while the main thread waits in a collective or for the GPU. If a thread keeps the
    interpreter's lock, Python's faulthandler writes the stacks a minute later, and the code is 1.
    """

    def __init__(self, timeout_seconds: float, *, rank: int, descriptor: int = 2) -> None:
        """Starts nothing yet.

        Args:
            timeout_seconds: Longest time between two calls of `beat`; 0: watches nothing.
            rank: Global rank, for the report.
            descriptor: Where the report goes; stderr.
        """
        self._timeout = timeout_seconds
        self._rank = rank
        self._descriptor = descriptor
        self._last = (0.0, "")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mtrain-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat("start-up")
        if self._timeout:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timeout:
            self._closed.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, what: str) -> None:
        """Says that something was completed; costs nothing.

        Args:
            what: For the report, such as "step 12".
        """
        # One object, so that the thread never sees the time of one and the name of another.
        self._last = (time.monotonic(), what)

    def _watch(self) -> None:
        while True:
            faulthandler.dump_traceback_later(
                self._timeout + FALLBACK_SECONDS, exit=True, file=self._descriptor
            )
            remaining, what = self._remaining()
            if remaining <= 0:
                break
            # Not all of it at once: the fallback counts from the last time that this thread ran.
            if self._closed.wait(min(remaining, max(1.0, self._timeout / 4))):
                return
        self._write(self._report(what))
        time.sleep(SECONDS_FOR_OTHERS)
        os._exit(EXIT_HANG)

    def _remaining(self) -> tuple[float, str]:
        """Seconds until the end, and what was completed last."""
        beat, what = self._last
        return beat + self._timeout - time.monotonic(), what

    def _report(self, what: str) -> list[str]:
        lines = [
            f"nothing was completed for {self._timeout:g} s (--hang_timeout); the last was {what}; "
            "the process is ended; its threads, the innermost call last:",
            *_stacks(),
        ]
        return [f"[rank {self._rank}] {line}\n" for line in lines]

    def _write(self, lines: list[str]) -> None:
        piece = b""
        for line in (*(line.encode(errors="backslashreplace") for line in lines), b""):
            if not line or len(piece) + len(line) > _PIECE_BYTES:
                os.write(self._descriptor, piece)
                piece = b""
            piece += line


def _stacks() -> Iterator[str]:
    """Lines about all threads but this one, the main thread first.

    Source files are not read for it: the disk may be what hangs.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    main = threading.main_thread().ident
    for ident in sorted(frames, key=lambda ident: ident != main):
        if ident != threading.get_ident():
            yield f"thread {names.get(ident, ident)}:"
            yield from reversed(list(_calls(frames[ident])))


def _calls(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, {frame.f_code.co_name}'
        frame = frame.f_back
