"""The watchdog in processes that hang: in a collective, in Python, and with the interpreter."""

import ctypes
import multiprocessing
import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tests.ranks  # noqa: F401  (its fork server has imported everything)
from mtrain.training import watchdog
from mtrain.training.watchdog import EXIT_HANG, Watchdog

CONTEXT = multiprocessing.get_context("forkserver")


def run_processes(function, *arguments: tuple, timeout: float = 60) -> list[int | None]:
    """Runs a function in one process for each tuple of arguments; their exit codes."""
    processes = [CONTEXT.Process(target=function, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def fall_asleep() -> None:
    while True:
        time.sleep(1000)


def hang(rank: int, folder: Path) -> None:
    """Two ranks of which one never comes to the collective."""
    watchdog.SECONDS_FOR_OTHERS = 0.5
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    report = os.open(folder / "report", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    with Watchdog(1, rank=rank, descriptor=report) as watching:
        torch.distributed.barrier()
        watching.beat("step 12")
        if rank == 1:
            fall_asleep()
        torch.distributed.all_reduce(torch.ones(1))


def test_all_ranks_say_where_they_are_and_end(tmp_path: Path) -> None:
    """T31."""
    assert run_processes(hang, (0, tmp_path), (1, tmp_path)) == [EXIT_HANG, EXIT_HANG]
    lines = (tmp_path / "report").read_text().splitlines()
    assert all(line.startswith(("[rank 0] ", "[rank 1] ")) for line in lines)
    for rank, place in ((0, "all_reduce"), (1, "fall_asleep")):
        mine = [line.removeprefix(f"[rank {rank}] ") for line in lines if f"[rank {rank}]" in line]
        assert "nothing was completed for 1 s (--hang_timeout); the last was step 12" in mine[0]
        # The main thread first, its innermost call last.
        assert mine[1] == "thread MainThread:"
        stack = [line for line in mine[2:] if "File" in line]
        others = [number for number, line in enumerate(mine) if line.startswith("thread")]
        innermost = mine[others[1] - 1] if len(others) > 1 else stack[-1]
        assert innermost.endswith(f", {place}")
        assert not any("mtrain-watchdog" in line for line in mine)


def test_what_is_completed_starts_the_time_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now))
    with Watchdog(600, rank=0) as watching:
        now = 590.0
        assert watching._remaining() == (10, "start-up")
        watching.beat("step 1")
        assert watching._remaining() == (600, "step 1")
        now = 1200.0
        assert watching._remaining()[0] < 0


def test_nothing_is_watched_after_the_end() -> None:
    before = threading.active_count()
    with Watchdog(600, rank=0):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def keep_interpreter(folder: Path) -> None:
    watchdog.FALLBACK_SECONDS = 0.5
    report = os.open(folder / "report", os.O_CREAT | os.O_WRONLY)
    with Watchdog(1, rank=0, descriptor=report):
        # Called with the interpreter's lock, so no other thread runs any more.
        libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)


def test_a_thread_that_keeps_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    assert run_processes(keep_interpreter, (tmp_path,)) == [1]
    report = (tmp_path / "report").read_text()
    assert "Timeout" in report
    assert "in keep_interpreter" in report


def test_zero_watches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", pytest.fail)
    with Watchdog(0, rank=0) as watching:
        watching.beat("step 1")


def test_a_long_report_is_cut_between_lines(tmp_path: Path) -> None:
    """Pieces of a few kilobytes reach a pipe whole, so lines of two ranks are not mixed."""
    read, write = os.pipe()
    lines = [f"[rank 0] {number} {'x' * 90}\n" for number in range(100)]
    Watchdog(0, rank=0, descriptor=write)._write(lines)
    os.close(write)
    with open(read) as file:
        assert file.readlines() == lines
