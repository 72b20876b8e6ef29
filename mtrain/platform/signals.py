"""SIGTERM and SIGUSR1 (Slurm's usual warning), noticed even while the main thread waits inside C.

The one thing to know: Python runs signal handlers in the main thread, between two bytecodes; one
that waits in a collective for a rank that is gone never runs them. So a thread listens as well: the
interpreter's own handler, in C, writes the number of the signal to a pipe that the thread reads.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

__all__ = [
    "STOP_SIGNALS",
    "EndedBySignal",
    "Repeats",
    "SignalWatch",
    "end_on_signals",
    "end_process",
    "signal_exit_code",
    "signal_of_exit_code",
]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# For a main thread that has to react but is inside a long call; data preparation has calls of a
# second or two.
PATIENCE_SECONDS = 5.0
COPY_SECONDS = 1.0
_POLL_SECONDS = 1.0

# Those whose handlers are installed, for the children of a fork.
_installed: list[SignalWatch] = []


def signal_exit_code(signum: int) -> int:
    """What the process ends with: 143 for SIGTERM, 138 for SIGUSR1, as shells count it."""
    return 128 + signum


def signal_of_exit_code(code: int) -> int:
    """The signal that an exit code stands for; 0 if it is another code."""
    return next((number for number in STOP_SIGNALS if signal_exit_code(number) == code), 0)


class EndedBySignal(BaseException):
    """A signal ends the process; not an Exception, because nobody may go on after it.

    Attributes:
        signum: The signal.
        at_once: Whether it was the second one, so that nothing was saved for it.
    """

    def __init__(self, signum: int, *, at_once: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.at_once = at_once


class Repeats:
    """Tells a second signal from a copy of the first one.

    `timeout` and systemd signal a process and then its whole group; Slurm may signal a launcher and
    its ranks. What comes within a second is the same request.
    """

    def __init__(self) -> None:
        self._first: float | None = None

    @property
    def has_first(self) -> bool:
        """Whether there was a request."""
        return self._first is not None

    def note_first(self) -> None:
        """Says that there was a request, if it is the first."""
        if self._first is None:
            self._first = time.monotonic()

    def is_second(self) -> bool:
        """To be called for each signal: whether it is a request after the first one."""
        now = time.monotonic()
        self.note_first()
        return now - self._first >= COPY_SECONDS


class SignalWatch:
    """While this context is open, SIGTERM and SIGUSR1 call functions instead of ending the process.

    Contexts nest: the innermost one counts. They are opened and closed in the main thread.
    """

    def __init__(
        self,
        *,
        in_thread: Callable[[int], None] | None = None,
        in_main: Callable[[int], None] | None = None,
        each_second: Callable[[], None] | None = None,
    ) -> None:
        """Installs nothing yet.

        Args:
            in_thread: Called with the signal in the listening thread, whatever the main thread is
                doing.
            in_main: Called in the main thread, where it may raise. If the main thread does not get
                there within a few seconds, the process is ended.
            each_second: Called in the listening thread.
        """
        self._in_thread = in_thread
        self._in_main = in_main
        self._each_second = each_second
        self._has_main_reacted = False

    def __enter__(self) -> SignalWatch:
        self._read, self._write = os.pipe()
        # Wanted by `set_wakeup_fd`: a handler must not wait.
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._listen, name="mtrain-signals", daemon=True)
        self._thread.start()
        self._outer_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._outer = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        _installed.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._outer.items():
            # None: one that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._outer_fd)
        _installed.remove(self)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self._has_main_reacted = True
        if self._in_main is not None:
            self._in_main(signum)

    def _listen(self) -> None:
        period = None if self._each_second is None else _POLL_SECONDS
        while True:
            ready, _, _ = select.select([self._read], [], [], period)
            if self._each_second is not None:
                self._each_second()
            for number in os.read(self._read, 64) if ready else b"":
                if number == 0:
                    return
                if number in STOP_SIGNALS:
                    self._react(number)

    def _react(self, signum: int) -> None:
        if self._in_thread is not None:
            self._in_thread(signum)
        if self._in_main is None:
            return
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._has_main_reacted:
            if time.monotonic() > deadline:
                end_process(signum, f"ended by {signal.Signals(signum).name} inside a long call")
            time.sleep(0.05)


@contextlib.contextmanager
def end_on_signals() -> Iterator[None]:
    """Lets the first signal raise `EndedBySignal` and a second one end the process at once.

    For all that has nothing to save: what is half done is undone on the way out. Outside the main
    thread, where Python installs no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    repeats = Repeats()
    is_raised = False

    def end(signum: int) -> None:
        nonlocal is_raised
        if not is_raised:
            is_raised = True
            raise EndedBySignal(signum)

    def end_second(signum: int) -> None:
        if repeats.is_second():
            end_process(signum, f"ended at once by a second {signal.Signals(signum).name}")

    with SignalWatch(in_main=end, in_thread=end_second):
        yield


def end_process(signum: int, reason: str) -> NoReturn:
    """Ends this process now, from any thread, without running anything else."""
    # To the descriptor: the main thread may hold the lock of sys.stderr.
    os.write(2, f"megatron: {reason}\n".encode())
    os._exit(signal_exit_code(signum))


def _forget_after_fork() -> None:
    # The child has the handlers and the pipe of its parent: a signal to the child would seem to the
    # parent to be one to itself. It does not have the thread.
    if _installed:
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _installed.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
