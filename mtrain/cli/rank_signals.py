"""What the process that started the ranks does with SIGTERM and SIGUSR1.

The one thing to know: the first signal is a request to the ranks, through the folder that they look
into, and this process waits for them as long as they need to save. Only while no rank is training,
when there is nothing to save, or for a second signal, are they ended.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from mtrain.platform.node_notes import NodeNotes
from mtrain.platform.signals import EndedBySignal, Repeats, SignalWatch

__all__ = ["RankSignals"]


class RankSignals:
    """Context in which signals to this process are for the ranks.

    Attributes:
        ended_by: Says which signal ended the ranks, and whether at once; None if none did.
    """

    def __init__(self, notes: NodeNotes, *, end_ranks: Callable[[int], NoReturn]) -> None:
        """Installs nothing yet.

        Args:
            notes: Those of the run.
            end_ranks: Called in the main thread with the signal that the ranks are to get; leaves
                what the main thread is doing.
        """
        self.ended_by: EndedBySignal | None = None
        self._notes = notes
        self._end_ranks = end_ranks
        self._repeats = Repeats()
        self._watch = SignalWatch(in_main=self._pass_on)

    def __enter__(self) -> RankSignals:
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)

    def _pass_on(self, signum: int) -> None:
        is_first = not self._repeats.has_first
        if self._repeats.is_second():
            self.ended_by = EndedBySignal(signum, at_once=True)
            self._end_ranks(signal.SIGKILL)
        if not is_first:
            return
        if self._notes.is_training():
            self._notes.ask_to_stop(signum)
            name = signal.Signals(signum).name
            sys.stderr.write(
                f"megatron: {name}: saving after this step; a second signal ends at once\n"
            )
            return
        # For the ranks to leave the one line about it to this process.
        self._notes.claim_failure()
        self.ended_by = EndedBySignal(signum)
        self._end_ranks(signal.SIGTERM)
