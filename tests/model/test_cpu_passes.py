import pytest
import torch
import torch.nn.functional as F

from mtrain.model.cpu_passes import RootMeanSquareNorm, Rotation


def gradients(function, inputs, grad):
    inputs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    output = function(*inputs)
    output.backward(grad)
    return output.detach(), [tensor.grad for tensor in inputs if tensor.requires_grad]


@pytest.mark.parametrize("trains_weight", [True, False])
@pytest.mark.parametrize("shape", [(7, 2, 64), (7, 2, 3, 32)])
def test_norm_and_its_gradients_are_those_of_the_formula(shape, trains_weight):
    torch.manual_seed(0)
    hidden = torch.randn(shape, dtype=torch.float64).requires_grad_()
    weight = torch.randn(shape[-1:], dtype=torch.float64).requires_grad_(trains_weight)
    grad = torch.randn(shape, dtype=torch.float64)
    inputs = (hidden.detach().requires_grad_(), weight)
    ours = gradients(lambda x, w: RootMeanSquareNorm.apply(x, w, 1e-2), inputs, grad)
    formula = gradients(lambda x, w: F.rms_norm(x, shape[-1:], w, 1e-2), inputs, grad)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)
    assert len(ours[1]) == 1 + trains_weight


def test_norm_changes_none_of_its_inputs():
    hidden, weight = torch.randn(5, 8), torch.randn(8)
    before = hidden.clone(), weight.clone()
    RootMeanSquareNorm.apply(hidden, weight, 1e-6)
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])


def formula(heads, cosines, sines):
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat([-second, first], dim=-1) * sines


def test_rotation_has_the_bits_of_the_formula():
    torch.manual_seed(0)
    # A view, as queries are of the product that they come from.
    heads = torch.randn(9, 2, 3, 48)[..., 8:40]
    cosines, sines = torch.randn(2, 9, 1, 1, 32)
    expected = formula(heads, cosines, sines)
    assert torch.equal(Rotation.apply(heads, cosines, sines), expected)


def test_gradient_of_rotation_turns_back():
    torch.manual_seed(0)
    mine = torch.randn(9, 2, 3, 32, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    grad = torch.randn(9, 2, 3, 32)
    # Both dimensions of a pair turn by one angle.
    cosines, sines = torch.cat([torch.randn(2, 9, 1, 1, 16)] * 2, dim=-1)
    Rotation.apply(mine, cosines, sines).backward(grad)
    formula(theirs, cosines, sines).backward(grad)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-6)
