"""Recorded work for a GPU; the second test runs where there is one."""

import contextlib

import pytest
import torch

from mtrain.platform.cuda_graphs import graph_recorder


def test_recordings_share_memory_and_other_threads_may_go_on(monkeypatch) -> None:
    calls = []

    class Graph:
        def replay(self) -> str:
            return "replayed"

    @contextlib.contextmanager
    def graph(graph, **options):
        calls.append(options)
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    record, worked = graph_recorder(), []
    for number in range(2):
        assert record(lambda number=number: worked.append(number))() == "replayed"
    assert worked == [0, 1]
    assert calls == [{"pool": "pool", "capture_error_mode": "thread_local"}] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_work_is_done_when_it_is_repeated_and_not_before() -> None:
    record = graph_recorder()
    source, total = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    repeat = record(lambda: total.add_(source * 2))
    assert not total.any()
    repeat()
    source.fill_(3)
    repeat()
    assert torch.equal(total, torch.full_like(total, 8))
