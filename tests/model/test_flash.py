import pytest
import torch

from mtrain.model.attention import attention_with_sinks, causal_mask
from mtrain.model.flash import FlashArguments, FlashAttention, FlashKernels, flash_attention
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks

CPU = torch.device("cpu")
HEADS, HEAD_DIM, SCALE = 4, 8, 0.4


def weights_of(query, key, ends, arguments, logarithms=None):
    """Weights [heads, tokens, tokens] and logarithms, as the kernels rebuild them.

    Without logarithms they are the denominators of the weights, else as they are given.
    """
    documents = torch.searchsorted(ends, torch.arange(len(query)), right=True)
    mask = causal_mask(len(query), arguments.window, CPU) & (documents[:, None] == documents)
    scores = torch.einsum("qhd,khd->hqk", query, key) * arguments.scale
    scores = scores.masked_fill(~mask, -torch.inf)
    if logarithms is None:
        logarithms = scores.logsumexp(dim=-1)
    return (scores - logarithms[:, :, None]).exp(), logarithms


def widened(tensor, num_heads):
    return tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1)


def plain_forward(query, key, value, ends, arguments):
    key, value = widened(key, HEADS), widened(value, HEADS)
    weights, logarithms = weights_of(query, key, ends, arguments)
    return torch.einsum("hqk,khd->qhd", weights, value), logarithms, (torch.ones(1),)


def plain_backward(grad, query, key, value, output, logarithms, ends, arguments, state):
    """The formulas of flash attention's backward pass, without autograd."""
    assert torch.equal(state[0], torch.ones(1))
    groups = key.shape[1]
    key, value = widened(key, HEADS), widened(value, HEADS)
    weights, _ = weights_of(query, key, ends, arguments, logarithms)
    grad_value = torch.einsum("hqk,qhd->khd", weights, grad)
    grad_weights = torch.einsum("qhd,khd->hqk", grad, value)
    mean = (grad * output).sum(-1).t()[:, :, None]
    grad_scores = weights * (grad_weights - mean) * arguments.scale
    grad_query = torch.einsum("hqk,khd->qhd", grad_scores, key)
    grad_key = torch.einsum("hqk,qhd->khd", grad_scores, query)
    of_groups = (x.unflatten(1, (groups, -1)).sum(2) for x in (grad_key, grad_value))
    return grad_query, *of_groups


PLAIN = FlashKernels(forward=plain_forward, backward=plain_backward)


def tensors(lengths, groups, v_channels=HEAD_DIM):
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, HEAD_DIM), (groups, HEAD_DIM), (groups, v_channels))
    heads = [torch.randn(sum(lengths), *shape, generator=generator) for shape in shapes]
    # One sink far above all scores, one far below.
    sinks = torch.tensor([0.3, 8.0, -20.0, 1.0])
    return [tensor.requires_grad_() for tensor in (*heads, sinks)]


def by_kernels(state, lengths, groups, window, v_channels):
    inputs = tensors(lengths, groups, v_channels)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    arguments = FlashArguments(scale=SCALE, window=window, longest=max(lengths))
    output = flash_attention(*inputs[:3], ends, inputs[3], arguments, kernels=PLAIN)
    return output.detach(), torch.autograd.grad(output.square().sum(), inputs)


def written_out(lengths, groups, window, v_channels):
    inputs = tensors(lengths, groups, v_channels)
    outputs = []
    for document in zip(*(x.split(lengths) for x in inputs[:3]), strict=True):
        heads_first = [x.transpose(0, 1)[None] for x in document]
        mask = causal_mask(len(document[0]), window, CPU)
        attended = attention_with_sinks(*heads_first, inputs[3], mask=mask, scale=SCALE)
        outputs.append(attended[0].transpose(0, 1))
    output = torch.cat(outputs)
    return output.detach(), torch.autograd.grad(output.square().sum(), inputs)


@pytest.mark.parametrize("v_channels", [HEAD_DIM, 5])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[7], [1, 6, 3]])
def test_sinks_from_kernels_without_them_equal_a_softmax_with_one_more_score(
    lengths, groups, window, v_channels
):
    job = (lengths, groups, window, v_channels)
    [(output, grads)] = run_ranks(ParallelLayout(), by_kernels, *job)
    expected, expected_grads = written_out(*job)
    assert output.shape == (sum(lengths), HEADS, v_channels)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.abs().max() > 0
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def kernel_shapes(state, window, v_channels):
    """Torch's own kernels where no number is computed, only shapes."""
    shapes = ((4, 16), (2, 16), (2, v_channels), None)
    inputs = [
        torch.empty((12, *shape) if shape else (4,), dtype=torch.bfloat16, device="meta")
        for shape in shapes
    ]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    arguments = FlashArguments(scale=SCALE, window=window, longest=8)
    output = flash_attention(*inputs[:3], ends, inputs[3], arguments)
    grads = torch.autograd.grad(output.sum(), inputs)
    without_sinks = flash_attention(*inputs[:3], ends, None, arguments)
    assert without_sinks.shape == output.shape == (12, 4, v_channels)
    return [(grad.shape, grad.dtype) for grad in grads]


@pytest.mark.parametrize("v_channels", [16, 8])
@pytest.mark.parametrize("window", [None, 3])
def test_torchs_kernels_take_what_they_are_given(window, v_channels):
    [answers] = run_ranks(ParallelLayout(), kernel_shapes, window, v_channels)
    shapes = ((12, 4, 16), (12, 2, 16), (12, 2, v_channels), (4,))
    assert answers == [(shape, torch.bfloat16) for shape in shapes]


def test_the_window_is_told_in_the_words_of_the_kernels():
    assert FlashArguments(scale=1.0, window=None, longest=1).bounds == (-1, 0)
    assert FlashArguments(scale=1.0, window=127, longest=1).bounds == (127, 0)


def half_precision(state):
    inputs = [x.detach().bfloat16().requires_grad_() for x in tensors([6], 2)]
    ends = torch.tensor([0, 6], dtype=torch.int32)
    arguments = FlashArguments(scale=SCALE, window=None, longest=6)
    kernels = FlashKernels(forward=_in_half(plain_forward), backward=_in_half(plain_backward))
    output = FlashAttention.apply(*inputs, ends, arguments, kernels)
    output.sum().backward()
    return output.dtype, [x.grad.dtype for x in inputs]


def _in_half(kernel):
    """As on a GPU: queries to outputs in bfloat16, logarithms in float32."""

    def wrapped(*arguments):
        answers = kernel(
            *(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments)
        )
        return [x.bfloat16() if torch.is_tensor(x) and x.shape[0] != HEADS else x for x in answers]

    return wrapped


def test_dtypes_stay_those_of_the_inputs():
    [(dtype, grad_dtypes)] = run_ranks(ParallelLayout(), half_precision)
    assert dtype == torch.bfloat16
    assert grad_dtypes == [torch.bfloat16] * 4
