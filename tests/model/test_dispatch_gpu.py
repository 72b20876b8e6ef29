"""Tokens sorted by Transformer Engine's kernels. Runs on one GPU, where nothing travels."""

from unittest import mock

import pytest
import torch

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
