"""Signals in processes of their own: what they end, and what they must not reach."""

import os
import signal
import subprocess
import sys

import pytest

from mtrain.platform import signals
from mtrain.platform.signals import Repeats, SignalWatch, signal_exit_code, signal_of_exit_code

# Tells the test when it is ready for a signal, and waits without sleeping through one.
START = """
import ctypes, os, signal, sys, threading
from mtrain.platform import signals
from mtrain.platform.signals import EndedBySignal, SignalWatch, end_on_signals

def ready():
    print("ready", flush=True)

def wait_in_c():
    # A mutex that is locked twice: the main thread never comes back, whatever signals there are.
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    # The other thread can run, and say so, only once the main thread is inside C.
    sys.setswitchinterval(1000)
    gate = threading.Event()
    threading.Thread(target=lambda: gate.wait() and ready(), daemon=True).start()
    gate.set()
    libc.pthread_mutex_lock(mutex)
"""


def start(body: str) -> subprocess.Popen[str]:
    """Starts Python code and returns once it said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", START + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    # Not `communicate`, which forgets what was read ahead with the first lines.
    code = process.wait(timeout=60)
    return code, process.stdout.read(), process.stderr.read()


@pytest.mark.parametrize("signum", signals.STOP_SIGNALS)
def test_the_first_signal_undoes_what_is_half_done(signum: signal.Signals) -> None:
    process = start("""
try:
    with end_on_signals():
        try:
            ready()
            while True:
                signal.pause()
        finally:
            print("undone", flush=True)
except EndedBySignal as error:
    print(error, error.signum, error.at_once)
    sys.exit(signals.signal_exit_code(error.signum))
""")
    process.send_signal(signum)
    code, out, err = finish(process)
    assert (code, out.splitlines()) == (
        128 + signum,
        ["undone", f"{signum.name} {int(signum)} False"],
    )
    assert err == ""


def test_a_main_thread_inside_c_is_ended_too() -> None:
    process = start("""
signals.PATIENCE_SECONDS = 0.2
with end_on_signals():
    wait_in_c()
""")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143
    assert err == "megatron: ended by SIGTERM inside a long call\n"


def test_a_second_signal_ends_the_cleaning_up() -> None:
    process = start("""
with end_on_signals():
    try:
        ready()
        while True:
            signal.pause()
    finally:
        signals.COPY_SECONDS = 0
        print("cleaning", flush=True)
        wait_in_c()
""")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "cleaning\n"
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    code, _, err = finish(process)
    assert code == 138
    assert err == "megatron: ended at once by a second SIGUSR1\n"


def test_a_signal_to_a_forked_child_does_not_reach_the_parent() -> None:
    """Pools end their workers with SIGTERM; those have the handlers and the pipe of the parent."""
    process = start("""
heard = []
read, write = os.pipe()
with SignalWatch(in_thread=heard.append):
    child = os.fork()
    if not child:
        os.write(write, b"x")
        signal.alarm(60)
        signal.pause()
    os.read(read, 1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
ready()
print(os.waitstatus_to_exitcode(status), heard)
""")
    assert finish(process)[:2] == (0, "-15 []\n")


def test_contexts_nest_and_leave_nothing_behind() -> None:
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    outer: list[int] = []
    inner: list[int] = []
    with SignalWatch(in_main=outer.append):
        with SignalWatch(in_main=inner.append):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert (outer, inner) == ([signal.SIGTERM], [signal.SIGUSR1])
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before
    fd = signal.set_wakeup_fd(-1)
    assert fd == -1


def test_copies_of_a_signal_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    repeats = Repeats()
    assert not repeats.has_first
    assert [repeats.is_second() for _ in range(3)] == [False, False, False]
    assert repeats.has_first
    monkeypatch.setattr(signals, "COPY_SECONDS", 0.0)
    assert repeats.is_second()


def test_exit_codes_of_signals_are_those_of_a_shell() -> None:
    assert signal_exit_code(signal.SIGTERM) == 143
    assert [signal_of_exit_code(code) for code in (143, 138, 0, 1, 137)] == [15, 10, 0, 0, 0]
