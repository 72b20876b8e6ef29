"""A frozen linear and its adapter in one function, against plain autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from mtrain.lora.layers.fused import Dropped, frozen_linear
from tests.lora.layers.test_products import SCALES, widened


def tensors(scales, *, rows=(5, 2), dtype=torch.float64):
    """(input, weight, bias, A, B); input, A and B require gradients."""
    generator = torch.Generator().manual_seed(0)
    num_columns = 3 if isinstance(scales, float) else 6
    shapes = ((*rows, 4), (8, 4), (8,), (num_columns, 4), (8, 3))
    made = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
    for index in (0, 3, 4):
        made[index].requires_grad_()
    return made


def dropout_of(input_, probability=0.25):
    mask = torch.rand(input_.shape, generator=torch.Generator().manual_seed(1)) > probability
    scale = 1 / (1 - probability)
    return Dropped(values=input_.detach() * mask * scale, mask=mask, scale=scale)


def plain(input_, weight, bias, lora_a, lora_b, *, scales, dropped):
    seen = input_ if dropped is None else input_ * dropped.mask * dropped.scale
    return F.linear(input_, weight, bias) + F.linear(
        F.linear(seen, lora_a), widened(lora_b, scales)
    )


@pytest.mark.parametrize("scales", [1.0, 1.5, SCALES])
@pytest.mark.parametrize("has_dropout", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_output_and_gradients_are_those_of_autograd(scales, has_dropout, has_bias):
    input_, weight, bias, *factors = tensors(scales)
    arguments = (input_, weight, bias if has_bias else None, *factors)
    options = {"scales": scales, "dropped": dropout_of(input_) if has_dropout else None}
    ours, expected = frozen_linear(*arguments, **options), plain(*arguments, **options)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(expected)
    trained = (input_, *factors)
    for mine, theirs in zip(
        torch.autograd.grad(ours, trained, grad),
        torch.autograd.grad(expected, trained, grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("scales", [1.5, SCALES])
def test_gradients_are_those_of_differences(scales):
    input_, weight, bias, *factors = tensors(scales)

    def function(input_, lora_a, lora_b):
        return frozen_linear(input_, weight, bias, lora_a, lora_b, scales=scales, dropped=None)

    assert gradcheck(function, (input_, *factors))


@pytest.mark.parametrize("needed", itertools.product([True, False], repeat=3))
def test_only_gradients_that_are_asked_for_are_computed(needed):
    input_, weight, _, *factors = tensors(SCALES)
    dropped = dropout_of(input_)
    trained = [input_, *factors]
    for tensor, is_needed in zip(trained, needed, strict=True):
        tensor.requires_grad_(is_needed)
    output = frozen_linear(input_, weight, None, *factors, scales=SCALES, dropped=dropped)
    assert output.requires_grad == any(needed)
    if any(needed):
        output.square().sum().backward()
        expected = plain(input_, weight, None, *factors, scales=SCALES, dropped=dropped)
        wanted = [tensor for tensor, is_needed in zip(trained, needed, strict=True) if is_needed]
        for tensor, grad in zip(
            wanted, torch.autograd.grad(expected.square().sum(), wanted), strict=True
        ):
            torch.testing.assert_close(tensor.grad, grad)
    assert [tensor.grad is not None for tensor in trained] == list(needed)
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_b_of_zero_the_bits_are_those_of_the_linear(dtype):
    input_, weight, bias, lora_a, lora_b = tensors(SCALES, dtype=dtype)
    expected = torch.matmul(input_, weight.t()) + bias
    output = frozen_linear(
        input_, weight, bias, lora_a, torch.zeros_like(lora_b), scales=SCALES, dropped=None
    )
    assert torch.equal(output, expected)


def test_gradients_have_the_dtype_of_the_factors():
    input_, weight, _, *factors = tensors(SCALES, dtype=torch.bfloat16)
    factors = [factor.detach().float().requires_grad_() for factor in factors]
    output = frozen_linear(input_, weight, None, *factors, scales=SCALES, dropped=None)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert input_.grad.dtype == torch.bfloat16
    assert all(factor.grad.dtype == torch.float32 for factor in factors)


def test_no_rows_give_gradients_of_zero():
    input_, weight, _, *factors = tensors(1.5, rows=(0, 2))
    frozen_linear(input_, weight, None, *factors, scales=1.5, dropped=None).sum().backward()
    assert all(not factor.grad.any() for factor in factors)


def test_the_output_may_be_changed_in_place():
    input_, weight, bias, *factors = tensors(SCALES)
    output = frozen_linear(input_, weight, bias, *factors, scales=SCALES, dropped=None)
    output *= 2
    expected = 2 * plain(input_, weight, bias, *factors, scales=SCALES, dropped=None)
    grads = torch.autograd.grad(output.square().sum(), factors)
    for mine, theirs in zip(
        grads, torch.autograd.grad(expected.square().sum(), factors), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_it_may_be_computed_again_in_backward():
    input_, weight, bias, *factors = tensors(SCALES)

    def function(input_):
        return frozen_linear(
            input_.tanh(), weight, bias, *factors, scales=SCALES, dropped=None
        ).sigmoid()

    trained = (input_, *factors)
    again = torch.utils.checkpoint.checkpoint(function, input_, use_reentrant=False)
    for mine, theirs in zip(
        torch.autograd.grad(again.sum(), trained),
        torch.autograd.grad(function(input_).sum(), trained),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_no_more_is_kept_for_backward_than_the_input_and_what_is_small():
    input_, weight, bias, *factors = tensors(1.5, rows=(100, 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        frozen_linear(input_, weight, bias, *factors, scales=1.5, dropped=None)
    own = {tensor.data_ptr() for tensor in (input_, weight, *factors)}
    (low_rank,) = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert low_rank.shape == (200, 3)
