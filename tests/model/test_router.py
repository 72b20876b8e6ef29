from functools import cache
from pathlib import Path

import pytest
import torch

from mtrain.config import MoEConfig, TunerConfig
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.balance import count_routers, take_side_losses
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import documents, make_rig, packed

ONE = ParallelLayout()
TENSOR = ParallelLayout(world_size=2, tp_size=2)
DATA = ParallelLayout(world_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("router") / "moe", "qwen3_moe")


def one_step(
    state: ParallelState, folder: Path, moe: MoEConfig, num_empty: int
) -> tuple[float, torch.Tensor]:
    """Gradient norm of a step on a padded pack and some of pure padding, and mean balance."""
    rig = make_rig(state, folder, moe=moe)
    batches = [packed(documents(2), length=24)]
    batches += [packed([], length=24)] * num_empty
    take_side_losses(state.device)
    grad_norm = rig.step(batches).grad_norm
    sums = take_side_losses(state.device)
    torch.distributed.all_reduce(sums)
    return grad_norm, sums / count_routers(rig.chunks) / state.layout.world_size


@cache
def one_step_of_one_rank(folder: Path, moe: MoEConfig) -> tuple[float, torch.Tensor]:
    """What the layouts are compared with, without empty batches."""
    [result] = run_ranks(ONE, one_step, folder, moe, 0)
    return result


# Large enough to rule the gradient.
LOSSES = {
    "z_loss": MoEConfig(moe_z_loss_coeff=1.0),
    "aux_loss": MoEConfig(moe_aux_loss_coeff=(10.0,)),
    "seq_aux_loss": MoEConfig(
        moe_router_load_balancing_type=("seq_aux_loss",), moe_aux_loss_coeff=(10.0,)
    ),
    "global_aux_loss": MoEConfig(
        moe_router_load_balancing_type=("global_aux_loss",), moe_aux_loss_coeff=(10.0,)
    ),
}
EACH_LOSS = pytest.mark.parametrize("moe", LOSSES.values(), ids=LOSSES.keys())


def biases_after_a_step(
    state: ParallelState, folder: Path, rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Biases that choose experts of the first such layer, before and after."""
    rig = make_rig(state, folder, moe=MoEConfig(moe_router_bias_update_rate=rate))
    [bias, *_] = [b for name, b in rig.chunks[0].named_buffers() if name.endswith("expert_bias")]
    before = bias.clone()
    made = documents(4)
    units = [packed(made[:2], length=24), packed(made[2:], length=32)]
    rig.step(units[state.coordinates.dp_rank :: state.layout.dp_size])
    return before, bias


@pytest.mark.parametrize("layout", [ONE, TENSOR, DATA], ids=["1", "tp2", "dp2"])
def test_biases_move_by_the_rate_and_alike_on_every_layout(layout, tmp_path):
    """Padding, which has a document of its own here, is not counted."""
    folder = make_checkpoint(tmp_path, "deepseek_v3")
    [(before, expected)] = run_ranks(ONE, biases_after_a_step, folder, 0.5)
    assert set((expected - before).abs().round(decimals=5).tolist()) <= {0.0, 0.5}
    assert not torch.equal(before, expected)
    for _, after in run_ranks(layout, biases_after_a_step, folder, 0.5):
        assert torch.equal(after, expected)


def changed_by_a_step(state: ParallelState, folder: Path, tuner: TunerConfig) -> dict[str, bool]:
    """Which weights of the expert layers a step changes."""
    rig = make_rig(state, folder, tuner=tuner)
    before = rig.weights()
    rig.step([packed(documents(4), length=64)])
    return {
        name: not torch.equal(before[name], weight)
        for name, weight in rig.weights().items()
        if ".mlp." in name
    }


def test_routers_can_be_frozen_alone(folder):
    frozen = TunerConfig(freeze_parameters_regex=r".*\.router\..*")
    [changed] = run_ranks(ONE, changed_by_a_step, folder, frozen)
    routers = {name for name in changed if ".router." in name}
    assert len(routers) == 4
    assert {name for name, is_changed in changed.items() if not is_changed} == routers
    [changed] = run_ranks(ONE, changed_by_a_step, folder, TunerConfig())
    assert all(changed.values())


def test_biases_stay_where_no_rate_is_given(tmp_path):
    folder = make_checkpoint(tmp_path, "deepseek_v3")
    [(before, after)] = run_ranks(ONE, biases_after_a_step, folder, 0.0)
    assert torch.equal(before, after)


@pytest.mark.parametrize("layout", [TENSOR, DATA], ids=["tp2", "dp2"])
@EACH_LOSS
def test_balance_does_not_depend_on_the_layout(folder, layout, moe):
    """T40: padding behind a pack, which lies on the last tensor rank; data ranks see the same."""
    expected_norm, expected = one_step_of_one_rank(folder, moe)
    without, _ = one_step_of_one_rank(folder, MoEConfig())
    assert expected_norm > 1.1 * without, "the loss is too small to be seen"
    for grad_norm, balance in run_ranks(layout, one_step, folder, moe, 0):
        assert grad_norm == pytest.approx(expected_norm, rel=1e-5)
        torch.testing.assert_close(balance, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [ONE, TENSOR], ids=["1", "tp2"])
@EACH_LOSS
def test_pure_padding_is_not_balanced(folder, layout, moe):
    """T34: the last step of a run is filled up with empty micro-batches.

    The one micro-batch with tokens then has half the weight in the mean over micro-batches.
    """
    half = {
        name: value if value is None or name.endswith("type") else _halved(value)
        for name, value in (
            ("moe_router_load_balancing_type", moe.moe_router_load_balancing_type),
            ("moe_aux_loss_coeff", moe.moe_aux_loss_coeff),
            ("moe_z_loss_coeff", moe.moe_z_loss_coeff),
        )
    }
    expected_norm, expected = one_step_of_one_rank(folder, MoEConfig(**half))
    for grad_norm, balance in run_ranks(layout, one_step, folder, moe, 1):
        assert grad_norm == pytest.approx(expected_norm, rel=1e-5)
        torch.testing.assert_close(balance, expected, rtol=1e-5, atol=1e-6)


def _halved(value: float | tuple[float, ...]) -> float | tuple[float, ...]:
    return tuple(part / 2 for part in value) if isinstance(value, tuple) else value / 2
