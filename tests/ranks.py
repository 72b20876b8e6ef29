"""Gloo ranks for tests: real processes, one thread each, forked from one that imported it all.

`run_ranks(layout, function, *args)` runs `function(state, *args)` on every rank of a layout and
returns the results in rank order. The function must live at the top level of a module. When ranks
fail, the first real traceback is raised, not those of the ranks that lost their peer.

Every job has fresh ranks, which a fork makes cheap: Megatron-Core's data-parallel wrapper is in a
cycle with autograd hooks and never goes away, nor do its process groups, of which each with several
ranks has a thread that wakes a hundred times a second. Ranks that served many tests slowed down all
others.
"""

import contextlib
import gc
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
_PRELOAD = ["tests.ranks_without_gpu", "torch", "transformers", "tests.ranks_preload"]


@dataclass(frozen=True, slots=True)
class _Failure:
    time: float
    text: str


@dataclass(frozen=True, slots=True)
class _Rank:
    process: Any
    connection: Connection


_FORK_SERVER = multiprocessing.get_context("forkserver")
_FORK_SERVER.set_forkserver_preload(_PRELOAD)


def run_ranks(layout: ParallelLayout, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs `function(state, *args)` on every rank of a layout; results in rank order.

    Raises:
        AssertionError: A rank failed or did not answer within 60 s.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        ranks = [_start(layout, rank, store, function, args) for rank in range(layout.world_size)]
        try:
            answers = _collect(ranks)
        finally:
            for rank in ranks:
                rank.process.kill()
            for rank in ranks:
                rank.process.join()
    failures = [answer for answer in answers if isinstance(answer, _Failure)]
    if failures:
        raise AssertionError(min(failures, key=lambda failure: failure.time).text)
    return answers


def _start(layout: ParallelLayout, rank: int, *job: Any) -> _Rank:
    ours, theirs = _FORK_SERVER.Pipe()
    process = _FORK_SERVER.Process(target=_serve, args=(theirs, layout, rank, *job), daemon=True)
    process.start()
    theirs.close()
    return _Rank(process, ours)


def _collect(ranks: list[_Rank]) -> list[Any]:
    answers: list[Any] = [None] * len(ranks)
    waiting = {rank.connection: index for index, rank in enumerate(ranks)}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            text = f"ranks {sorted(waiting.values())} did not answer in {TIMEOUT_SECONDS} s"
            for index in waiting.values():
                answers[index] = _Failure(time.time(), text)
            break
        for connection in ready:
            index = waiting.pop(connection)
            try:
                answers[index] = connection.recv()
            except EOFError:
                answers[index] = _Failure(time.time(), f"rank {index} died without a traceback")
        if any(isinstance(answer, _Failure) for answer in answers):
            # The others wait in a collective for the rank that failed; give them no time.
            deadline = min(deadline, time.monotonic() + 2)
    return answers


def _serve(
    connection: Connection,
    layout: ParallelLayout,
    rank: int,
    store: Path,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch

    from mtrain.parallel import initialize_parallel, initialize_world

    torch.set_num_threads(1)
    # A rank ends long before its garbage matters; looking for it takes a twentieth of its time.
    gc.set_threshold(100_000)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        world = initialize_world(
            size=layout.world_size, rank=rank, store_file=store, timeout_seconds=TIMEOUT_SECONDS
        )
        # Groups are not taken apart, which would be a third of a small job: the process is killed.
        result = function(initialize_parallel(layout, world), *args)
    except BaseException:
        result = _Failure(time.time(), f"rank {rank} of {layout}:\n{traceback.format_exc()}")
    with contextlib.suppress(BrokenPipeError, EOFError):
        connection.send(result)
        # Tensors are fetched out of this process, so it stays until it is ended.
        connection.recv()
