"""The kernel of the gated activation against the same maths in float64; needs a GPU.

Also the function of it and the linear behind it, which makes the activation a second time.
"""

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_probs", [False, True])
@pytest.mark.parametrize("shape", [(5, 2, 2 * 3000), (33, 2 * 768), (0, 2 * 64)])
def test_swiglu(dtype, has_probs, shape):
    from mtrain.model.kernels.swiglu import swiglu

    torch.manual_seed(0)
    hidden = random(*shape, dtype=dtype).requires_grad_()
    probs = torch.rand(shape[:-1], device="cuda").requires_grad_() if has_probs else None
    output = swiglu(hidden, probs)
    exact = hidden.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    right = F.silu(gate) * up
    if has_probs:
        exact_probs = probs.detach().double().requires_grad_()
        right = right * exact_probs.unsqueeze(-1)
    grad = random(*output.shape, dtype=dtype)
    output.backward(grad)
    right.backward(grad.double())
    assert output.dtype == dtype
    assert output.shape == right.shape
    allowed = 1e-6 if dtype == torch.float32 else 6e-3
    assert (output.double() - right).norm() <= allowed * right.norm()
    assert (hidden.grad.double() - exact.grad).norm() <= allowed * exact.grad.norm()
    if has_probs:
        difference = (probs.grad.double() - exact_probs.grad).norm()
        assert difference <= 1e-5 * exact_probs.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_probs", [False, True])
@pytest.mark.parametrize("shape", [(5, 2, 2 * 3000), (33, 2 * 768), (0, 2 * 64)])
def test_backward_gives_the_output_once_more_bit_for_bit(dtype, has_probs, shape):
    from mtrain.model.kernels.swiglu import swiglu, swiglu_backward

    torch.manual_seed(0)
    hidden = random(*shape, dtype=dtype).requires_grad_()
    probs = torch.rand(shape[:-1], device="cuda").requires_grad_() if has_probs else None
    output = swiglu(hidden, probs)
    grad = random(*output.shape, dtype=dtype)
    output.backward(grad)
    with torch.no_grad():
        arguments = hidden, grad, probs
        hidden_grad, probs_grad, again = swiglu_backward(*arguments, wants_output=True)
        assert swiglu_backward(*arguments)[2] is None
    assert torch.equal(again, output)
    assert torch.equal(hidden_grad, hidden.grad)
    assert (probs_grad is not None) == has_probs
    if has_probs:
        assert torch.equal(probs_grad, probs.grad)


def linear_arguments(num_tokens, *, inner, trains_weight=True):
    torch.manual_seed(0)
    hidden = random(num_tokens, 1, 2 * inner, dtype=torch.bfloat16).requires_grad_()
    weight = (random(256, inner, dtype=torch.bfloat16) * 0.05).requires_grad_(trains_weight)
    weight.main_grad = torch.zeros(weight.shape, device="cuda")
    return hidden, weight


@pytest.mark.parametrize("trains_weight", [True, False])
def test_swiglu_linear_on_a_gpu(trains_weight):
    from mtrain.model.swiglu_linear import swiglu_linear

    hidden, weight = linear_arguments(300, inner=704, trains_weight=trains_weight)
    output = swiglu_linear(hidden, weight, fuses_weight_gradient=True)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    gate, up = exact_hidden.chunk(2, dim=-1)
    right = (F.silu(gate) * up) @ exact_weight.t()
    grad = random(*output.shape, dtype=torch.bfloat16)
    output.backward(grad)
    right.backward(grad.double())
    compared = [(output, right), (hidden.grad, exact_hidden.grad)]
    if trains_weight:
        compared.append((weight.main_grad, exact_weight.grad))
    else:
        assert not weight.main_grad.any()
    for ours, expected in compared:
        assert (ours.double() - expected).norm() <= 1e-2 * expected.norm()


def test_swiglu_linear_keeps_no_activation_for_backward():
    from mtrain.model.kernels.swiglu import swiglu
    from mtrain.model.swiglu_linear import swiglu_linear

    hidden, weight = linear_arguments(4096, inner=2048)

    def kept(function):
        function()  # kernels are compiled, workspaces allocated
        before = torch.cuda.memory_allocated()
        output = function()
        return torch.cuda.memory_allocated() - before - output.nbytes

    activation = 4096 * 2048 * 2
    assert kept(lambda: swiglu_linear(hidden, weight, fuses_weight_gradient=True)) == 0
    assert kept(lambda: F.linear(swiglu(hidden), weight)) == activation
