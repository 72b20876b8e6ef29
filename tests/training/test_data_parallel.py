"""Main gradients that are written over instead of added to zeros."""

from pathlib import Path

import pytest
import torch

from mtrain.config.parallel import ParallelConfig
from mtrain.config.training import TrainingConfig
from mtrain.model.build import fuse_weight_gradients
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.step import run_schedule
from mtrain.training.wrap import unwrap, wrap_chunks
from tests.megatron import load_model
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import documents, packed

RECOMPUTED = TrainingConfig(
    recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
)
CASES = {
    "dense": ("qwen3", ParallelLayout(), TrainingConfig(), torch.float32),
    "tied, bf16": ("qwen3_tied", ParallelLayout(), TrainingConfig(), torch.bfloat16),
    "latent attention, experts": ("deepseek_v3", ParallelLayout(), RECOMPUTED, torch.float32),
    "delta net": ("qwen3_next_moe", ParallelLayout(), TrainingConfig(), torch.float32),
    "biases": ("gpt2", ParallelLayout(), TrainingConfig(), torch.float32),
    "dp2": ("qwen2_moe", ParallelLayout(world_size=2), TrainingConfig(), torch.bfloat16),
    "pp2 vpp2": (
        *("qwen3", ParallelLayout(world_size=2, pp_size=2, vpp_size=2), TrainingConfig()),
        torch.float32,
    ),
    "tp2": ("qwen3", ParallelLayout(world_size=2, tp_size=2), TrainingConfig(), torch.float32),
}


def gradients(
    state: ParallelState, folder: Path, case: str, *, overwrites: bool
) -> tuple[dict[str, torch.Tensor], int]:
    """Main gradients of two micro-batches after what was in them before, and how many are marked.

    The first chunk has one more weight, which no micro-batch uses.
    """
    *_, training, dtype = CASES[case]
    bare = load_model(state, folder, training=training, dtype=dtype)
    unused = torch.nn.Parameter(torch.zeros(3, 5, dtype=dtype))
    unused.can_overwrite_main_grad = True
    bare[0].decoder.register_parameter("unused", unused)
    fuse_weight_gradients(bare)
    marked = [p for c in bare for p in c.parameters() if hasattr(p, "can_overwrite_main_grad")]
    for parameter in marked:
        parameter.can_overwrite_main_grad = overwrites
    parallel = ParallelConfig(overlap_grad_reduce=False)
    chunks = wrap_chunks(bare, parallel=parallel, grad_reduce_in_fp32=True)
    for chunk in chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            buffer.grad_data.fill_(torch.nan)
        chunk.zero_grad_buffer()
    batches = [packed(documents(3, seed=seed), length=64) for seed in (1, 2)]
    run_schedule(chunks, batches, scale=torch.tensor(1.0), forward_only=False)
    names = ((f"{i}.{n}", p) for i, c in enumerate(chunks) for n, p in unwrap(c).named_parameters())
    return {name: p.main_grad.clone() for name, p in names}, len(marked) - 1


def compare(state: ParallelState, folder: Path, case: str) -> tuple[list[str], int]:
    """Names of gradients that differ from those that were added to zeros."""
    expected, _ = gradients(state, folder, case, overwrites=False)
    found, num_marked = gradients(state, folder, case, overwrites=True)
    assert found["0.decoder.unused"].count_nonzero() == 0
    assert any(grad.count_nonzero() > 0 for grad in found.values())
    return [name for name in expected if not torch.equal(found[name], expected[name])], num_marked


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_that_were_added_to_zeros(case, tmp_path):
    name, layout, _, _ = CASES[case]
    folder = make_checkpoint(tmp_path, name)
    for differing, num_marked in run_ranks(layout, compare, folder, case):
        assert differing == []
        assert (num_marked > 0) is (layout.tp_size == 1)


def through_autograd(state: ParallelState, folder: Path) -> bool:
    """A weight that something else reads than its linear gets all of its gradient."""
    found = []
    for overwrites in (False, True):
        bare = load_model(state, folder)
        weight = bare[0].decoder.layers[1].mlp.linear_fc2.weight
        weight.can_overwrite_main_grad = overwrites
        [chunk] = wrap_chunks(bare, parallel=ParallelConfig(), grad_reduce_in_fp32=True)
        for _ in range(2):
            chunk.zero_grad_buffer()
            batches = [packed(documents(3, seed=seed)) for seed in (1, 2)]
            run_schedule([chunk], batches, scale=torch.tensor(1.0), forward_only=False)
        found.append(weight.main_grad.clone())
    return torch.equal(*found)


def test_a_gradient_from_autograd_is_added_to_zeros(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3")
    assert run_ranks(ParallelLayout(), through_autograd, folder) == [True]


def left_alone(state: ParallelState, folder: Path) -> list[bool]:
    """Whether the gradient of a weight reached its main gradient: watched, and left."""
    found = []
    for leaves in (False, True):
        bare = load_model(state, folder)
        weight = bare[0].decoder.layers[1].mlp.linear_fc2.weight
        [chunk] = wrap_chunks(bare, parallel=ParallelConfig(), grad_reduce_in_fp32=True)
        if leaves:
            chunk.leave([weight])
        chunk.zero_grad_buffer()
        batches = [packed(documents(3))]
        run_schedule([chunk], batches, scale=torch.tensor(1.0), forward_only=False)
        found.append(bool(weight.main_grad.any()))
    return found


def test_gradients_of_parameters_that_it_leaves_are_left_to_others(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3")
    assert run_ranks(ParallelLayout(), left_alone, folder) == [[True, False]]
