"""Adapted linears where training does not reach by itself: no tokens, other dtypes."""

import pytest
import torch

from tests.adapters import attached, plan_of, random_factors
from tests.megatron import SINGLE, packed_inputs
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint


def experts_without_tokens(state, folder, lora, values):
    (model,) = attached(state, folder, lora, values)
    linear = model.decoder.layers[0].mlp.experts.linear_fc1
    output = linear(torch.zeros(0, 64), torch.zeros(4, dtype=torch.int32))
    output.sum().backward()
    gradients = [linear.adapter.lora_a.grad, linear.adapter.lora_b.grad]
    return tuple(output.shape), [bool((gradient == 0).all()) for gradient in gradients]


def test_experts_without_tokens_have_gradients_of_zero(tmp_path):
    """A missing gradient would leave a data-parallel reduction waiting."""
    folder = make_checkpoint(tmp_path, "qwen3_moe")
    table, lora = plan_of(folder)
    values = random_factors(table, lora)
    ((shape, are_zero),) = run_ranks(SINGLE, experts_without_tokens, folder, lora, values)
    assert shape == (0, 96)
    assert are_zero == [True, True]


def losses_with(state, folder, lora, values, dtype, adapter_dtype):
    (model,) = attached(state, folder, lora, values, dtype=dtype, adapter_dtype=adapter_dtype)
    losses, _ = model(**packed_inputs([16, 16], 131))
    losses.sum().backward()
    factor = model.decoder.layers[0].self_attention.linear_qkv.adapter.lora_a
    return losses.mean().item(), factor.dtype, factor.grad.dtype


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_float32_adapters_train_on_a_bfloat16_model(name, tmp_path):
    folder = make_checkpoint(tmp_path, name)
    table, lora = plan_of(folder)
    values = random_factors(table, lora)
    options = (folder, lora, values)
    ((loss, _, _),) = run_ranks(SINGLE, losses_with, *options, torch.float32, torch.float32)
    ((half, dtype, gradient_dtype),) = run_ranks(
        SINGLE, losses_with, *options, torch.bfloat16, torch.float32
    )
    assert dtype == gradient_dtype == torch.float32
    assert half == pytest.approx(loss, rel=1e-2)
