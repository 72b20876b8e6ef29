import importlib.util
import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from mtrain.parallel import Coordinates, ParallelLayout, initialize_world
from tests.ranks import run_ranks

LAYOUTS = [
    ParallelLayout(world_size=4, tp_size=2),
    ParallelLayout(world_size=4, pp_size=2, tp_size=2, ep_size=2),
    ParallelLayout(world_size=4, tp_size=2, ep_size=2, etp_size=2),
    ParallelLayout(world_size=4, tp_size=4, ep_size=2, etp_size=1),
    ParallelLayout(world_size=4, pp_size=2, vpp_size=2, ep_size=2),
]


def megatron_coordinates(state):
    from megatron.core import parallel_state as mpu

    return state.coordinates, Coordinates(
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        cp_rank=mpu.get_context_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        etp_rank=mpu.get_expert_tensor_parallel_rank(),
        ep_rank=mpu.get_expert_model_parallel_rank(),
        edp_rank=mpu.get_expert_data_parallel_rank(),
    )


def what_a_rank_sees(state):
    engine = importlib.util.find_spec("transformer_engine")
    return os.environ.get("CUDA_VISIBLE_DEVICES"), state.device.type, dist.get_backend(), engine


def test_ranks_of_tests_are_those_of_a_cpu_on_any_machine():
    (seen,) = run_ranks(ParallelLayout(), what_a_rank_sees)
    assert seen == ("", "cpu", "gloo", None)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_agree_with_megatron(layout):
    for ours, megatron in run_ranks(layout, megatron_coordinates):
        assert ours == megatron


def test_every_rank_has_its_own_coordinates():
    layout = ParallelLayout(world_size=64, tp_size=4, pp_size=2, ep_size=8, cp_size=2)
    dense = {
        (c.tp_rank, c.cp_rank, c.dp_rank, c.pp_rank) for c in map(layout.coordinates, range(64))
    }
    expert = {
        (c.etp_rank, c.ep_rank, c.edp_rank, c.pp_rank) for c in map(layout.coordinates, range(64))
    }
    assert len(dense) == len(expert) == 64
    assert layout.dp_size == 4
    assert layout.edp_size == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world_size": 4, "tp_size": 3}, "4 ranks cannot be divided by tensor"),
        ({"world_size": 4, "ep_size": 8}, "expert tensor x expert x pipeline"),
        ({"world_size": 2, "vpp_size": 2}, "virtual pipeline size 2 needs"),
    ],
)
def test_layout_refuses_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        ParallelLayout(**sizes)


def one_rank_fails_while_the_other_waits(state):
    if state.rank == 1:
        raise KeyError("the real reason")
    torch.distributed.all_reduce(torch.zeros(1))


def test_the_pool_shows_the_first_real_traceback_soon():
    start = time.monotonic()
    with pytest.raises(AssertionError, match="the real reason"):
        run_ranks(ParallelLayout(world_size=2), one_rank_fails_while_the_other_waits)
    assert time.monotonic() - start < 20


def test_ranks_that_do_not_meet_are_told_where(monkeypatch):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        port = str(nobody_listens.getsockname()[1])
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        message = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: rank 1 does not meet the others"
        with pytest.raises(RuntimeError, match=f"^{message}: "):
            initialize_world(size=2, rank=1, timeout_seconds=1)
