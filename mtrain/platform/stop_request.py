"""Whether training was asked to save and end.

The one thing to know: a signal sets a number here and changes nothing else, so it may come at any
time, in a step or in a save. The training loop looks at it between two steps, together with all
other ranks, because it may have come to one of them alone.
"""

from __future__ import annotations

import signal
from pathlib import Path

from mtrain.platform.node_notes import NodeNotes
from mtrain.platform.signals import Repeats, SignalWatch, end_process

__all__ = ["StopRequest"]


class StopRequest:
    """While this context is open, SIGTERM and SIGUSR1 are requests; a second one ends the process.

    The process that started the ranks asks in the folder that they share (`mtrain.cli.launch`). A
    signal that comes after another rank of this node failed is torchrun's, which ends those that
    remain: it is obeyed at once.

    Attributes:
        requested: The number of the signal, or 0 as long as there was none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Installs nothing yet.

        Args:
            folder: Folder that the processes of this node share (`Placement.failure_folder`).
        """
        self.requested = 0
        self._notes = NodeNotes(folder)
        self._repeats = Repeats()
        self._watch = SignalWatch(
            in_thread=self._note_signal,
            each_second=None if folder is None else self._look_into_folder,
        )

    def __enter__(self) -> StopRequest:
        self._watch.__enter__()
        self._notes.note_training()
        return self

    def __exit__(self, *error: object) -> None:
        self._notes.forget_training()
        self._watch.__exit__(*error)

    def _note_signal(self, signum: int) -> None:
        name = signal.Signals(signum).name
        if self._notes.has_failed():
            end_process(signum, f"ended by {name} after another rank failed")
        if self._repeats.is_second():
            end_process(signum, f"ended at once by a second {name}")
        self.requested = self.requested or signum

    def _look_into_folder(self) -> None:
        asked = 0 if self.requested else self._notes.asked_to_stop()
        if asked:
            # So that a copy of the signal that went to the launcher is not taken for a second one.
            self._repeats.note_first()
            self.requested = asked
