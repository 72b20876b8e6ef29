"""Products with the factors, and adding them up in place, against what autograd makes of them."""

import pytest
import torch
import torch.nn.functional as F

from mtrain.lora.layers.products import add_up, collected, scaled_product, spread_out

# Rows of a fused weight: q q k v | q q k v. Only q and v are adapted.
SCALES = torch.tensor([[2.0, 0], [2.0, 0], [0, 0], [0, 0.3]]).repeat(2, 1)


def widened(lora_b, scales):
    """B with a column for every row of A, as autograd sees it."""
    if isinstance(scales, float):
        return lora_b * scales
    return (lora_b.unsqueeze(-2) * scales.unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize("scales", [1.5, SCALES])
@pytest.mark.parametrize("shape", [(8, 3), (4, 8, 3)])
def test_b_is_spread_out_and_its_gradient_collected(shape, scales):
    lora_b = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = widened(lora_b, scales)
    with torch.no_grad():
        wide_b, scale = spread_out(lora_b, scales, torch.float64)
        torch.testing.assert_close(wide_b * scale, expected, rtol=0, atol=0)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    wide_grad = grad * scale
    torch.testing.assert_close(collected(wide_grad, scales, torch.float64), lora_b.grad)


def test_b_is_rounded_once():
    lora_b = torch.randn(8, 3)
    wide_b, _ = spread_out(lora_b, SCALES, torch.bfloat16)
    assert torch.equal(wide_b, widened(lora_b, SCALES).bfloat16())


def test_a_b_that_needs_nothing_is_not_copied():
    lora_b = torch.randn(8, 3)
    wide_b, scale = spread_out(lora_b, 2.0, torch.float32)
    assert wide_b is lora_b
    assert scale == 2.0


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("rows", [4, 0])
def test_a_product_is_scaled(rows, scale):
    left, right = torch.randn(6, rows), torch.randn(rows, 5)
    torch.testing.assert_close(scaled_product(left, right, scale), scale * left @ right)


def made(producer):
    """Something that a linear may return, with a gradient."""
    start = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    return start, producer(start)


class SameNumbers(torch.autograd.Function):
    """Returns its input, or a view of what it made, as Megatron-Core's reductions do."""

    @staticmethod
    def forward(ctx, tensor, returns_input):
        return tensor if returns_input else tensor.clone().view(10, 8).view(5, 2, 8)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


PRODUCERS = {
    "product": lambda start: start * 3,
    "view_of_a_function": lambda start: SameNumbers.apply(start * 3, False),
    "argument_returned": lambda start: SameNumbers.apply(start * 3, True),
    "transposed": lambda start: (start.transpose(0, 1) * 3).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("scales", [1.5, SCALES])
@pytest.mark.parametrize("producer", PRODUCERS.values(), ids=PRODUCERS)
def test_adding_in_place_has_the_gradients_of_adding(producer, scales):
    start, output = made(producer)
    num_columns = 3 if isinstance(scales, float) else 6
    low_rank = torch.randn(5, 2, num_columns, dtype=torch.float64, requires_grad=True)
    lora_b = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    inputs = (start, low_rank, lora_b)
    expected = output.clone() + F.linear(low_rank, widened(lora_b, scales))
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, grad, retain_graph=True)
    total = add_up(output, low_rank, lora_b, scales)
    assert (total.data_ptr() == output.data_ptr()) == output.is_contiguous()
    torch.testing.assert_close(total, expected)
    for mine, theirs in zip(torch.autograd.grad(total, inputs, grad), expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_output_without_gradient_gets_one():
    """The first linear of a model whose embedding is frozen."""
    output, low_rank = torch.randn(5, 8), torch.randn(5, 3)
    lora_b = torch.randn(8, 3, requires_grad=True)
    expected = output + 2.0 * low_rank @ lora_b.t()
    total = add_up(output, low_rank, lora_b, 2.0)
    torch.testing.assert_close(total, expected)
    (mine,) = torch.autograd.grad(total.sum(), lora_b)
    torch.testing.assert_close(mine, torch.autograd.grad(expected.sum(), lora_b)[0])


def test_an_output_that_another_function_saved_is_an_error():
    """It is changed in place, and must not be so unnoticed."""
    _, output = made(torch.exp)
    total = add_up(output, torch.randn(5, 2, 3).double(), torch.randn(8, 3).double(), 2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.sum().backward()


def test_an_output_of_another_dtype_keeps_its_dtype():
    """Routers give float32 logits for half-precision activations."""
    output = torch.randn(5, 1, 8, requires_grad=True)
    low_rank = torch.randn(5, 1, 3).bfloat16().requires_grad_()
    lora_b = torch.randn(8, 3, requires_grad=True)
    total = add_up(output, low_rank, lora_b, 2.0)
    assert total.dtype == torch.float32
    total.sum().backward()
    assert low_rank.grad.dtype == torch.bfloat16
    assert lora_b.grad.dtype == torch.float32
    expected = 2.0 * torch.ones(8, 5) @ low_rank.detach().float().squeeze(1)
    torch.testing.assert_close(lora_b.grad, expected, rtol=2e-2, atol=2e-2)
