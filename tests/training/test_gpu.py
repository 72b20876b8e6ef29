"""What optimizers remember, on a GPU."""

from pathlib import Path

import pytest
import torch

from mtrain.config.optimizer import OptimizerConfig
from mtrain.parallel import (
    ParallelLayout,
    destroy_parallel,
    destroy_world,
    initialize_parallel,
    initialize_world,
)
from mtrain.training.optimizer_state import (
    MAIN,
    optimizer_progress,
    parameter_states,
    restore_progress,
)
from tests.tiny import make_checkpoint
from tests.training.rig import Rig, documents, make_rig, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KINDS = (MAIN, "exp_avg", "exp_avg_sq")
NARROW = OptimizerConfig(
    lr=1e-3,
    lr_decay_style="constant",
    use_precision_aware_optimizer=True,
    exp_avg_dtype="bf16",
    exp_avg_sq_dtype="bf16",
)
WIDE = OptimizerConfig(lr=1e-3, lr_decay_style="constant")


@pytest.fixture
def state():
    world = initialize_world()
    yield initialize_parallel(ParallelLayout(), world)
    destroy_parallel()
    destroy_world()


def remembered(rig: Rig) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (one.name, kind): one.read(kind).clone()
        for one in parameter_states(rig.chunks, rig.optimizer)
        for kind in KINDS
    }


@pytest.mark.parametrize("settings", [WIDE, NARROW], ids=["float32", "bfloat16 moments"])
def test_what_is_remembered_is_restored_bit_for_bit(state, tmp_path, settings):
    """T10 on a GPU: the step after it has the same weights, main parameters and moments."""
    folder = make_checkpoint(Path(tmp_path) / "qwen3", "qwen3")
    batches = [rows([document]) for document in documents(4)]
    rig = make_rig(state, folder, dtype=torch.bfloat16, optimizer=settings)
    for number in (1, 2):
        rig.step(batches, number)
    saved, progress = remembered(rig), optimizer_progress(rig.optimizer)
    assert progress.num_updates == 2
    other = make_rig(state, folder, dtype=torch.bfloat16, optimizer=settings)
    names = {n: p for chunk in other.chunks for n, p in chunk.module.module.named_parameters()}
    theirs = {n: p for chunk in rig.chunks for n, p in chunk.module.module.named_parameters()}
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(theirs[name])
    for one in parameter_states(other.chunks, other.optimizer):
        for kind in KINDS:
            one.write(kind, saved[one.name, kind].clone())
    restore_progress(other.optimizer, progress)
    assert all(torch.equal(remembered(other)[key], saved[key]) for key in saved)
    results = [each.step(batches, 3) for each in (rig, other)]
    assert results[0].grad_norm == results[1].grad_norm
    after, expected = remembered(other), remembered(rig)
    assert all(torch.equal(after[key], expected[key]) for key in expected)
    assert all(torch.equal(other.weights()[key], weight) for key, weight in rig.weights().items())


def test_gradients_are_clipped_whatever_holds_them(state, tmp_path):
    """Their norm is far above the limit, so weights that were not clipped would be others."""
    folder = make_checkpoint(Path(tmp_path) / "qwen3", "qwen3")
    batches = [rows([document]) for document in documents(4)]
    moments = []
    for settings in (WIDE, NARROW):
        rig = make_rig(state, folder, dtype=torch.bfloat16, optimizer=settings)
        assert rig.step(batches).grad_norm > 3
        moments.append(torch.cat([v for (_, k), v in remembered(rig).items() if k == "exp_avg"]))
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-2, atol=1e-6)
