import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.random_state import random_states, reseed, set_random_states
from tests.ranks import run_ranks


def draw() -> list[float]:
    """Numbers that are the same on tensor-parallel ranks, and others that are not."""
    numbers = torch.rand(3).tolist()
    with get_cuda_rng_tracker().fork():
        return numbers + torch.rand(3).tolist()


def go_back(state: ParallelState) -> tuple[list[float], list[float], list[float], list[float]]:
    draw()
    states = random_states()
    first = draw()
    saved = {name: value.clone() for name, value in states.items()}
    second = draw()
    set_random_states(saved)
    again = draw()
    reseed(7)
    return first, second, again, draw()


def test_random_numbers_go_on_where_the_states_were_read():
    """T10: in both kinds of random numbers, on each rank."""
    ranks = run_ranks(ParallelLayout(world_size=2, tp_size=2), go_back)
    for first, second, again, reseeded in ranks:
        assert again == first
        assert second != first
        assert reseeded not in (first, second)
    assert ranks[0][0][:3] == ranks[1][0][:3]
    assert ranks[0][0][3:] != ranks[1][0][3:]


def refuse(state: ParallelState) -> str:
    states = random_states()
    states["gpu"] = states.pop("cpu")
    with pytest.raises(ValueError) as caught:
        set_random_states(states)
    return str(caught.value)


def test_states_of_another_kind_of_device_are_refused():
    [message] = run_ranks(ParallelLayout(), refuse)
    assert "--no_load_rng true" in message
