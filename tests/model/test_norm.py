import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from mtrain.model.norm import LayerNorm, RMSNorm, norm_class
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks


def config_with(**fields):
    return TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, **fields)


def normed_by_both(state, ours, theirs, dtype):
    """(our output and gradients, theirs) with the same random weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(3, 2, 16, generator=generator) * 3).to(dtype).requires_grad_()
    with torch.no_grad():
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            parameter.copy_(torch.randn(16, generator=generator))
            other.copy_(parameter)
    results = []
    for norm in (ours, theirs):
        output = norm(hidden)
        grads = torch.autograd.grad(output.square().sum(), [hidden, *norm.parameters()])
        results.append((output.detach(), *grads))
    return results


def test_norm_equals_hugging_face():
    ours, theirs = RMSNorm(config_with(), 16, eps=1e-6), Qwen3RMSNorm(16, eps=1e-6)
    for our, their in zip(*normed_by_both(None, ours, theirs, torch.float32), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def zero_centered(state, judge, dtype):
    config = config_with(layernorm_zero_centered_gamma=True, params_dtype=dtype)
    ours, theirs = RMSNorm(config, 16, eps=1e-6), judge(16, eps=1e-6).to(dtype)
    return normed_by_both(state, ours, theirs, dtype)


@pytest.mark.parametrize("judge", [Gemma3RMSNorm, Qwen3NextRMSNorm])
def test_zero_centered_norm_equals_hugging_face(judge):
    [results] = run_ranks(ParallelLayout(), zero_centered, judge, torch.float32)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_zero_centered_norm_in_half_precision_is_rounded_where_hugging_face_rounds():
    [((ours, *_), (theirs, *_))] = run_ranks(
        ParallelLayout(), zero_centered, Gemma3RMSNorm, torch.bfloat16
    )
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_layer_norm_equals_that_of_gpt2():
    ours, theirs = LayerNorm(config_with(), 16, eps=1e-6), torch.nn.LayerNorm(16, eps=1e-6)
    for our, their in zip(*normed_by_both(None, ours, theirs, torch.float32), strict=True):
        assert torch.equal(our, their)


def test_layer_norm_refuses_a_zero_centered_weight():
    with pytest.raises(AssertionError):
        LayerNorm(config_with(layernorm_zero_centered_gamma=True), 16)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_gradients_are_marked_for_reduction_under_sequence_parallelism(norm, tp_size):
    config = config_with(sequence_parallel=tp_size > 1, tensor_model_parallel_size=tp_size)
    parameters = dict(norm(config, 16).named_parameters())
    assert parameters.keys() == ({"weight"} if norm is RMSNorm else {"weight", "bias"})
    assert all(p.sequence_parallel == (tp_size > 1) for p in parameters.values())


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_weights_have_the_dtype_of_the_model(norm):
    module = norm(config_with(params_dtype=torch.bfloat16), 16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_the_config_chooses_the_norm():
    assert norm_class(config_with(normalization="RMSNorm")) is RMSNorm
    assert norm_class(config_with(normalization="LayerNorm")) is LayerNorm
