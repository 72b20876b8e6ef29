"""The ranks of this node as processes: started, watched, and ended together.

The one thing to know: ranks get the variables that torchrun would give them and meet by themselves
(`mtrain.parallel.initialize_world`), so this process needs no torch. They are sessions of their
own: what a terminal sends comes to this process alone, which decides.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import NoReturn, Self

__all__ = ["EndRanks", "RankProcesses", "end_on_hangup"]

_SECONDS_TO_END = 10
_POLL_SECONDS = 0.05


class EndRanks(BaseException):
    """Raised by handlers of signals to leave whatever waits for the ranks.

    Attributes:
        signum: What the ranks are to get.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class RankProcesses:
    """A context in which ranks run; none is left behind when it ends."""

    def __init__(self, words: Sequence[str], environs: Sequence[Mapping[str, str]]) -> None:
        """Starts nothing yet.

        Args:
            words: What each rank runs, as after `python`.
            environs: The environment of each rank of this node.
        """
        self._command = [sys.executable, "-u", *words]
        self._environs = environs
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self.end, signal.SIGKILL)
            for environ in self._environs:
                process = subprocess.Popen(
                    self._command, env=environ, stdin=subprocess.DEVNULL, start_new_session=True
                )
                self._processes.append(process)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def first_failure(self) -> tuple[int, int] | None:
        """Waits until all have ended well or one has not.

        Returns:
            Place in this node and exit code of the one that failed first; of several that did
            within a moment, one that was killed, because the others fail for the lack of it.
        """
        while True:
            codes = [process.poll() for process in self._processes]
            failed = [(code, place) for place, code in enumerate(codes) if code]
            if failed:
                code, place = min(failed)
                return place, code
            if None not in codes:
                return None
            time.sleep(_POLL_SECONDS)

    def end(self, signum: int) -> None:
        """Ends the ranks that still run: by a signal, and by force if they take too long."""
        for process in self._processes:
            process.send_signal(signum)
        deadline = time.monotonic() + _SECONDS_TO_END
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def end_on_hangup() -> Iterator[None]:
    """Lets a closed terminal or SIGQUIT end the ranks, unless they are ignored, as by `nohup`."""

    def end(signum: int, _frame: FrameType | None) -> NoReturn:
        raise EndRanks(signum)

    before = {
        number: signal.signal(number, end)
        for number in (signal.SIGHUP, signal.SIGQUIT)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
