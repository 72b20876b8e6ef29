import pytest
import torch

from mtrain.model.expert_bias import add_expert_bias, expert_of_rows
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks

EXPERTS, WIDTH = 4, 8


def ends_of(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", [[2, 1, 3, 1], [0, 2, 0, 3], [4, 0, 0, 0], [0, 0, 0, 0]])
def test_every_row_knows_its_expert(counts):
    expected = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts))
    assert torch.equal(expert_of_rows(ends_of(counts), sum(counts)), expected)


def tensors(counts, has_probs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(counts), WIDTH, generator=generator)
    bias = torch.randn(EXPERTS, WIDTH, generator=generator)
    inputs = [hidden.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()]
    if has_probs:
        inputs.append(torch.rand(sum(counts), generator=generator).requires_grad_())
    return inputs


def added(state, counts, has_probs, share=1.0, dtype=torch.float32):
    hidden, bias, *probs = inputs = tensors(counts, has_probs, dtype)
    output = add_expert_bias(
        hidden, bias, ends_of(counts), probs=probs[0] if probs else None, share=share
    )
    return output.detach(), torch.autograd.grad(output.square().sum(), inputs)


def written_out(counts, has_probs):
    hidden, bias, *probs = inputs = tensors(counts, has_probs)
    of_rows = bias.repeat_interleave(torch.tensor(counts), dim=0)
    output = hidden + (of_rows * probs[0][:, None] if probs else of_rows)
    return output.detach(), torch.autograd.grad(output.square().sum(), inputs)


@pytest.mark.parametrize("has_probs", [False, True])
@pytest.mark.parametrize("counts", [[2, 1, 3, 1], [0, 2, 0, 3], [0, 0, 0, 0]])
def test_sum_and_gradients_equal_one_row_after_the_other(counts, has_probs):
    [(output, grads)] = run_ranks(ParallelLayout(), added, counts, has_probs)
    expected, expected_grads = written_out(counts, has_probs)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def parts_and_whole(state, counts):
    """Two ranks that add half each, with the gradient of what they add together."""
    hidden, bias, probs = tensors(counts, True)
    upstream = torch.randn(sum(counts), WIDTH, generator=torch.Generator().manual_seed(1))
    results = []
    for share in (0.5, 1.0):
        output = add_expert_bias(hidden, bias, ends_of(counts), probs=probs, share=share)
        results.append(
            ((output - hidden).detach(), *torch.autograd.grad(output, [bias, probs], upstream))
        )
    return results


def test_a_share_has_the_whole_gradient_of_the_bias_and_its_part_of_that_of_the_probabilities():
    [(part, whole)] = run_ranks(ParallelLayout(), parts_and_whole, [2, 1, 3, 1])
    torch.testing.assert_close(2 * part[0], whole[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(part[1], whole[1])
    assert torch.equal(2 * part[2], whole[2])


def test_gradients_in_half_precision_are_rounded_once():
    """Added up in bfloat16, sums of so many rows would stand still long before their end."""
    counts = [4000, 0, 100, 1]
    [(output, grads)] = run_ranks(ParallelLayout(), added, counts, True, 1.0, torch.bfloat16)
    _, _, probs = tensors(counts, True)
    assert output.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.bfloat16, torch.float32]
    rows = 2 * output.double() * probs.detach().bfloat16().double()[:, None]
    exact = torch.stack([part.sum(0) for part in rows.split(counts)])
    scale = torch.stack([part.abs().sum(0) for part in rows.split(counts)])
    assert ((grads[1].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * scale).all()
