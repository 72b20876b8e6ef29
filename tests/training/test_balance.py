from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from mtrain.config.moe import MoEConfig
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.balance import SIDE_LOSSES, count_routers, take_side_losses
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import documents, make_rig, packed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    # Layer 1 of this one is dense.
    return make_checkpoint(tmp_path_factory.mktemp("balance") / "moe", "qwen3_moe_mixed")


def switch_loss(router: TopKRouter, inputs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Source: Switch Transformer, equation 4, over the tokens that are not padding."""
    hidden, padding_mask = inputs
    scores = router.gating(hidden).float().softmax(-1)[~padding_mask]
    chosen = scores.topk(router.topk, dim=-1).indices.flatten()
    num_experts = scores.shape[-1]
    share = chosen.bincount(minlength=num_experts) / chosen.numel()
    return (num_experts * (share * scores.mean(0)).sum()).item()


def step_with_routers(
    state: ParallelState, folder: Path
) -> tuple[torch.Tensor, int, list[float], torch.Tensor]:
    rig = make_rig(state, folder, moe=MoEConfig(moe_aux_loss_coeff=(0.01,)))
    made = documents(4)
    batches = [packed(made[:2], length=24), packed(made[2:], length=32)]
    by_hand: list[float] = []
    if state.layout.tp_size == 1:
        for module in rig.chunks[0].modules():
            if isinstance(module, TopKRouter):
                module.register_forward_pre_hook(
                    lambda router, inputs: by_hand.append(switch_loss(router, inputs))
                )
    take_side_losses(state.device)
    rig.step(batches)
    sums = take_side_losses(state.device)
    num_calls = count_routers(rig.chunks) * len(batches)
    return sums, num_calls, by_hand, take_side_losses(state.device)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(world_size=2, tp_size=2),
        ParallelLayout(world_size=2, pp_size=2),
        ParallelLayout(world_size=2, ep_size=2),
    ],
    ids=["1", "tp2", "pp2", "ep2"],
)
def test_the_balance_of_experts_is_the_mean_over_layers_on_every_layout(folder, layout):
    [(_, _, by_hand, _)] = run_ranks(ParallelLayout(), step_with_routers, folder)
    ranks = run_ranks(layout, step_with_routers, folder)
    total = torch.stack([sums for sums, *_ in ranks]).sum(0)
    num_calls = sum(calls for _, calls, *_ in ranks)
    means = dict(zip(SIDE_LOSSES, (total / num_calls).tolist(), strict=True))
    assert means["load_balancing_loss"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert means["z_loss"] == means["mtp_loss"] == 0.0
    for *_, again in ranks:
        assert not again.any()
