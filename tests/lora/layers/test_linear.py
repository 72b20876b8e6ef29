"""Adapted linears where training does not reach by itself: no tokens, other dtypes."""

import pytest
import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.lora.layers.linear import adapt_column_linear, adapt_row_linear
from tests.adapters import attached, plan_of, random_factors
from tests.lora.layers.test_factors import make_factors
from tests.megatron import SINGLE, packed_inputs
from tests.ranks import run_ranks
from tests.test_invariance import layout
from tests.tiny import make_checkpoint


def experts_without_tokens(state, folder, lora, values):
    (model,) = attached(state, folder, lora, values)
    linear = model.decoder.layers[0].mlp.experts.linear_fc1
    output = linear(torch.zeros(0, 64), torch.zeros(4, dtype=torch.int32))
    output.sum().backward()
    gradients = [linear.adapter.lora_a.grad, linear.adapter.lora_b.grad]
    return tuple(output.shape), [bool((gradient == 0).all()) for gradient in gradients]


def test_experts_without_tokens_have_gradients_of_zero(tmp_path):
    """A missing gradient would leave a data-parallel reduction waiting."""
    folder = make_checkpoint(tmp_path, "qwen3_moe")
    table, lora = plan_of(folder)
    values = random_factors(table, lora)
    ((shape, are_zero),) = run_ranks(SINGLE, experts_without_tokens, folder, lora, values)
    assert shape == (0, 96)
    assert are_zero == [True, True]


def losses_with(state, folder, lora, values, dtype, adapter_dtype):
    (model,) = attached(state, folder, lora, values, dtype=dtype, adapter_dtype=adapter_dtype)
    losses, _ = model(**packed_inputs([16, 16], 131))
    losses.sum().backward()
    factor = model.decoder.layers[0].self_attention.linear_qkv.adapter.lora_a
    return losses.mean().item(), factor.dtype, factor.grad.dtype


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_float32_adapters_train_on_a_bfloat16_model(name, tmp_path):
    folder = make_checkpoint(tmp_path, name)
    table, lora = plan_of(folder)
    values = random_factors(table, lora)
    options = (folder, lora, values)
    ((loss, _, _),) = run_ranks(SINGLE, losses_with, *options, torch.float32, torch.float32)
    ((half, dtype, gradient_dtype),) = run_ranks(
        SINGLE, losses_with, *options, torch.bfloat16, torch.float32
    )
    assert dtype == gradient_dtype == torch.float32
    assert half == pytest.approx(loss, rel=1e-2)


def shared_experts_both_ways(state, folder, lora, values):
    """Outputs and gradients of shared experts, with communication in the linears and outside."""
    (model,) = attached(state, folder, lora, values)
    experts, group = model.decoder.layers[0].mlp.shared_experts, state.groups.tp
    generator = torch.Generator().manual_seed(0)
    tokens, factors = torch.randn(2, 8, 1, 64, generator=generator).unbind()
    mine = slice(4 * state.coordinates.tp_rank, 4 * state.coordinates.tp_rank + 4)
    results = []
    for is_local in (False, True):
        model.zero_grad()
        experts.linear_fc1.adapter.is_local = experts.linear_fc2.adapter.is_local = is_local
        if is_local:
            # As Megatron-Core does it where they overlap with the token exchange.
            experts.linear_fc1.explicit_expert_comm = True
            experts.linear_fc2.explicit_expert_comm = True
            all_tokens = gather_from_sequence_parallel_region(tokens[mine], group=group)
            hidden, _ = experts.linear_fc1(all_tokens)
            gate, up = hidden.chunk(2, dim=-1)
            summands, _ = experts.linear_fc2(torch.nn.functional.silu(gate) * up)
            output = reduce_scatter_to_sequence_parallel_region(summands, group=group)
            output = output * experts._score(tokens[mine])
        else:
            output = experts(tokens[mine])
        (output * factors[mine]).sum().backward()
        gradients = {}
        for name, parameter in experts.named_parameters():
            if parameter.requires_grad:
                gradients[name] = parameter.grad.clone()
                if hasattr(parameter, "sequence_parallel"):
                    # What Megatron-Core does before the optimizer.
                    torch.distributed.all_reduce(gradients[name], group=group)
        results.append((output.detach(), gradients))
    return results


def test_shared_experts_that_overlap_with_the_token_exchange_compute_the_same(tmp_path):
    """Their linears get all tokens and leave sums to others; only GPUs have the streams for it."""
    folder = make_checkpoint(tmp_path, "qwen2_moe")
    table, lora = plan_of(folder)
    values = random_factors(table, lora)
    sizes = layout(tp_size=2)
    for results in run_ranks(sizes, shared_experts_both_ways, folder, lora, values):
        (expected, gradients), (output, others) = results
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        assert len(gradients) == 6
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def dropped_shares(state, folder, lora, values):
    """Losses of the same tokens twice, with dropout."""
    (model,) = attached(state, folder, lora, values, dropout=0.5)
    losses = []
    for _ in range(2):
        loss, _ = model(**packed_inputs([16, 16], 131))
        losses.append(loss.sum().item())
    return losses


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe"])
def test_dropout_reaches_linears_that_every_rank_holds_whole(name, tmp_path):
    folder = make_checkpoint(tmp_path, name)
    targets = {"deepseek_v3": "kv_a_proj_with_mqa", "qwen2_moe": "shared_expert_gate"}
    table, lora = plan_of(folder, target_modules=(targets[name],), lora_alpha=64.0)
    values = random_factors(table, lora)
    arguments = (folder, lora, values)
    first, second = run_ranks(layout(tp_size=2), dropped_shares, *arguments)
    assert first == second, "ranks computed different losses"
    assert first[0] != first[1], "nothing was dropped"


def linear_of(state, kind, *, skip_bias_add=False):
    """A frozen linear of Megatron-Core and the class that it has with an adapter."""
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, perform_initialization=False
    )
    classes = {"column": ColumnParallelLinear, "row": RowParallelLinear}
    is_parallel = {"input_is_parallel": True} if kind == "row" else {}
    linear = classes[kind](
        6,
        8,
        config=config,
        init_method=None,
        bias=True,
        skip_bias_add=skip_bias_add,
        tp_group=state.groups.tp,
        **is_parallel,
    )
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    linear.requires_grad_(False)
    adapt = adapt_column_linear if kind == "column" else adapt_row_linear
    return linear, adapt(type(linear))


def give_adapter(linear, adapted):
    linear.adapter = make_factors()
    linear.__class__ = adapted


def fused_and_not(state, kind, skip_bias_add):
    """(output, bias, gradients, whether the base ran) in one function and, as if the bias were
    trained, in several."""
    results = []
    for is_fused in (True, False):
        torch.manual_seed(1)
        linear, adapted = linear_of(state, kind, skip_bias_add=skip_bias_add)
        give_adapter(linear, adapted)
        linear.bias.requires_grad_(not is_fused)
        calls = []
        linear._forward_impl = lambda calls=calls, linear=linear, **options: (
            calls.append(None) or type(linear)._forward_impl(linear, **options)
        )
        tokens = torch.randn(5, 2, 6, requires_grad=True)
        output, bias = linear(tokens)
        output.square().sum().backward()
        gradients = [t.grad for t in (tokens, *linear.adapter.parameters())]
        bias = bias if bias is None else bias.detach()
        results.append((output.detach(), bias, gradients, bool(calls)))
    return results


@pytest.mark.parametrize("skip_bias_add", [False, True])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_linear_on_one_rank_computes_the_same_in_one_function(kind, skip_bias_add):
    ((fused, several),) = run_ranks(SINGLE, fused_and_not, kind, skip_bias_add)
    assert not fused[-1]
    assert several[-1]
    torch.testing.assert_close(fused[:-1], several[:-1])
    assert (fused[1] is not None) == skip_bias_add


def test_swiglu_is_not_left_to_a_linear_with_an_adapter():
    class FusesSwiGLU(RowParallelLinear):
        def fuses_swiglu(self, _hidden):
            return True

    assert not adapt_row_linear(FusesSwiGLU).fuses_swiglu(None, torch.ones(1))


def with_another_weight(state):
    linear, adapted = linear_of(state, "column")
    give_adapter(linear, adapted)
    tokens, weight = torch.randn(5, 2, 6), torch.randn(8, 6)
    output, _ = linear(tokens, weight=weight, runtime_gather_output=True)
    linear.weight.copy_(weight)
    return torch.equal(output, linear(tokens)[0])


def test_a_linear_with_a_tied_weight_uses_that():
    """The output layer of a model whose embedding is its weight."""
    assert run_ranks(SINGLE, with_another_weight) == [True]


def recomputed_input(state, kind):
    """Gradients where the input is thrown away and made again for backward, and where it is not."""
    torch.manual_seed(1)
    linear, adapted = linear_of(state, kind)
    give_adapter(linear, adapted)
    tokens = torch.randn(5, 2, 6, requires_grad=True)
    results = []
    for is_recomputed in (False, True):
        if is_recomputed:
            recompute = CheckpointWithoutOutput()
            output, _ = linear(recompute.checkpoint(torch.tanh, tokens))
            output = output * 1
            recompute.discard_output_and_register_recompute(output)
        else:
            output, _ = linear(tokens.tanh())
        trained = (tokens, *linear.adapter.parameters())
        for tensor in trained:
            tensor.grad = None
        output.sum().backward()
        results.append([tensor.grad.clone() for tensor in trained])
    return results


@pytest.mark.parametrize("kind", ["column", "row"])
def test_an_input_may_be_thrown_away_and_made_again(kind):
    """What Megatron-Core does with norms and activations in selective recomputation."""
    ((kept, made_again),) = run_ranks(SINGLE, recomputed_input, kind)
    assert all(map(torch.equal, kept, made_again))
