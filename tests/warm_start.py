"""`megatron` without the wait: in forks of the process that has imported everything already.

`run_warm` does what a shell and the launcher do for a user: processes of their own for the command
and for each of its ranks, with the environment that ranks get, and a rendezvous. Only the
imports are inherited (`tests/ranks.py`); they take several times as long as a tiny run. How ranks
are really started is for the commands that `tests/machine.py` starts afresh.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

import tests.ranks  # noqa: F401  says what the fork server imports
from mtrain.cli.launch import Launch
from mtrain.platform.node_notes import NodeNotes

ROOT = Path(__file__).parents[1]
_FORK_SERVER = multiprocessing.get_context("forkserver")
_SECONDS_TO_END = 10


@dataclass(frozen=True, slots=True)
class Kill:
    """A signal for one of the ranks, some time after they were started.

    Attributes:
        rank: Which one.
        seconds: When.
        signum: The signal; after SIGKILL the other ranks are ended.
    """

    rank: int
    seconds: float
    signum: int = signal.SIGKILL


def run_warm(
    words: Sequence[str],
    environ: Mapping[str, str],
    *,
    timeout_seconds: int,
    kill: Kill | None = None,
) -> tuple[int, str]:
    """Runs `megatron WORDS...`.

    Returns:
        Exit code, and what all its processes wrote to standard error.

    Raises:
        AssertionError: It takes longer than the timeout.
    """
    deadline = time.monotonic() + timeout_seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = _run_processes([(list(words), dict(environ), folder)], deadline)
        if (folder / "launch").exists():
            num_ranks, rank_words = json.loads((folder / "launch").read_text())
            assert rank_words[:2] == ["-m", "mtrain.cli.main"], rank_words
            # Kept here, as a torchrun does, so that no port has to be found.
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            places = [
                {**environ, **_rank_variables(rank, num_ranks, store.port, folder)}
                for rank in range(num_ranks)
            ]
            jobs = [(rank_words[2:], place, folder) for place in places]
            code = _run_processes(jobs, deadline, kill=kill)
        return code, (folder / "stderr").read_text()


def _rank_variables(rank: int, num_ranks: int, port: int, folder: Path) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "MTRAIN_RUN_FOLDER": str(folder),
    }


def _run_processes(
    jobs: Sequence[tuple[Any, ...]], deadline: float, *, kill: Kill | None = None
) -> int:
    """Exit code of the first that fails, after which the others are ended; otherwise 0."""
    processes = [_FORK_SERVER.Process(target=_run, args=job) for job in jobs]
    for process in processes:
        process.start()
    timer = kill and threading.Timer(kill.seconds, _signal, (processes[kill.rank], kill.signum))
    if timer:
        timer.start()
    try:
        running = {process.sentinel: process for process in processes}
        while running:
            ready = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"{len(running)} processes did not end in time"
            for sentinel in ready:
                process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    return process.exitcode
        return 0
    finally:
        if timer:
            timer.cancel()
        for process in processes:
            process.terminate()
        for process in processes:
            # Whoever waits for a rank that was killed does not end in time, and is killed as well.
            process.join(_SECONDS_TO_END if kill is None else 1)
            process.kill()
            process.join()


def _signal(process: Any, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signum)


def _run(words: list[str], environ: dict[str, str], folder: Path) -> None:
    from mtrain.cli import main

    def launch_ranks(
        launch: Launch, words: Sequence[str], prepare: Callable[[], str | None]
    ) -> int:
        NodeNotes(folder).note_prepared(prepare() or "")
        (folder / "launch").write_text(json.dumps([launch.nproc_per_node, list(words)]))
        return 0

    os.environ.clear()
    os.environ.update(environ)
    os.chdir(ROOT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    main.launch_ranks = launch_ranks
    try:
        code = main.main(words)
    except Exception:
        # Ranks replace it; it then ends the process.
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.exit(code)
