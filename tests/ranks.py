"""A pool of gloo ranks for tests: real processes, started once, one thread each.

`run_ranks(layout, function, *args)` runs `function(state, *args)` on every rank of a layout and
returns the results in rank order. The function must live at the top level of a module. When ranks
fail, the first real traceback is raised, not those of the ranks that lost their peer.
"""

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mtrain.parallel import ParallelLayout

TIMEOUT_SECONDS = 60
_PRELOAD = ["torch", "transformers", "tests.ranks_preload"]


@dataclass(frozen=True, slots=True)
class _Failure:
    time: float
    text: str


@dataclass(slots=True)
class _Worker:
    process: Any
    connection: Connection


class RankPool:
    """Processes that wait for work; as many as the largest layout asked for so far."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._workers: list[_Worker] = []

    def run(self, layout: ParallelLayout, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs `function(state, *args)` on every rank; results in rank order.

        Raises:
            AssertionError: A rank failed or did not answer within 60 s.
        """
        while len(self._workers) < layout.world_size:
            self._workers.append(self._start())
        workers = self._workers[: layout.world_size]
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder, "store")
            for rank, worker in enumerate(workers):
                worker.connection.send((layout, rank, store, function, args))
            answers = self._collect(workers)
        failures = [answer for answer in answers if isinstance(answer, _Failure)]
        if failures:
            self.close()
            raise AssertionError(min(failures, key=lambda failure: failure.time).text)
        return answers

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
        self._workers.clear()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        return _Worker(process, ours)

    def _collect(self, workers: list[_Worker]) -> list[Any]:
        answers: list[Any] = [None] * len(workers)
        waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                text = f"ranks {sorted(waiting.values())} did not answer in {TIMEOUT_SECONDS} s"
                for rank in waiting.values():
                    answers[rank] = _Failure(time.time(), text)
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank] = _Failure(time.time(), f"rank {rank} died without a traceback")
            if any(isinstance(answer, _Failure) for answer in answers):
                # The others wait in a collective for the rank that failed; give them no time.
                deadline = min(deadline, time.monotonic() + 2)
        return answers


_POOL = RankPool()


def run_ranks(layout: ParallelLayout, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs `function(state, *args)` on every rank of the layout in the shared pool."""
    return _POOL.run(layout, function, *args)


def close_pool() -> None:
    """Ends the shared pool; conftest calls it after the last test."""
    _POOL.close()


def _serve(connection: Connection) -> None:
    import torch

    from mtrain.parallel import destroy_parallel, initialize_parallel

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        layout, rank, store, function, args = connection.recv()
        try:
            state = initialize_parallel(
                layout, rank=rank, store_file=store, timeout_seconds=TIMEOUT_SECONDS
            )
            result = function(state, *args)
            destroy_parallel()
        except BaseException:
            result = _Failure(time.time(), f"rank {rank} of {layout}:\n{traceback.format_exc()}")
        with contextlib.suppress(BrokenPipeError):
            connection.send(result)
