"""What is added to Transformer Engine's linear, whose place a small class takes.

tests/model/test_gpu.py has the real one.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import random as megatron_random

from mtrain.model.activation import swiglu
from mtrain.model.te_linear import row_linear_with_swiglu

ON_GPU = SimpleNamespace(is_cuda=True, dtype=torch.float32)


class Linear(torch.nn.Module):
    """What is asked of `TERowParallelLinear`."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(delay_wgrad_compute=False, cpu_offloading=False)
        self.weight = torch.nn.Parameter(torch.randn(3, 4))
        self.fuse_wgrad_accumulation = self.is_first_microbatch = True
        self.use_bias, self.tp_size = False, 1

    def will_execute_quantized(self, is_context_quantized):
        return is_context_quantized

    def forward(self, x):
        return F.linear(x, self.weight), None


def test_swiglu_is_applied_on_demand_and_the_weight_gradient_fused():
    linear = row_linear_with_swiglu(Linear)()
    linear.weight.main_grad = torch.ones(3, 4)
    hidden = torch.randn(5, 1, 8)
    activation = swiglu(hidden)
    plain, _ = linear(activation)
    assert linear.is_first_microbatch
    output, bias = linear(hidden, applies_swiglu=True)
    output.sum().backward()
    assert bias is None
    assert not linear.is_first_microbatch
    torch.testing.assert_close(output, plain)
    expected = 1 + activation.sum((0, 1)).expand(3, 4)
    torch.testing.assert_close(linear.weight.main_grad, expected)


CHANGES = {
    "a tensor on the CPU": lambda _: torch.zeros(1),
    "another dtype": lambda linear: linear.bfloat16(),
    "a bias": lambda linear: setattr(linear, "use_bias", True),
    "several ranks": lambda linear: setattr(linear, "tp_size", 2),
    "delayed gradients": lambda linear: setattr(linear.config, "delay_wgrad_compute", True),
    "offloading": lambda linear: setattr(linear.config, "cpu_offloading", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_else_transformer_engine_does_is_left_to_it(change):
    linear = row_linear_with_swiglu(Linear)()
    assert linear.fuses_swiglu(ON_GPU)
    changed = change(linear)
    assert not linear.fuses_swiglu(changed if torch.is_tensor(changed) else ON_GPU)


def test_8_bit_products_and_weights_are_left_to_transformer_engine(monkeypatch):
    class Float8(torch.nn.Parameter):
        pass

    linear = row_linear_with_swiglu(Linear)()
    enabled = SimpleNamespace(is_fp8_enabled=lambda: True)
    with monkeypatch.context() as patched:
        patched.setattr(megatron_random, "FP8GlobalStateManager", enabled)
        assert not linear.fuses_swiglu(ON_GPU)
    assert linear.fuses_swiglu(ON_GPU)
    linear.weight = Float8(torch.randn(3, 4))
    assert not linear.fuses_swiglu(ON_GPU)
