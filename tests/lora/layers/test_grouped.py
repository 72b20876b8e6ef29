"""Frozen experts and their adapters in one function, against one linear an expert."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mtrain.lora.layers.grouped import frozen_grouped_linear
from tests.lora.layers.test_fused import dropout_of
from tests.lora.layers.test_products import SCALES, widened

# Rows of each expert.
COUNTS = {"all": (3, 2, 4), "some_without_rows": (0, 9, 0), "one_row": (0, 0, 1)}


def tensors(scales, counts, *, rank=3, dtype=torch.float32):
    """(tokens, ends, weight, A, B); tokens, A and B require gradients."""
    generator = torch.Generator().manual_seed(0)
    num_columns = rank if isinstance(scales, float) else 2 * rank
    shapes = ((sum(counts), 16), (3, 8, 16), (3, num_columns, 16), (3, 8, rank))
    tokens, weight, *factors = [
        torch.randn(shape, generator=generator).to(dtype) for shape in shapes
    ]
    for tensor in (tokens, *factors):
        tensor.requires_grad_()
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    return tokens, ends, weight, *factors


def plain(tokens, ends, weight, lora_a, lora_b, *, scales, dropped):
    """Expert by expert."""
    seen = tokens if dropped is None else tokens * dropped.mask * dropped.scale
    outputs, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        rows = slice(start, end)
        low_rank = F.linear(seen[rows], lora_a[expert])
        delta = F.linear(low_rank, widened(lora_b[expert], scales))
        outputs.append(F.linear(tokens[rows], weight[expert]) + delta)
        start = end
    return torch.cat(outputs)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("scales", [1.0, 1.5, SCALES])
@pytest.mark.parametrize("has_dropout", [False, True])
@pytest.mark.parametrize("rank", [3, 4, 8])
def test_output_and_gradients_are_those_of_autograd(counts, scales, has_dropout, rank):
    tokens, *others = tensors(scales, counts, rank=rank)
    options = {"scales": scales, "dropped": dropout_of(tokens) if has_dropout else None}
    ours = frozen_grouped_linear(tokens, *others, **options)
    expected = plain(tokens, *others, **options)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(expected)
    trained = (tokens, *others[-2:])
    for mine, theirs in zip(
        torch.autograd.grad(ours, trained, grad),
        torch.autograd.grad(expected, trained, grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert mine.is_contiguous(), "Megatron-Core would not sum it over ranks"


@pytest.mark.parametrize("needed", itertools.product([True, False], repeat=3))
def test_only_gradients_that_are_asked_for_are_computed(needed):
    tokens, ends, weight, *factors = tensors(SCALES, COUNTS["all"])
    trained = [tokens, *factors]
    for tensor, is_needed in zip(trained, needed, strict=True):
        tensor.requires_grad_(is_needed)
    output = frozen_grouped_linear(tokens, ends, weight, *factors, scales=SCALES, dropped=None)
    assert output.requires_grad == any(needed)
    if any(needed):
        output.sum().backward()
    assert [tensor.grad is not None for tensor in trained] == list(needed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_b_of_zero_the_bits_are_those_of_the_experts(dtype):
    tokens, ends, weight, lora_a, lora_b = tensors(SCALES, COUNTS["all"], dtype=dtype)
    expected = F.grouped_mm(tokens, weight.transpose(1, 2), offs=ends)
    output = frozen_grouped_linear(
        tokens, ends, weight, lora_a, torch.zeros_like(lora_b), scales=SCALES, dropped=None
    )
    assert torch.equal(output, expected)


def test_gradients_have_the_dtype_of_the_factors():
    tokens, ends, weight, *factors = tensors(SCALES, COUNTS["all"], dtype=torch.bfloat16)
    factors = [factor.detach().float().requires_grad_() for factor in factors]
    output = frozen_grouped_linear(tokens, ends, weight, *factors, scales=SCALES, dropped=None)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert tokens.grad.dtype == torch.bfloat16
    assert all(factor.grad.dtype == torch.float32 for factor in factors)
