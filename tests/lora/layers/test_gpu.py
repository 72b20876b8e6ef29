"""Frozen linears with adapters on the kernels of a GPU; needs one."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from mtrain.lora.layers.fused import Dropped, frozen_linear
from mtrain.lora.layers.grouped import frozen_grouped_linear
from mtrain.lora.layers.products import add_up
from tests.lora.layers.test_fused import plain
from tests.lora.layers.test_grouped import plain as plain_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENS, IN, OUT, RANK = 1024, 512, 768, 8


def scales_of(num_projections):
    if num_projections == 1:
        return 2.0
    sizes = [OUT // num_projections] * num_projections
    return torch.block_diag(*(torch.full((size, 1), 0.3) for size in sizes)).cuda()


def dropout_of(tokens):
    with torch.no_grad():
        values, mask = torch.native_dropout(tokens, 0.25, True)
    return Dropped(values=values, mask=mask, scale=1 / 0.75)


def tensors(num_projections, *experts):
    """(tokens, weight, A, B) in bfloat16; all but the weight require gradients."""
    torch.manual_seed(0)
    shapes = ((OUT, IN), (num_projections * RANK, IN), (OUT, RANK))
    tokens = torch.randn(TOKENS, IN, device="cuda")
    made = [tokens, *(torch.randn(*experts, *shape, device="cuda") * 0.05 for shape in shapes)]
    tokens, weight, *factors = [tensor.bfloat16() for tensor in made]
    return [tokens.requires_grad_(), weight, *(factor.requires_grad_() for factor in factors)]


def assert_near(ours, expected, trained, trained_in_float32):
    """Rounding of bfloat16 is all that differs."""
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(ours, trained, grad.bfloat16())
    expected_grads = torch.autograd.grad(expected, trained_in_float32, grad)
    pairs = zip((ours, *grads), (expected, *expected_grads), strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == torch.bfloat16
        error = (mine.float() - theirs).norm() / theirs.norm()
        assert error < 1e-2


@pytest.mark.parametrize("num_projections", [1, 3])
@pytest.mark.parametrize("has_dropout", [False, True])
def test_a_linear_is_near_that_in_float32(num_projections, has_dropout):
    tokens, weight, *factors = tensors(num_projections)
    dropped = dropout_of(tokens) if has_dropout else None
    options = {"scales": scales_of(num_projections), "dropped": dropped}
    ours = frozen_linear(tokens, weight, None, *factors, **options)
    trained = [tokens, *factors]
    floats = [tensor.detach().float().requires_grad_() for tensor in trained]
    expected = plain(floats[0], weight.float(), None, *floats[1:], **options)
    assert_near(ours, expected, trained, floats)


@pytest.mark.parametrize("counts", [(300, 200, 500, 24), (0, 1000, 0, 24), (0, 0, 1024, 0)])
@pytest.mark.parametrize("num_projections", [1, 2, 3])
@pytest.mark.parametrize("has_dropout", [False, True])
def test_experts_are_near_those_in_float32(counts, num_projections, has_dropout):
    """Also experts without rows, whose gradients no kernel may leave as they were in memory."""
    tokens, weight, *factors = tensors(num_projections, len(counts))
    dropped = dropout_of(tokens) if has_dropout else None
    options = {"scales": scales_of(num_projections), "dropped": dropped}
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    ours = frozen_grouped_linear(tokens, ends, weight, *factors, **options)
    trained = [tokens, *factors]
    floats = [tensor.detach().float().requires_grad_() for tensor in trained]
    expected = plain_experts(floats[0], ends, weight.float(), *floats[1:], **options)
    assert_near(ours, expected, trained, floats)
    grads = torch.autograd.grad(
        frozen_grouped_linear(tokens, ends, weight, *factors, **options).sum(), factors
    )
    for grad in grads:
        empty = [expert for expert, count in enumerate(counts) if count == 0]
        assert not grad[empty].any()


def test_with_a_b_of_zero_the_bits_are_those_of_the_linear():
    for out_size in (768, 1536, 2048, 6144):
        tokens = torch.randn(2048, 1024, device="cuda").bfloat16()
        weight = torch.randn(out_size, 1024, device="cuda").bfloat16()
        factors = (weight[:16], weight.new_zeros(out_size, 16))
        output = frozen_linear(tokens, weight, None, *factors, scales=2.0, dropped=None)
        assert torch.equal(output, F.linear(tokens, weight)), out_size


@pytest.mark.parametrize("num_projections", [1, 2])
def test_with_a_b_of_zero_the_bits_are_those_of_the_experts(num_projections):
    tokens, weight, lora_a, lora_b = tensors(num_projections, 4)
    ends = torch.tensor([300, 300, 1000, TOKENS], device="cuda", dtype=torch.int32)
    factors = (lora_a, torch.zeros_like(lora_b))
    scales = scales_of(num_projections)
    output = frozen_grouped_linear(tokens, ends, weight, *factors, scales=scales, dropped=None)
    assert torch.equal(output, F.grouped_mm(tokens, weight.transpose(1, 2), offs=ends))


@pytest.mark.parametrize("num_projections", [1, 3])
def test_dropout_draws_what_torch_draws(num_projections):
    tokens, *_ = tensors(num_projections)
    torch.manual_seed(5)
    expected = F.dropout(tokens, 0.25)
    torch.manual_seed(5)
    assert torch.equal(dropout_of(tokens).values, expected)


def kernels(function):
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        function()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    return [event.name for event in events]


def test_nothing_is_copied_and_nothing_added_by_a_kernel_of_its_own():
    tokens, weight, *factors = tensors(1)
    grad = torch.randn(TOKENS, OUT, device="cuda").bfloat16()

    def step():
        output = frozen_linear(tokens, weight, None, *factors, scales=2.0, dropped=None)
        torch.autograd.grad(output, (tokens, *factors), grad)

    names = kernels(step)
    assert names
    elsewhere = [name for name in names if "Memcpy" in name or "elementwise" in name]
    assert not elsewhere


def test_nothing_is_added_to_experts_by_a_kernel_of_its_own():
    tokens, weight, *factors = tensors(1, 4)
    ends = torch.tensor([300, 300, 1000, TOKENS], device="cuda", dtype=torch.int32)
    grad = torch.randn(TOKENS, OUT, device="cuda").bfloat16()

    def step():
        output = frozen_grouped_linear(tokens, ends, weight, *factors, scales=1.0, dropped=None)
        torch.autograd.grad(output, (tokens, *factors), grad)

    names = kernels(step)
    assert names
    assert not [name for name in names if "Functor_add" in name]


def test_adding_up_in_place_copies_nothing():
    output = torch.randn(TOKENS, OUT, device="cuda").bfloat16()
    low_rank = torch.randn(TOKENS, RANK, device="cuda").bfloat16()
    lora_b = torch.randn(OUT, RANK, device="cuda").bfloat16()
    names = kernels(lambda: add_up(output, low_rank, lora_b, 2.0))
    assert names
    assert not [name for name in names if "Memcpy" in name or "elementwise" in name]
