"""Where the time from the command to the end of the first step goes.

The one thing to know: phases follow each other without a gap, from the start of the first process
(its interpreter included), so they sum up to the whole. Times are those of the monotonic clock,
which all processes of a machine share.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["StartClock", "process_began"]


class StartClock:
    """Measures the phases of a start, one after the other."""

    def __init__(self, launcher_began: float | None = None) -> None:
        """Begins with the process; what its launcher did before is the first phase.

        Args:
            launcher_began: When the process that started this rank began; None if nobody did.
        """
        began = process_began()
        self._began = began if launcher_began is None else launcher_began
        self._last = self._began
        self._phases: dict[str, float] = {}
        if launcher_began is not None:
            self._add("checks", began)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase, in order."""
        return dict(self._phases)

    @property
    def total(self) -> float:
        """Seconds of all phases together."""
        return self._last - self._began

    def end_phase(self, name: str) -> None:
        """Counts the time since the end of the phase before; a phase may have several parts."""
        self._add(name, time.monotonic())

    def line(self) -> str:
        """What a user is told."""
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._phases.items())
        return f"first step after {self.total:.1f} s: {phases}"

    def record(self) -> dict[str, float]:
        """The same for the log file."""
        phases = {
            f"start_{name.replace(' ', '_')}_seconds": seconds
            for name, seconds in self._phases.items()
        }
        return {"seconds_to_first_step": self.total, **phases}

    def _add(self, name: str, now: float) -> None:
        self._phases[name] = self._phases.get(name, 0.0) + now - self._last
        self._last = now


def process_began() -> float:
    """When this process was started; now, where the system does not say.

    Source: proc(5). Field 22 of /proc/self/stat is the start, in ticks since the machine booted.
    """
    now = time.monotonic()
    path = Path("/proc/self/stat")
    if not path.is_file():
        return now
    # Behind the name of the program, which is in parentheses and may hold anything.
    fields = path.read_text().rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return now - max(0.0, age)
