"""Notes that the processes of a run on one node leave each other, as names of empty files.

The one thing to know: a note is in the name alone, so it is there whole or not at all. Ranks have
no pipe to the process that started them (it may be a torchrun), but all know this folder.
It may not exist: then there are no notes, and none are left.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NodeNotes"]

_FIRST_FAILURE = "first_failure"
_PREPARED = "prepared-"
_PREPARING = "preparing-"
_STOP = "stop-"
_STOPPED = "stopped-"
_TRAINING = "training-"


@dataclass(frozen=True, slots=True)
class NodeNotes:
    """The folder that all processes of this node share; None where there is none."""

    path: Path | None

    def claim_failure(self) -> bool:
        """Whether this process is the first of its node to fail; creating a file decides."""
        if self.path is None:
            return True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path / _FIRST_FAILURE, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:
            # A full or read-only disk must not hide the error.
            return True
        return True

    def note_preparing(self) -> None:
        """Says that this process prepares what the ranks of this node wait for."""
        self._leave(f"{_PREPARING}{os.getpid()}")

    def is_preparing(self) -> bool:
        """Whether the process that said so is still there."""
        return any(_is_alive(int(pid)) for pid in self._names(_PREPARING))

    def note_prepared(self, key: str) -> None:
        """Says that all is prepared, and what the data are called."""
        self._leave(f"{_PREPARED}{key}")

    def prepared(self) -> str | None:
        """What the prepared data are called; None while they are not there yet."""
        return next(iter(self._names(_PREPARED)), None)

    def ask_to_stop(self, signum: int) -> None:
        """Asks the ranks of this node, which look once a second, to save and end."""
        self._leave(f"{_STOP}{signum}")

    def asked_to_stop(self) -> int:
        """The signal for which the ranks were asked to stop, or 0."""
        return self._number_of(_STOP)

    def note_stopped(self, signum: int) -> None:
        """Says that a rank saved and ended because of a signal."""
        self._leave(f"{_STOPPED}{signum}")

    def stopped_by(self) -> int:
        """The signal because of which a rank saved and ended, or 0."""
        return self._number_of(_STOPPED)

    def note_training(self) -> None:
        """Says that this process can be asked to stop from now on."""
        self._leave(f"{_TRAINING}{os.getpid()}")

    def forget_training(self) -> None:
        """Says that this process is done with training."""
        if self.path is not None:
            (self.path / f"{_TRAINING}{os.getpid()}").unlink(missing_ok=True)

    def is_training(self) -> bool:
        """Whether a rank of this node can be asked to stop."""
        return bool(self._names(_TRAINING))

    def has_failed(self) -> bool:
        """Whether a rank of this node reported a failure, or is gone in the middle of training."""
        if self._names(_FIRST_FAILURE):
            return True
        return not all(_is_alive(int(pid)) for pid in self._names(_TRAINING))

    def _leave(self, name: str) -> None:
        # Whoever made the folder removes it when the run ends, maybe just now.
        with contextlib.suppress(OSError):
            if self.path is not None and self.path.is_dir():
                (self.path / name).touch()

    def _number_of(self, prefix: str) -> int:
        return max(map(int, self._names(prefix)), default=0)

    def _names(self, prefix: str) -> list[str]:
        """What follows the prefix in the names that begin with it."""
        if self.path is None:
            return []
        try:
            names = os.listdir(self.path)
        except OSError:
            return []
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
