import pytest
import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from transformers import Gemma3TextConfig, Glm4Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.glm4.modeling_glm4 import Glm4DecoderLayer

from mtrain.model.norm import LayerNorm, RMSNorm
from mtrain.model.residual import NormedResidual
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks

HIDDEN = 16
SMALL = {
    "hidden_size": HIDDEN,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
}
# Our names of the weights, and those of the Hugging Face layer.
GLM4 = {
    "input_layernorm": "input_layernorm",
    "self_attention": "self_attn",
    "self_attn_bda.norm": "post_self_attn_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp": "mlp",
    "mlp_bda.norm": "post_mlp_layernorm",
}
GEMMA3 = GLM4 | {
    "self_attn_bda.norm": "post_attention_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "mlp_bda.norm": "post_feedforward_layernorm",
}


class Sublayer(torch.nn.Linear):
    """In the place of attention or an MLP; like Megatron-Core's it leaves its bias to others."""

    def __init__(self, **_arguments):
        super().__init__(HIDDEN, HIDDEN)

    def forward(self, hidden, **_arguments):
        # Not the parameter itself: a recomputed MLP that returns it makes Megatron-Core 0.16.1
        # recompute without end.
        return hidden @ self.weight.t(), self.bias.clone()


class HuggingFaceAttention(torch.nn.Linear):
    def forward(self, hidden_states, **_arguments):
        return super().forward(hidden_states), None


def our_layer(**fields):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        **fields,
    )
    add = ModuleSpec(module=NormedResidual, params={"config": config})
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(module=Sublayer),
        self_attn_bda=add,
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(module=Sublayer),
        mlp_bda=add,
    )
    layer = TransformerLayer(config, submodules)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return layer


def hidden_states():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 2, HIDDEN, generator=generator).requires_grad_()


def output_and_grads(function, module):
    hidden = hidden_states()
    output = function(hidden)
    output.square().sum().backward()
    return output.detach(), {
        "hidden": hidden.grad,
        **{name: parameter.grad for name, parameter in module.named_parameters()},
    }


def ours_with(state, recomputes_all, fields):
    layer = our_layer(**fields).train()

    def run(hidden):
        return layer(hidden_states=hidden, attention_mask=None)[0]

    if recomputes_all:
        return output_and_grads(lambda hidden: checkpoint(run, False, hidden), layer)
    return output_and_grads(run, layer)


def ours_and_hugging_face(state, names, fields):
    if names == GLM4:
        theirs = Glm4DecoderLayer(Glm4Config(**SMALL, pad_token_id=0), 0)
    else:
        theirs = Gemma3DecoderLayer(Gemma3TextConfig(**SMALL, pad_token_id=0), 0)
    theirs.self_attn = HuggingFaceAttention(HIDDEN, HIDDEN)
    theirs.mlp = torch.nn.Linear(HIDDEN, HIDDEN)
    weights = our_layer(**fields).state_dict()
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        theirs.get_parameter(f"{names[module]}.{kind}").data.copy_(weight)
    ours = ours_with(state, False, fields)
    return ours, output_and_grads(theirs, theirs)


@pytest.mark.parametrize(
    ("names", "fields"),
    [(GLM4, {}), (GEMMA3, {"layernorm_zero_centered_gamma": True})],
    ids=["glm4", "gemma3"],
)
def test_a_layer_with_norms_after_its_sublayers_equals_hugging_face(names, fields):
    [((output, grads), (expected, expected_grads))] = run_ranks(
        ParallelLayout(), ours_and_hugging_face, names, fields
    )
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert len(grads) == len(expected_grads)
    for name, grad in grads.items():
        module, _, kind = name.rpartition(".")
        expected_grad = expected_grads[f"{names[module]}.{kind}" if module else name]
        error = (grad - expected_grad).abs().max()
        assert error <= 1e-5 * expected_grad.abs().max(), name


@pytest.mark.parametrize(
    ("recomputes_all", "modules"), [(True, None), (False, "layernorm"), (False, "mlp")]
)
def test_recomputation_does_not_change_gradients(recomputes_all, modules):
    fields = {}
    if modules is not None:
        fields = {"recompute_granularity": "selective", "recompute_modules": [modules]}
    [(expected, expected_grads)] = run_ranks(ParallelLayout(), ours_with, False, {})
    [(output, grads)] = run_ranks(ParallelLayout(), ours_with, recomputes_all, fields)
    assert torch.equal(output, expected)
    for name, grad in expected_grads.items():
        # A recomputed norm adds up two gradients of its input in another order.
        assert (grads[name] - grad).abs().max() <= 2e-6 * grad.abs().max(), name


def test_the_weight_is_that_of_the_norm_which_the_config_names():
    fields = {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 2}
    with_bias = NormedResidual(TransformerConfig(**fields, normalization="LayerNorm"))
    assert isinstance(with_bias.norm, LayerNorm)
    config = TransformerConfig(**fields, normalization="RMSNorm", layernorm_epsilon=1e-3)
    module = NormedResidual(config)
    assert [name for name, _ in module.named_parameters()] == ["norm.weight"]
    assert module.norm.eps == 1e-3


def test_dropout_is_not_built():
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=2)
    hidden = hidden_states()
    with pytest.raises(AssertionError):
        NormedResidual(config)(True, False)((hidden, None), hidden, 0.1)
