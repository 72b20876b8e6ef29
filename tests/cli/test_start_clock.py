"""The phases of a start; in a real run in tests/test_end_to_end.py."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtrain.cli import start_clock
from mtrain.cli.start_clock import StartClock, process_began

ROOT = Path(__file__).parents[2]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still; the process began at 100."""
    clock = [100.0]
    monkeypatch.setattr(start_clock, "process_began", lambda: 100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def test_phases_follow_each_other_and_sum_up(now: list[float]) -> None:
    clock = StartClock()
    for name, moment in (("checks", 100.5), ("data", 103.0), ("checks", 103.25), ("step", 110.0)):
        now[0] = moment
        clock.end_phase(name)
    assert clock.phases == {"checks": 0.75, "data": 2.5, "step": 6.75}
    assert clock.total == sum(clock.phases.values()) == 10
    assert clock.line() == "first step after 10.0 s: checks 0.8, data 2.5, step 6.8"


def test_a_rank_counts_from_the_start_of_its_launcher(now: list[float]) -> None:
    clock = StartClock(launcher_began=98.5)
    now[0] = 104.0
    clock.end_phase("first step")
    assert clock.phases == {"checks": 1.5, "first step": 4.0}
    assert clock.record() == {
        "seconds_to_first_step": 5.5,
        "start_checks_seconds": 1.5,
        "start_first_step_seconds": 4.0,
    }


def test_the_start_of_the_interpreter_counts() -> None:
    code = "from mtrain.cli.start_clock import process_began; print(process_began())"
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # The system counts hundredths of seconds.
    assert before - 0.02 <= float(done.stdout) <= time.monotonic()


def test_without_proc_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _path: False)
    before = time.monotonic()
    assert before <= process_began() <= time.monotonic()
