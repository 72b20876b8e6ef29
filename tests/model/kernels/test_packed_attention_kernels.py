"""Attention in packs against attention of each document in float64; needs a GPU."""

from functools import partial

import pytest
import torch

from mtrain.model.flash import TORCH_KERNELS, FlashArguments, flash_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GROUPS = 2
SCALE = 0.11
# Short ones, edges of blocks of 16 to 128 tokens, a long one, and none at all.
PACKS = [
    [1],
    [1, 1, 2, 3, 1],
    [16, 32, 64, 128, 256],
    [15, 17, 31, 33, 63, 65, 127, 129, 1],
    [5, 0, 1037, 0],
    [39, 66, 161, 286, 426, 1170, 77],
]


def tensors(lengths, group_size, head_dim, *, dtype):
    """Queries, keys and values as parts of one tensor, and a gradient with heads first."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    random = partial(torch.randn, generator=generator, device="cuda", dtype=dtype)
    num_tokens, num_heads = sum(lengths), GROUPS * group_size
    mixed = random(num_tokens, num_heads + 2 * GROUPS, head_dim)
    grad = random(num_heads, num_tokens, head_dim).transpose(0, 1)
    return *mixed.split([num_heads, GROUPS, GROUPS], dim=1), grad


def ends_of(lengths):
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    return ends.to(torch.int32), FlashArguments(scale=SCALE, window=None, longest=max(lengths))


def in_float64(lengths, query, key, value, grad):
    """Output, logarithms and gradients of queries, keys and values."""
    inputs = [x.detach().double().requires_grad_() for x in (query, key, value)]
    outputs, logarithms = [], []
    for queries, keys, values in zip(*(x.split(lengths) for x in inputs), strict=True):
        group_size = queries.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group_size, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * SCALE
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device="cuda").tril()
        scores = scores.masked_fill(~seen, -torch.inf)
        logarithms.append(scores.logsumexp(dim=-1))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values))
    output = torch.cat(outputs)
    grads = torch.autograd.grad(output, inputs, grad.double())
    return output.detach(), torch.cat(logarithms, dim=1).detach(), *grads


def by_kernels(kernels, lengths, query, key, value, grad):
    ends, arguments = ends_of(lengths)
    output, logarithms, state = kernels.forward(query, key, value, ends, arguments)
    grads = kernels.backward(grad, query, key, value, output, logarithms, ends, arguments, state)
    return output, logarithms, *grads


def ours(lengths, group_size):
    from mtrain.model.kernels.packed_attention import attention_blocks, packed_kernels

    return packed_kernels(attention_blocks(ends_of(lengths)[0], sum(lengths), group_size))


def distance(found, expected):
    return (found.double() - expected).norm().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("group_size", "head_dim"), [(1, 64), (1, 128), (2, 128), (4, 64), (4, 128), (8, 128), (16, 64)]
)
@pytest.mark.parametrize("lengths", PACKS)
def test_outputs_and_gradients_are_as_near_to_float64_as_those_of_flash_attention(
    dtype, group_size, head_dim, lengths
):
    inputs = tensors(lengths, group_size, head_dim, dtype=dtype)
    expected = in_float64(lengths, *inputs)
    found = by_kernels(ours(lengths, group_size), lengths, *inputs)
    known = by_kernels(TORCH_KERNELS, lengths, *inputs)
    rounding = torch.finfo(dtype).eps
    names = ("output", "logarithms", "queries", "keys", "values")
    for name, one, other, right in zip(names, found, known, expected, strict=True):
        assert one.shape == right.shape, name
        assert one.dtype == (torch.float32 if name == "logarithms" else dtype), name
        # Gradients of a document of one token are zero but for rounding.
        allowed = 1.3 * distance(other, right) + 0.1 * rounding * (right.norm().item() + 1)
        assert distance(one, right) <= allowed, name


def test_the_same_every_time():
    lengths = PACKS[-1]
    inputs = tensors(lengths, 4, 128, dtype=torch.bfloat16)
    first, second = (by_kernels(ours(lengths, 4), lengths, *inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_lies_in_other_documents_is_not_seen():
    lengths = [70, 50, 90]
    inputs = tensors(lengths, 4, 128, dtype=torch.bfloat16)
    before = by_kernels(ours(lengths, 4), lengths, *inputs)
    for tensor in inputs:
        tensor[:70] = 7
        tensor[120:] = -9
    after = by_kernels(ours(lengths, 4), lengths, *inputs)
    for one, other in zip(before, after, strict=True):
        tokens_first = (one, other) if one.dim() == 3 else (one.t(), other.t())
        assert torch.equal(*(x[70:120] for x in tokens_first))


def test_sinks_are_as_with_torchs_kernels():
    lengths = [70, 1, 50]
    *inputs, grad = tensors(lengths, 4, 128, dtype=torch.bfloat16)
    ends, arguments = ends_of(lengths)
    answers = []
    for kernels in (ours(lengths, 4), TORCH_KERNELS):
        sinks = torch.linspace(-3, 3, 8, device="cuda", dtype=torch.bfloat16)
        leaves = [x.detach().clone().requires_grad_() for x in (*inputs, sinks)]
        output = flash_attention(*leaves[:3], ends, leaves[3], arguments, kernels=kernels)
        answers.append((output, *torch.autograd.grad(output, leaves, grad)))
    for one, other in zip(*answers, strict=True):
        assert distance(one, other.double()) <= 0.01 * other.double().norm()
