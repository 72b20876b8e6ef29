import pytest
import torch
from megatron.core.tensor_parallel import layers

from mtrain.platform.device import prepare_megatron
from mtrain.platform.weight_gradients import (
    add_gradient,
    add_product,
    add_to_main_grad,
    install_weight_gradients,
)


def test_products_are_added_without_rounding_them() -> None:
    left, right = torch.randn(3, 5), torch.randn(5, 4)
    total = torch.ones(3, 4)
    add_product(total, left, right)
    torch.testing.assert_close(total, 1 + left @ right)
    total = torch.ones(3, 4)
    add_product(total, left.bfloat16(), right.bfloat16())
    torch.testing.assert_close(total, 1 + left.bfloat16().float() @ right.bfloat16().float())


def test_the_gradient_of_a_weight_goes_to_its_main_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(3, 4), False
    grad, inputs = torch.randn(6, 3), torch.randn(6, 4)
    unread = add_to_main_grad(weight, grad, inputs)
    assert unread.shape == weight.shape
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, 1 + grad.t() @ inputs)
    # It takes no memory of its own.
    assert unread.data_ptr() == weight.main_grad.data_ptr()


@pytest.mark.parametrize(
    ("is_added", "overwrites", "expected"),
    [(True, False, 1.0), (False, False, 3.0), (False, True, 2.0)],
)
def test_a_gradient_of_autograd_is_added_once(is_added, overwrites, expected) -> None:
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(3), is_added
    weight.overwrites_main_grad = overwrites
    add_gradient(weight, torch.full((3,), 2.0, dtype=torch.bfloat16))
    assert torch.equal(weight.main_grad, torch.full((3,), expected))
    assert not weight.overwrites_main_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megatron_core_finds_the_kernel(dtype) -> None:
    prepare_megatron()
    tokens, grad = torch.randn(6, 4, dtype=dtype), torch.randn(6, 3, dtype=dtype)
    main_grad = torch.zeros(3, 4, dtype=dtype)
    kernels = layers.fused_weight_gradient_mlp_cuda
    by_name = {torch.float32: "wgrad_gemm_accum_fp32", torch.bfloat16: "wgrad_gemm_accum_fp16"}
    getattr(kernels, by_name[dtype])(tokens, grad, main_grad)
    torch.testing.assert_close(main_grad, grad.t() @ tokens)
    assert layers._grad_accum_fusion_available


def test_apex_stays_where_it_is(monkeypatch) -> None:
    theirs = object()
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", theirs, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    install_weight_gradients()
    assert layers.fused_weight_gradient_mlp_cuda is theirs
