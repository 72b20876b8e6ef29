"""What is remembered of each parameter; saving and loading it is tested in tests/checkpoint."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mtrain.config.parallel import ParallelConfig
from mtrain.config.tuner import TunerConfig
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.optimizer_state import (
    MAIN,
    OptimizerProgress,
    optimizer_progress,
    parameter_states,
    restore_progress,
    trained_parameters,
)
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import documents, make_rig, rows

TWO = ParallelLayout(world_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("optimizer") / "qwen3", "qwen3")


def runs_of(
    state: ParallelState, folder: Path, is_sharded: bool, dtype: torch.dtype, ratio: float
) -> tuple[list[tuple], dict[tuple[int, str], int]]:
    rig = make_rig(
        state,
        folder,
        parallel=ParallelConfig(use_distributed_optimizer=is_sharded),
        dtype=dtype,
        tuner=TunerConfig(freeze_parameters_ratio=ratio),
    )
    trained = trained_parameters(rig.chunks)
    runs = []
    for one in parameter_states(rig.chunks, rig.optimizer):
        [parameter] = [p for p, place in trained.items() if place == (one.chunk, one.name)]
        main = one.read(MAIN)
        # The main parameter begins as the parameter, and is what a write changes.
        assert torch.equal(main, parameter.detach().float().flatten()[one.start : one.stop])
        assert not one.read("exp_avg").any()
        one.write("exp_avg", torch.full_like(main, 2.0))
        assert torch.equal(one.read("exp_avg"), torch.full_like(main, 2.0))
        runs.append((one.chunk, one.name, one.start, one.stop))
    return runs, {place: parameter.numel() for parameter, place in trained.items()}


@pytest.mark.parametrize("is_sharded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_every_trained_element_is_remembered_once(folder, is_sharded, dtype, ratio):
    """By one of the data-parallel ranks where they share, by each where they do not."""
    ranks = run_ranks(TWO, runs_of, folder, is_sharded, dtype, ratio)
    sizes = ranks[0][1]
    together = [[run for runs, _ in ranks for run in runs]]
    for runs in together if is_sharded else [runs for runs, _ in ranks]:
        found = {place: [] for place in sizes}
        for chunk, name, start, stop in runs:
            found[chunk, name].append((start, stop))
        for place, size in sizes.items():
            bounds = sorted(found[place])
            assert bounds[0][0] == 0
            assert bounds[-1][1] == size
            assert all(a[1] == b[0] for a, b in pairwise(bounds))


def count(state: ParallelState, folder: Path) -> tuple[OptimizerProgress, OptimizerProgress]:
    rig = make_rig(state, folder, dtype=torch.float16)
    batches = [rows([document]) for document in documents(4)[state.rank :: 2]]
    while optimizer_progress(rig.optimizer).num_updates < 2:
        rig.step(batches)
    before = optimizer_progress(rig.optimizer)
    fresh = make_rig(state, folder, dtype=torch.float16)
    for one in parameter_states(fresh.chunks, fresh.optimizer):
        one.read("exp_avg"), one.read("exp_avg_sq")
    restore_progress(fresh.optimizer, before)
    return before, optimizer_progress(fresh.optimizer)


def test_the_number_of_updates_and_the_loss_scale_are_restored(folder):
    """T10 for float16, whose first steps are skipped until the loss scale is low enough."""
    for before, after in run_ranks(TWO, count, folder):
        assert after == before
        assert before.num_updates == 2
        assert before.loss_scale["scale"] > 1
