import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mtrain.parallel import ParallelLayout
from mtrain.platform.cpu_speed import (
    _unless_alone,
    keep_freed_memory,
    leave_out_the_compiler,
    swiglu_gradient,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize("grad_dtype", [torch.float64, torch.float32])
def test_gradient_of_swiglu_is_the_one_of_the_formula(grad_dtype):
    torch.manual_seed(0)
    hidden = torch.randn(5, 2, 24, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 2, 12, dtype=grad_dtype)
    gate, up = hidden.chunk(2, dim=-1)
    (F.silu(gate) * up).backward(grad.double())
    result = swiglu_gradient(grad, hidden.detach())
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, hidden.grad, rtol=1e-12, atol=1e-12)
    kept = swiglu_gradient(grad, hidden.detach(), F.silu(gate.detach()))
    assert torch.equal(kept, result)


def test_freed_memory_can_be_kept_more_than_once():
    keep_freed_memory()
    keep_freed_memory()
    assert torch.zeros(2**24).sum() == 0


def test_optimizers_do_not_import_the_compiler(monkeypatch):
    # Importing what is None there fails.
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    asking = torch.optim.Optimizer.add_param_group.__wrapped__
    monkeypatch.delattr(asking, "__dynamo_disable", raising=False)
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ImportError):
        torch.optim.AdamW([weight])
    leave_out_the_compiler()
    optimizer = torch.optim.AdamW([weight])
    optimizer.zero_grad()
    assert optimizer.param_groups[0]["params"][0] is weight


class Group:
    def __init__(self, size):
        self.members = size

    def size(self):
        return self.members


@pytest.mark.parametrize(
    ("size", "is_in_place", "options", "is_called"),
    [
        (1, True, {}, False),
        (1, True, {"async_op": False}, False),
        (1, True, {"async_op": True}, True),
        (1, False, {}, True),
        (2, True, {}, True),
    ],
)
def test_only_a_collective_in_place_without_others_is_left_out(
    size, is_in_place, options, is_called
):
    calls = []
    collective = _unless_alone(lambda *_args, **_options: calls.append(1))
    own = torch.ones(3)
    collective(own if is_in_place else torch.ones(3), own, group=Group(size), **options)
    assert bool(calls) == is_called


def num_threads_of_gloo():
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("gloo_tcp") for name in names)


def groups_of_one_rank(state):
    before = num_threads_of_gloo()
    groups = [dist.new_subgroups(1)[0] for _ in range(5)]
    sums = torch.tensor([1.0 + state.world.rank])
    for group in groups:
        dist.all_reduce(sums, group=group)
        dist.barrier(group=group)
    own = sums.item()
    dist.all_reduce(sums)
    return own, sums.item(), num_threads_of_gloo() - before


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_groups_of_one_rank_share_a_thread():
    results = run_ranks(ParallelLayout(world_size=2), groups_of_one_rank)
    for rank, (own, total, more_threads) in enumerate(results):
        assert (own, total) == (1.0 + rank, 3.0)
        assert more_threads == 0
