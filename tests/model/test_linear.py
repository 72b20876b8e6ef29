import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig

from mtrain.model.activation import swiglu
from mtrain.model.linear import ColumnLinear, RowLinear
from mtrain.model.norm import NormInput
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks

IN, OUT = 12, 20


def built(kind, layout, *, has_bias=False, skips_bias=True, is_sequence_parallel=False):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=IN,
        num_attention_heads=2,
        tensor_model_parallel_size=layout.tp_size,
        sequence_parallel=is_sequence_parallel,
        perform_initialization=False,
    )
    more = {"gather_output": False}
    if issubclass(kind, RowParallelLinear):
        more = {"input_is_parallel": True}
    torch.manual_seed(0)
    linear = kind(
        IN,
        OUT,
        config=config,
        init_method=None,
        bias=has_bias,
        skip_bias_add=skips_bias,
        **more,
    )
    for parameter in linear.parameters():
        parameter.data.normal_()
        parameter.main_grad = torch.ones(parameter.shape)
        parameter.grad_added_to_main_grad = False
    linear.gradient_accumulation_fusion = True
    return linear


def compare(state, ours, theirs, has_bias, skips_bias):
    results = []
    for kind in (ours, theirs):
        linear = built(kind, state.layout, has_bias=has_bias, skips_bias=skips_bias)
        width = linear.weight.shape[1]
        hidden = torch.arange(3.0 * 2 * width).view(3, 2, width).cos().requires_grad_()
        output, bias = linear(hidden)
        (output**2).sum().backward()
        assert linear.weight.grad_added_to_main_grad
        assert (bias is not None) == (has_bias and skips_bias)
        grads = [linear.weight.main_grad, hidden.grad]
        if has_bias and not skips_bias:
            grads.append(linear.bias.grad)
        results.append([output.detach(), *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(("has_bias", "skips_bias"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize(
    "kinds", [(ColumnLinear, ColumnParallelLinear), (RowLinear, RowParallelLinear)]
)
def test_they_compute_what_megatron_cores_do(tp_size, has_bias, skips_bias, kinds) -> None:
    layout = ParallelLayout(world_size=tp_size, tp_size=tp_size)
    run_ranks(layout, compare, *kinds, has_bias, skips_bias)


def frozen(state):
    linear = built(ColumnLinear, state.layout)
    linear.weight.requires_grad = False
    hidden = torch.randn(3, 2, IN).requires_grad_()
    output, _ = linear(hidden)
    output.sum().backward()
    assert torch.equal(linear.weight.main_grad, torch.ones(OUT, IN))
    torch.testing.assert_close(hidden.grad, linear.weight.sum(0).expand(3, 2, IN))


def test_a_frozen_weight_has_no_gradient() -> None:
    run_ranks(ParallelLayout(), frozen)


def behind_swiglu(state, is_sequence_parallel):
    results = []
    for kind in (RowLinear, RowParallelLinear):
        linear = built(kind, state.layout, is_sequence_parallel=is_sequence_parallel)
        width = 2 * linear.weight.shape[1]
        hidden = torch.arange(4.0 * 2 * width).view(4, 2, width).cos().requires_grad_()
        if kind is RowLinear:
            # A CPU is faster with the activation kept.
            assert not linear.fuses_swiglu(hidden)
            output, bias = linear(hidden, applies_swiglu=True)
        else:
            output, bias = linear(swiglu(hidden))
        assert bias is None
        (output**2).sum().backward()
        assert linear.weight.grad_added_to_main_grad
        results.append([output.detach(), linear.weight.main_grad, hidden.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("tp_size", "is_sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_swiglu_and_the_linear_are_one_function_on_demand(tp_size, is_sequence_parallel) -> None:
    layout = ParallelLayout(world_size=tp_size, tp_size=tp_size)
    run_ranks(layout, behind_swiglu, is_sequence_parallel)


def behind_a_norm(state, is_zero_centered):
    results = []
    torch.manual_seed(1)
    start, norm_start = torch.randn(3, 2, IN), torch.randn(IN)
    for is_made_again in (False, True):
        linear = built(ColumnLinear, state.layout)
        hidden = start.clone().requires_grad_()
        weight = norm_start.clone().requires_grad_()
        source = NormInput(
            hidden=hidden, weight=weight, eps=1e-6, is_zero_centered=is_zero_centered
        )
        normed = source.normed()
        if is_made_again:
            # As the norm says itself where a kernel of ours makes it.
            normed.norm_input = source
        output, _ = linear(normed)
        kept = [tensor.data_ptr() for tensor in output.grad_fn.saved_tensors]
        assert (normed.data_ptr() in kept) != is_made_again
        (output**2).sum().backward()
        results.append([output.detach(), linear.weight.main_grad, hidden.grad, weight.grad])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("is_zero_centered", [False, True])
def test_the_output_of_a_norm_is_made_again_instead_of_kept(is_zero_centered) -> None:
    run_ranks(ParallelLayout(), behind_a_norm, is_zero_centered)
