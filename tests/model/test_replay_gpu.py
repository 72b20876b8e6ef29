"""Replayed layers with CUDA graphs, on both backends. Runs where there is a GPU."""

import pytest
import torch

from mtrain.model.replay import why_not_replayed
from mtrain.parallel import (
    ParallelLayout,
    destroy_parallel,
    destroy_world,
    initialize_parallel,
    initialize_world,
)
from mtrain.platform.cuda_graphs import graph_recorder
from mtrain.platform.device import has_transformer_engine
from tests.adapters import plan_of
from tests.megatron import load_model
from tests.replays import compare
from tests.tiny import TINY, make_checkpoint

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("error:layers could not be recorded"),
]
NO_TE = pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")
BACKENDS = ["torch", pytest.param("te", marks=NO_TE)]
# Heads for which there are kernels of ours.
LARGE_HEADS = {"qwen3": 64, "qwen3_moe": 128}


@pytest.fixture(scope="module")
def state():
    # Sums in one order: torch's flash attention adds gradients of queries up as they come.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield initialize_parallel(ParallelLayout(), initialize_world())
    torch.use_deterministic_algorithms(False)
    destroy_parallel()
    destroy_world()


def replayed(state, folder, backend, **options) -> list[str]:
    [model] = load_model(state, folder, dtype=torch.bfloat16, backend=backend)
    if reason := why_not_replayed(model):
        pytest.skip(reason)
    record = graph_recorder()
    return compare(state, folder, record, dtype=torch.bfloat16, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(TINY))
def test_training_is_the_same_bit_for_bit(name, backend, state, tmp_path):
    sizes = {"head_dim": LARGE_HEADS[name]} if name in LARGE_HEADS else {}
    folder = make_checkpoint(tmp_path, name, hidden_size=128, moe_intermediate_size=64, **sizes)
    assert replayed(state, folder, backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", LARGE_HEADS)
def test_training_of_an_adapter_is_the_same_bit_for_bit(name, dropout, backend, state, tmp_path):
    sizes = {"head_dim": LARGE_HEADS[name], "moe_intermediate_size": 64}
    folder = make_checkpoint(tmp_path, name, hidden_size=128, **sizes)
    options = {"lora": plan_of(folder)[1], "dropout": dropout}
    assert replayed(state, folder, backend, **options) == []
