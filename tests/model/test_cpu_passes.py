import pytest
import torch
import torch.nn.functional as F

from mtrain.model.cpu_passes import (
    RootMeanSquareNorm,
    Rotation,
    SwiGLU,
    split_norm_rotate,
    swap_rows,
)


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


def test_swiglu_and_its_gradient_are_those_of_the_formula():
    torch.manual_seed(0)
    hidden = torch.randn(5, 2, 24, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 2, 12, dtype=torch.float64)
    ours = gradients(SwiGLU.apply, (hidden,), grad)
    theirs = gradients(lambda x: F.silu(x[..., :12]) * x[..., 12:], (hidden,), grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def heads_one_by_one(mixed, cosines_and_sines, query_weight, key_weight, *, eps, **layout):
    """What `split_norm_rotate` does, kind of head by kind of head."""
    queries, dim = layout["queries_per_group"], layout["head_dim"]
    heads = mixed.unflatten(-1, (layout["num_groups"], queries + 2, dim))
    query, key = heads[..., :queries, :].flatten(2, 3), heads[..., queries, :]
    if query_weight is not None:
        query = F.rms_norm(query, (dim,), query_weight, eps)
        key = F.rms_norm(key, (dim,), key_weight, eps)
    if cosines_and_sines is not None:
        rotary = cosines_and_sines.shape[-1]
        query, key = (
            torch.cat([formula(kind[..., :rotary], *cosines_and_sines), kind[..., rotary:]], dim=-1)
            for kind in (query, key)
        )
    return query, key, heads[..., -1, :]


@pytest.mark.parametrize("trains_norms", [True, False, None])
@pytest.mark.parametrize(("rotary", "batch_of_angles"), [(16, 1), (16, 3), (8, 1), (None, 1)])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_heads_are_split_normed_and_rotated_as_one_by_one(
    num_groups, rotary, batch_of_angles, trains_norms
):
    torch.manual_seed(0)
    layout = {"num_groups": num_groups, "queries_per_group": 2, "head_dim": 16, "eps": 1e-2}
    inputs = [torch.randn(5, 3, num_groups * 4 * 16, dtype=torch.float64, requires_grad=True)]
    if trains_norms is not None:
        weights = torch.randn(2, 16, dtype=torch.float64)
        inputs += [weight.clone().requires_grad_(trains_norms) for weight in weights]
    angles = None
    if rotary is not None:
        halves = torch.randn(2, 5, batch_of_angles, 1, rotary // 2, dtype=torch.float64)
        angles = torch.cat([halves, halves], dim=-1)

    def joined(function):
        def call(mixed, query_weight=None, key_weight=None):
            parts = function(mixed, angles, query_weight, key_weight, **layout)
            return torch.cat([part.flatten(2) for part in parts], dim=-1)

        return call

    grad = torch.randn_like(inputs[0])
    ours = gradients(joined(split_norm_rotate), inputs, grad)
    theirs = gradients(joined(heads_one_by_one), inputs, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_rows_are_swapped_in_memory_in_both_directions():
    tensor = torch.randn(3, 5, 2, 4, requires_grad=True)
    grad = torch.randn(5, 3, 2, 4)
    output = swap_rows(tensor)
    output.backward(grad)
    assert torch.equal(output, tensor.transpose(0, 1))
    assert torch.equal(tensor.grad, grad.transpose(0, 1))
    assert output.is_contiguous()
    assert tensor.grad.is_contiguous()
