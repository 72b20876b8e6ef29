import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from mtrain.model import swiglu_linear as module
from mtrain.model.swiglu_linear import swiglu_linear

INNER, OUT = 24, 10


def inputs(*, trains_hidden=True, trains_weight=True, dtype=torch.float64, rows=(5, 2)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*rows, 2 * INNER, generator=generator, dtype=dtype)
    weight = torch.randn(OUT, INNER, generator=generator, dtype=dtype)
    return hidden.requires_grad_(trains_hidden), weight.requires_grad_(trains_weight)


def formula(hidden, weight):
    gate, up = hidden.chunk(2, dim=-1)
    return (F.silu(gate) * up) @ weight.t()


@pytest.mark.parametrize(
    ("trains_hidden", "trains_weight"), [(True, True), (True, False), (False, True)]
)
def test_output_and_gradients_are_those_of_the_formula(trains_hidden, trains_weight):
    trained = {"trains_hidden": trains_hidden, "trains_weight": trains_weight}
    ours, theirs = inputs(**trained), inputs(**trained)
    output, expected = swiglu_linear(*ours, fuses_weight_gradient=False), formula(*theirs)
    # As the gradient is that comes back from a transposition.
    grad = torch.randn(2, 5, OUT, dtype=torch.float64).transpose(0, 1)
    output.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for tensor, other, is_trained in zip(ours, theirs, trained.values(), strict=True):
        assert (tensor.grad is not None) == is_trained
        torch.testing.assert_close(tensor.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_weight_is_added_to_the_main_gradient(dtype):
    hidden, weight = inputs(dtype=dtype)
    weight.main_grad = torch.ones(weight.shape)
    weight.grad_added_to_main_grad = False
    exact_hidden, exact_weight = (
        tensor.detach().double().requires_grad_() for tensor in (hidden, weight)
    )
    for _ in range(2):
        swiglu_linear(hidden, weight, fuses_weight_gradient=True).sum().backward()
        weight.grad = None  # As data parallelism does, since nobody is to read it.
        formula(exact_hidden, exact_weight).sum().backward()
    assert weight.grad_added_to_main_grad
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    pairs = (weight.main_grad, 1 + exact_weight.grad), (hidden.grad, exact_hidden.grad)
    for ours, right in pairs:
        assert (ours.double() - right).norm() <= allowed * right.norm()


@pytest.mark.parametrize("fuses", [True, False])
def test_without_a_main_gradient_or_unasked_the_gradient_is_returned(fuses):
    hidden, weight = inputs()
    if not fuses:
        weight.main_grad = torch.zeros(weight.shape)
    swiglu_linear(hidden, weight, fuses_weight_gradient=fuses).sum().backward()
    (expected,) = torch.autograd.grad(formula(hidden, weight).sum(), weight)
    torch.testing.assert_close(weight.grad, expected)
    assert fuses or not weight.main_grad.any()


@pytest.mark.parametrize("trains_weight", [True, False])
def test_nothing_but_its_arguments_is_kept(trains_weight):
    hidden, weight = inputs(trains_weight=trains_weight)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu_linear(hidden, weight, fuses_weight_gradient=True)
    assert {tensor.data_ptr() for tensor in kept} == {hidden.data_ptr(), weight.data_ptr()}


def test_for_a_frozen_weight_the_activation_is_not_made_again(monkeypatch):
    asked = []

    def record(*args, wants_output):
        asked.append(wants_output)
        return backward(*args, wants_output=wants_output)

    backward = module.swiglu_backward
    monkeypatch.setattr(module, "swiglu_backward", record)
    for trains_weight in (False, True):
        arguments = inputs(trains_weight=trains_weight)
        swiglu_linear(*arguments, fuses_weight_gradient=False).sum().backward()
    assert asked == [False, True]


def test_no_tokens_give_gradients_of_zero():
    hidden, weight = inputs(rows=(0,))
    output = swiglu_linear(hidden, weight, fuses_weight_gradient=False)
    output.sum().backward()
    assert output.shape == (0, OUT)
    assert hidden.grad.shape == hidden.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
