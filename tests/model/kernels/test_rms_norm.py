"""The norm of wide rows against torch's in float64; needs a GPU."""

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EPS = 1e-6


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 2048), (37, 2, 2560), (3000, 1, 4096), (5, 1, 12288)])
@pytest.mark.parametrize("is_zero_centered", [False, True])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_output_and_gradients_are_those_of_float64(dtype, shape, is_zero_centered, is_frozen):
    from mtrain.model.kernels.rms_norm import rms_norm

    torch.manual_seed(0)
    hidden, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    weight = random(shape[-1], dtype=dtype)
    hidden.requires_grad_()
    weight.requires_grad_(not is_frozen)
    output = rms_norm(hidden, weight, EPS, is_zero_centered=is_zero_centered)
    output.backward(grad)
    assert output.dtype == hidden.grad.dtype == dtype
    wide = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    factor = 1 + wide[1] if is_zero_centered else wide[1]
    expected = F.rms_norm(wide[0], shape[-1:], factor, EPS)
    expected.backward(grad.double())
    allowed = 1e-6 if dtype == torch.float32 else 4e-3
    assert relative(output, expected) < allowed
    assert relative(hidden.grad, wide[0].grad) < allowed
    if is_frozen:
        assert weight.grad is None
    else:
        assert relative(weight.grad, wide[1].grad) < allowed


def test_the_same_every_time():
    from mtrain.model.kernels.rms_norm import rms_norm

    hidden, weight = random(999, 2560, dtype=torch.bfloat16), random(2560, dtype=torch.bfloat16)
    weight.requires_grad_()
    grads = []
    for _ in range(2):
        weight.grad = None
        rms_norm(hidden, weight, EPS).backward(hidden)
        grads.append(weight.grad)
    assert torch.equal(*grads)


def test_a_linear_behind_it_keeps_no_normed_input():
    """And its weight has the gradient that it has with one."""
    from mtrain.model.linear import _AccumulatingLinear
    from mtrain.model.norm import NormInput

    hidden = random(512, 2048, dtype=torch.bfloat16).requires_grad_()
    norm_weight = random(2048, dtype=torch.bfloat16).requires_grad_()
    source = NormInput(hidden=hidden, weight=norm_weight, eps=EPS, is_zero_centered=False)
    weight = random(64, 2048, dtype=torch.bfloat16).requires_grad_()
    totals, sizes = [], []
    for one in (None, source):
        weight.main_grad = torch.zeros(64, 2048, device="cuda")
        before = torch.cuda.memory_allocated()
        normed = source.normed()
        output = _AccumulatingLinear.apply(normed, weight, one)
        del normed
        sizes.append(torch.cuda.memory_allocated() - before)
        output.sum().backward()
        totals.append(weight.main_grad)
        weight.grad = None
    assert torch.equal(*totals)
    assert sizes[1] <= sizes[0] - 2 * hidden.numel()
