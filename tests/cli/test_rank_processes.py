"""Ranks as processes, with nothing of mtrain in them; with it in test_launch.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtrain.cli.rank_processes import EndRanks, RankProcesses, end_on_hangup

SLEEP = "import time; time.sleep(60)"


def ranks(code: str, *numbers: int) -> RankProcesses:
    """Each runs the code, which finds its number in the environment."""
    environs = [{**os.environ, "NUMBER": str(number)} for number in numbers]
    return RankProcesses(["-c", f"import os; number = int(os.environ['NUMBER'])\n{code}"], environs)


def test_all_end_well() -> None:
    with ranks("assert number in (3, 4)", 3, 4) as running:
        assert running.first_failure() is None


def test_the_first_that_fails_is_named_and_the_others_are_ended() -> None:
    started = time.monotonic()
    with ranks(f"if number == 7: raise SystemExit(5)\n{SLEEP}", 0, 7, 0) as running:
        assert running.first_failure() == (1, 5)
        pids = [process.pid for process in running._processes]
    assert time.monotonic() - started < 30
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_that_was_killed_is_the_first_among_those_that_failed_together() -> None:
    with ranks("if number: os.kill(os.getpid(), 9)\nraise SystemExit(1)", 0, 1) as running:
        for process in running._processes:
            process.wait()
        assert running.first_failure() == (1, -signal.SIGKILL)


def test_who_does_not_obey_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mtrain.cli.rank_processes._SECONDS_TO_END", 0.5)
    deaf = f"import signal; signal.signal(15, signal.SIG_IGN); open('deaf', 'w').close()\n{SLEEP}"
    monkeypatch.chdir(tmp_path)
    with ranks(deaf, 0) as running:
        while not (tmp_path / "deaf").exists():
            time.sleep(0.02)
        running.end(signal.SIGTERM)
        assert running.first_failure() == (0, -signal.SIGKILL)


def test_an_error_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError), ranks(SLEEP, 0, 1) as running:
        raise KeyError
    assert [process.poll() for process in running._processes] == [-signal.SIGKILL] * 2


def test_a_program_that_cannot_be_started_leaves_nobody_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started, popen = [], subprocess.Popen

    def start(*words: object, **options: object) -> subprocess.Popen[bytes]:
        if started:
            raise OSError("no more processes")
        started.append(popen(*words, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="no more"), ranks(SLEEP, 0, 1):
        pass
    assert started[0].poll() == -signal.SIGKILL


@pytest.fixture
def not_ignored(signum: int) -> Iterator[None]:
    """The tests themselves may run under `nohup`."""
    before = signal.signal(signum, signal.SIG_DFL)
    yield
    signal.signal(signum, before)


@pytest.mark.usefixtures("not_ignored")
@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGQUIT])
def test_a_closed_terminal_ends_the_wait(signum: int) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(EndRanks) as ended, end_on_hangup():
        os.kill(os.getpid(), signum)
    assert ended.value.signum == signum
    assert signal.getsignal(signum) is before


def test_nohup_is_respected() -> None:
    code = (
        "import os, signal; from mtrain.cli.rank_processes import end_on_hangup\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with end_on_hangup(): os.kill(os.getpid(), signal.SIGHUP)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
