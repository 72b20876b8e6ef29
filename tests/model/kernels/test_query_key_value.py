"""The kernel in front of attention against the same maths step by step; needs a GPU."""

import pytest
import torch
import torch.nn.functional as F

from mtrain.bridge.family import Rope
from mtrain.model.rope import RotaryEmbedding, rotate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SEQ = 37
EPS = 1e-6


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def angles(dim, *, batch):
    rope = RotaryEmbedding(Rope(base=100.0, dim=dim), torch.device("cuda"))
    positions = torch.randint(0, SEQ, (batch, SEQ), device="cuda") if batch else slice(None)
    return rope(positions, longest=SEQ)


def step_by_step(mixed, rotation, weights, *, groups, queries, head_dim, is_zero_centered):
    heads = mixed.unflatten(-1, (groups, queries + 2, head_dim))
    query, key, value = heads.split([queries, 1, 1], dim=3)
    query, key, value = (part.flatten(2, 3) for part in (query, key, value))
    if weights is not None:
        scales = [1 + weight if is_zero_centered else weight for weight in weights]
        query, key = (
            F.rms_norm(part, (head_dim,), scale, EPS)
            for part, scale in zip((query, key), scales, strict=True)
        )
    if rotation is not None:
        query, key = rotate(query, key, rotation)
    return query, key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "queries", "head_dim", "dim", "rows", "has_norm", "is_zero_centered"),
    [
        (1, 4, 128, 128, 1, True, False),
        (1, 1, 64, 64, 1, True, True),
        (2, 8, 128, 64, 0, True, False),  # half of a head turns, one rope for all rows
        (2, 2, 96, 96, 2, False, False),  # positions of each row
        (1, 7, 64, 0, 0, True, False),  # no rotation
        (3, 3, 48, 0, 0, False, False),  # taken apart, nothing else
    ],
)
def test_heads_are_taken_apart_normed_and_rotated(
    dtype, batch, queries, head_dim, dim, rows, has_norm, is_zero_centered
):
    from mtrain.model.kernels.query_key_value import split_norm_rotate

    torch.manual_seed(0)
    groups = 3
    mixed = random(SEQ, batch, groups * (queries + 2) * head_dim, dtype=dtype).requires_grad_()
    weights = None
    if has_norm:
        weights = [random(head_dim, dtype=dtype).requires_grad_() for _ in range(2)]
    rotation = angles(dim, batch=rows) if dim else None
    outputs = split_norm_rotate(
        mixed,
        rotation,
        *(weights or (None, None)),
        num_groups=groups,
        queries_per_group=queries,
        head_dim=head_dim,
        eps=EPS,
        is_zero_centered=is_zero_centered,
    )
    # Judged in float64 from the same numbers.
    exact = mixed.detach().double().requires_grad_()
    exact_weights = None
    if has_norm:
        exact_weights = [weight.detach().double().requires_grad_() for weight in weights]
    right = step_by_step(
        exact,
        None if rotation is None else rotation.double(),
        exact_weights,
        groups=groups,
        queries=queries,
        head_dim=head_dim,
        is_zero_centered=is_zero_centered,
    )
    grads = [random(*output.shape, dtype=dtype) for output in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(right, [grad.double() for grad in grads])
    allowed = 2e-6 if dtype == torch.float32 else 8e-3
    for name, ours, theirs in [
        *zip(("query", "key", "value"), outputs, right, strict=True),
        ("gradient", mixed.grad, exact.grad),
        *(
            (f"gradient of weight {number}", weight.grad, exact_weights[number].grad)
            for number, weight in enumerate(weights or ())
        ),
    ]:
        assert ours.shape == theirs.shape, name
        assert (ours.double() - theirs).norm() <= allowed * theirs.norm(), name


def test_unused_outputs_have_no_gradient():
    from mtrain.model.kernels.query_key_value import split_norm_rotate

    mixed = random(SEQ, 1, 3 * 16, dtype=torch.float32).requires_grad_()
    _, _, value = split_norm_rotate(
        mixed, None, None, None, num_groups=1, queries_per_group=1, head_dim=16
    )
    value.sum().backward()
    expected = torch.zeros_like(mixed).unflatten(-1, (3, 16))
    expected[..., 2, :] = 1
    assert torch.equal(mixed.grad, expected.flatten(-2))
