import pickle

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import GptOssConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from mtrain.model.activation import activation_function, gated, swiglu, swiglu_backward
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks

INNER = 12
# Wide enough that the clamp of 1.5 below cuts off many on both sides.
GPT_OSS = {"activation_func_clamp_value": 1.5, "glu_linear_offset": 1.0}


def config_with(name, **fields):
    return TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        gated_linear_unit=True,
        activation_func=activation_function(name),
        add_bias_linear=False,
        **fields,
    )


def random_hidden(rows=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 2 * INNER, generator=generator) * 2


@pytest.mark.parametrize(
    ("name", "hf_name"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_pytorch_tanh"),
        ("gelu_tanh", "gelu_new"),
        ("quick_gelu", "quick_gelu"),
    ],
)
def test_activations_are_those_of_transformers(name, hf_name):
    hidden = random_hidden()
    [ours] = run_ranks(ParallelLayout(), activated, name)
    torch.testing.assert_close(ours, ACT2FN[hf_name](hidden), rtol=1e-5, atol=1e-6)


def activated(state, name):
    return activation_function(name)(random_hidden())


def test_exact_and_approximate_gelu_differ():
    hidden = random_hidden()
    exact, approximate = activation_function("gelu"), activation_function("gelu_tanh")
    assert not torch.allclose(exact(hidden), approximate(hidden), rtol=1e-5, atol=1e-6)


def test_megatron_core_recognises_what_it_can_fuse():
    assert activation_function("silu") is F.silu
    assert activation_function("gelu") is F.gelu
    assert activation_function("quick_gelu") is quick_gelu


def test_the_approximate_gelu_can_be_pickled():
    gelu_tanh = activation_function("gelu_tanh")
    assert pickle.loads(pickle.dumps(gelu_tanh)) is gelu_tanh


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation 'swish' is not built; there are silu, gelu"):
        activation_function("swish")


def gated_and_gradients(state, name, fields, has_probs, dtype=torch.float32):
    hidden = random_hidden().to(dtype).requires_grad_()
    inputs, probs = [hidden], None
    if has_probs:
        probs = torch.rand(6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        inputs.append(probs)
    output = gated(hidden, config_with(name, **fields), probs)
    return output.detach(), torch.autograd.grad(output.square().sum(), inputs)


def gpt_oss_gate(has_probs):
    """Of transformers' experts, which interleave gates with the rest."""
    hidden, probs = random_hidden().requires_grad_(), torch.ones(6)
    inputs = [hidden]
    if has_probs:
        probs = torch.rand(6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        inputs.append(probs)
    interleaved = torch.stack(hidden.chunk(2, dim=-1), dim=-1).flatten(-2)
    config = GptOssConfig(
        hidden_size=8, intermediate_size=INNER, num_local_experts=1, swiglu_limit=1.5
    )
    output = GptOssExperts(config)._apply_gate(interleaved) * probs[:, None]
    return output.detach(), torch.autograd.grad(output.square().sum(), inputs)


@pytest.mark.parametrize("has_probs", [False, True])
def test_clamp_and_offset_are_those_of_gpt_oss(has_probs):
    [(output, grads)] = run_ranks(
        ParallelLayout(), gated_and_gradients, "quick_gelu", GPT_OSS, has_probs
    )
    expected, expected_grads = gpt_oss_gate(has_probs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert (expected_grads[0] == 0).any(), "nothing was cut off"
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


class Passing(torch.nn.Module):
    """In the place of a linear of Megatron-Core."""

    def __init__(self, *_sizes, **_arguments):
        super().__init__()

    def forward(self, hidden):
        return hidden, None


def inside_megatron(state, name, fields):
    """What Megatron-Core's MLP has between two linears that do nothing, and ours."""
    config = config_with(name, **fields)
    submodules = MLPSubmodules(linear_fc1=Passing, linear_fc2=Passing)
    mlp = MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size)
    probs = torch.rand(6, generator=torch.Generator().manual_seed(1))
    output, _ = mlp(random_hidden(), per_token_scale=probs)
    return output, gated(random_hidden(), config, probs)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("silu", {}), ("gelu", {}), ("gelu_tanh", {}), ("quick_gelu", {}), ("quick_gelu", GPT_OSS)],
)
def test_gates_equal_those_of_megatron_core(name, fields):
    [(theirs, ours)] = run_ranks(ParallelLayout(), inside_megatron, name, fields)
    assert torch.equal(ours, theirs)


def test_probabilities_in_float32_leave_half_precision_as_it_is():
    [(output, grads)] = run_ranks(
        ParallelLayout(), gated_and_gradients, "silu", {}, True, torch.bfloat16
    )
    assert output.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]


def test_backward_of_swiglu_gives_its_output_once_more_where_asked():
    hidden = random_hidden().requires_grad_()
    output = swiglu(hidden)
    grad = torch.randn_like(output)
    output.backward(grad)
    for wants_output in (True, False):
        arguments = hidden.detach(), grad
        hidden_grad, again = swiglu_backward(*arguments, wants_output=wants_output)
        assert torch.equal(hidden_grad, hidden.grad)
        assert torch.equal(again, output) if wants_output else again is None
