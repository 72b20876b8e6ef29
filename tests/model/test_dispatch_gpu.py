"""Tokens sorted by Transformer Engine's kernels. Runs on one GPU, where nothing travels."""

from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from mtrain.config import MoEConfig
from mtrain.parallel import (
    ParallelLayout,
    destroy_parallel,
    destroy_world,
    initialize_parallel,
    initialize_world,
)
from mtrain.platform.device import has_transformer_engine
from tests.megatron import load_model, losses_and_gradients, on_gpu, packed_inputs
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")


@pytest.fixture(scope="module")
def state():
    yield initialize_parallel(ParallelLayout(), initialize_world())
    destroy_parallel()
    destroy_world()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_groups"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_fused_sorting_gives_the_same(name, dispatcher, state, tmp_path):
    """Megatron-Core's dispatchers, as with experts on several ranks.

    In float32: after rounding to bfloat16 routers may choose otherwise.
    """
    folder = make_checkpoint(tmp_path, name, hidden_size=128, moe_intermediate_size=64)
    inputs = on_gpu(packed_inputs([40, 7, 64, 17], 131))
    results = []
    for fuses in (False, True):
        moe = MoEConfig(moe_permute_fusion=fuses, moe_token_dispatcher_type=dispatcher)
        with mock.patch("mtrain.model.dispatch._can_stay", lambda *_args, **_kwargs: False):
            (model,) = load_model(state, folder, dtype=torch.float32, moe=moe)
        assert model.config.moe_permute_fusion is fuses
        results.append(losses_and_gradients(model, inputs))
    (losses, grads), (fused, fused_grads) = results
    torch.testing.assert_close(fused, losses, rtol=1e-4, atol=1e-5)
    for key, grad in grads.items():
        # Rows of experts are added up in another order.
        assert (fused_grads[key] - grad).norm() <= 1e-3 * grad.norm(), key


def expert_layer_results(state, folder, moe: MoEConfig, dtype: torch.dtype) -> tuple:
    """Output of one layer with experts and the gradient of its input, in float32."""
    with mock.patch("mtrain.model.dispatch._can_stay", lambda *_args, **_kwargs: False):
        (model,) = load_model(state, folder, dtype=dtype, moe=moe)
    layer = next(m for m in model.modules() if isinstance(m, MoELayer))
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (512, 1, model.config.hidden_size)
    tokens, grad = (
        torch.randn(shape, generator=generator, device="cuda").bfloat16().to(dtype)
        for _ in range(2)
    )
    tokens.requires_grad_()
    output, _ = layer(tokens)
    output.backward(grad)
    return output.detach().float(), tokens.grad.float()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_groups"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_fused_sorting_rounds_no_worse_in_half_precision(name, dispatcher, state, tmp_path):
    """One layer, whose router sees the same numbers in float32, which is the judge."""
    folder = make_checkpoint(tmp_path, name, hidden_size=128, moe_intermediate_size=64)
    options = {"moe_token_dispatcher_type": dispatcher, "moe_router_dtype": "fp32"}
    judge, half, fused = (
        expert_layer_results(state, folder, MoEConfig(moe_permute_fusion=fuses, **options), dtype)
        for fuses, dtype in (
            (False, torch.float32),
            (False, torch.bfloat16),
            (True, torch.bfloat16),
        )
    )
    for exact, rounded, ours in zip(judge, half, fused, strict=True):
        allowed = (rounded - exact).norm()
        assert allowed <= 0.02 * exact.norm()
        assert (ours - exact).norm() <= 1.05 * allowed


def test_a_router_learns_behind_tokens_that_want_no_gradient(state, tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_moe", hidden_size=128, moe_intermediate_size=64)
    grads = []
    for fuses in (False, True):
        with mock.patch("mtrain.model.dispatch._can_stay", lambda *_args, **_kwargs: False):
            (model,) = load_model(state, folder, moe=MoEConfig(moe_permute_fusion=fuses))
        layer = model.decoder.layers[-1].mlp
        tokens = torch.randn(64, 1, 128, generator=torch.Generator().manual_seed(0)).cuda()
        output, _ = layer(tokens)
        grads += torch.autograd.grad((output**2).sum(), layer.router.weight)
    assert (grads[1] - grads[0]).norm() <= 1e-3 * grads[0].norm()
