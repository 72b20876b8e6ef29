"""Gathering and reduce-scattering give what gloo gives, and also take parts that differ in size."""

import pytest
import torch
import torch.distributed as dist

from mtrain.parallel import ParallelLayout
from mtrain.platform.cpu_collectives import (
    all_gather,
    gather_parts,
    reduce_scatter,
    reduce_scatter_parts,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="they are for ranks on CPUs")


def numbers(rank, size, dtype):
    """Of this rank; integers, so that no order of additions rounds."""
    return (torch.arange(size * 3) % 7 + rank).to(dtype).view(size, 3)


def compare_with_gloo(state, dtype, is_async):
    group, ranks = state.groups.tp, state.layout.tp_size
    part, whole = numbers(state.world.rank, 2, dtype), numbers(state.world.rank, 2 * ranks, dtype)
    theirs = whole.new_empty(whole.shape), part.new_empty(part.shape)
    dist.all_gather_into_tensor(theirs[0], part, group=group)
    dist.reduce_scatter_tensor(theirs[1], whole.clone(), group=group)
    ours = whole.new_empty(whole.shape), part.new_empty(part.shape)
    works = [
        all_gather(ours[0], part, group=group, async_op=is_async),
        reduce_scatter(ours[1], whole, group=group, async_op=is_async),
    ]
    for work in works:
        assert (work is not None) is is_async
        if is_async:
            work.wait()
    ours += gather_parts(part, group), reduce_scatter_parts(whole, group)
    return [torch.equal(*pair) for pair in zip(ours, theirs * 2, strict=True)]


@pytest.mark.parametrize(
    ("ranks", "dtype", "is_async"),
    [(2, torch.float32, False), (4, torch.bfloat16, True), (2, torch.int32, True)],
)
def test_equal_parts_are_those_of_gloo(ranks, dtype, is_async):
    layout = ParallelLayout(world_size=ranks, tp_size=ranks)
    assert run_ranks(layout, compare_with_gloo, dtype, is_async) == [[True] * 4] * ranks


def exchange_uneven(state, sizes):
    rank, group = state.world.rank, state.groups.tp
    whole = numbers(rank, sum(sizes), torch.float32)
    part = numbers(rank, sizes[rank], torch.float32)
    return gather_parts(part, group, sizes), reduce_scatter_parts(whole, group, sizes)


@pytest.mark.parametrize("sizes", [[3, 1], [0, 4], [2, 0, 1, 5]])
def test_parts_may_differ_in_size_and_be_empty(sizes):
    ranks = range(len(sizes))
    layout = ParallelLayout(world_size=len(sizes), tp_size=len(sizes))
    gathered = torch.cat([numbers(rank, sizes[rank], torch.float32) for rank in ranks])
    total = sum(numbers(rank, sum(sizes), torch.float32) for rank in ranks)
    for rank, (whole, part) in enumerate(run_ranks(layout, exchange_uneven, sizes)):
        assert torch.equal(whole, gathered)
        assert torch.equal(part, total.split(sizes)[rank])


def exchange_alone(state):
    rows = torch.ones(3, 2)
    return [f(rows, state.groups.tp) is rows for f in (gather_parts, reduce_scatter_parts)]


def test_one_rank_keeps_what_it_has():
    assert run_ranks(ParallelLayout(), exchange_alone) == [[True, True]]


def replaced(state):
    from megatron.core.tensor_parallel import layers, mappings

    pairs = [
        (layers.dist_all_gather_func, all_gather),
        (layers.dist_reduce_scatter_func, reduce_scatter),
        (mappings.dist_all_gather_func, all_gather),
        (mappings._gather_along_first_dim, gather_parts),
        (mappings._reduce_scatter_along_first_dim, reduce_scatter_parts),
    ]
    return [theirs is ours for theirs, ours in pairs]


def test_megatron_core_asks_them():
    assert run_ranks(ParallelLayout(), replaced) == [[True] * 5]
