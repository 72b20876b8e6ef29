import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    param_is_not_tensor_parallel_duplicate,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from mtrain.model.activation import activation_function
from mtrain.model.experts import GroupedExperts
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks

EXPERTS, HIDDEN, INNER = 3, 16, 32
GPT_OSS = {
    "activation_func": "quick_gelu",
    "activation_func_clamp_value": 1.5,
    "glu_linear_offset": 1.0,
    "add_bias_linear": True,
}


def grouped_experts(**fields):
    fields = {"activation_func": "silu", "add_bias_linear": False, **fields}
    fields["activation_func"] = activation_function(fields["activation_func"])
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=INNER,
        gated_linear_unit=True,
        **fields,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["expt_tp"])
    return GroupedExperts(EXPERTS, config, groups)


def grouped_and_one_by_one(state, counts, activation):
    experts = grouped_experts(activation_func=activation)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    tokens = torch.randn(sum(counts), HIDDEN, generator=generator)
    probs = torch.rand(sum(counts), generator=generator)
    output, bias = experts(tokens, torch.tensor(counts), probs)
    assert bias is None
    output.square().sum().backward()
    grads = [experts.linear_fc1.weight.grad.clone(), experts.linear_fc2.weight.grad.clone()]
    experts.zero_grad()

    act = {"silu": F.silu, "gelu": F.gelu}[activation]
    pieces = []
    for expert, rows in enumerate(zip(tokens.split(counts), probs.split(counts), strict=True)):
        gate, up = (rows[0] @ experts.linear_fc1.weight[expert].t()).chunk(2, dim=-1)
        hidden = act(gate) * up * rows[1][:, None]
        pieces.append(hidden @ experts.linear_fc2.weight[expert].t())
    expected = torch.cat(pieces)
    expected.square().sum().backward()
    return output.detach(), expected.detach(), grads, [p.grad for p in experts.parameters()]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("counts", [[4, 3, 5], [0, 7, 1], [2, 0, 0], [0, 0, 0]])
def test_grouped_product_equals_one_expert_after_the_other(counts, activation):
    (result,) = run_ranks(ParallelLayout(), grouped_and_one_by_one, counts, activation)
    output, expected, grads, expected_grads = result
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


# Experts of each token, two a token; expert 1 of the second has none.
ROUTES = {
    "all": [[0, 1], [2, 0], [1, 2], [2, 1], [0, 2]],
    "one_is_empty": [[0, 2], [2, 0], [2, 0], [0, 2]],
}


def case(routes):
    """Tokens, and the router's weights of the experts that each token chose."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(len(routes), HIDDEN, generator=generator)
    weights = torch.rand(len(routes), 2, generator=generator)
    return tokens.requires_grad_(), weights.requires_grad_()


def gpt_oss(routes):
    """Transformers' experts: output, gradients of tokens and weights, parameters, gradients."""
    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, swiglu_limit=1.5
    )
    config._experts_implementation = "eager"
    experts = GptOssExperts(config)
    generator = torch.Generator().manual_seed(2)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    inputs = case(routes)
    output = experts(inputs[0], torch.tensor(routes), inputs[1])
    output.square().sum().backward()
    named = dict(experts.named_parameters())
    return (
        [output.detach(), *(tensor.grad for tensor in inputs)],
        _as_ours({name: parameter.detach() for name, parameter in named.items()}),
        _as_ours({name: parameter.grad for name, parameter in named.items()}),
    )


def _as_ours(tensors):
    """Gates before the rest instead of in turns, and weights [out, in]."""

    def gates_first(rows):
        return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)

    return {
        "linear_fc1.weight": gates_first(tensors["gate_up_proj"].transpose(1, 2)),
        "linear_fc1.bias": gates_first(tensors["gate_up_proj_bias"]),
        "linear_fc2.weight": tensors["down_proj"].transpose(1, 2),
        "linear_fc2.bias": tensors["down_proj_bias"],
    }


def part_of_rank(tensors, rank, size):
    """What expert tensor parallelism leaves on a rank."""

    def gates_and_rest(tensor):
        return torch.cat([half.chunk(size, 1)[rank] for half in tensor.chunk(2, 1)], dim=1)

    return {
        "linear_fc1.weight": gates_and_rest(tensors["linear_fc1.weight"]),
        "linear_fc1.bias": gates_and_rest(tensors["linear_fc1.bias"]),
        "linear_fc2.weight": tensors["linear_fc2.weight"].chunk(size, 2)[rank],
        "linear_fc2.bias": tensors["linear_fc2.bias"],
    }


def ours(state, routes, parameters):
    """What `gpt_oss` gives, of this rank, and its part of the square of the gradient norm."""
    experts = grouped_experts(**GPT_OSS)
    group = state.groups.etp
    local = part_of_rank(parameters, state.coordinates.etp_rank, state.layout.etp_size)
    experts.load_state_dict(local)
    inputs = case(routes)
    # As the token dispatcher does: all ranks have all tokens, and their outputs are summed.
    tokens, weights = (copy_to_tensor_model_parallel_region(x, group=group) for x in inputs)
    chosen = torch.tensor(routes).flatten()
    order = chosen.argsort(stable=True)
    output, _ = experts(
        tokens.repeat_interleave(2, dim=0)[order],
        chosen.bincount(minlength=EXPERTS),
        weights.flatten()[order],
    )
    summed = torch.zeros_like(tokens).index_add(0, order // 2, output)
    summed = reduce_from_tensor_model_parallel_region(summed, group=group)
    summed.square().sum().backward()
    named = dict(experts.named_parameters())
    counted = [
        parameter.grad.square().sum()
        for parameter in named.values()
        if param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter, state.groups.tp)
    ]
    return (
        [summed.detach(), *(tensor.grad for tensor in inputs)],
        {name: parameter.grad for name, parameter in named.items()},
        sum(counted),
    )


@pytest.mark.parametrize("etp_size", [1, 2])
@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
def test_biases_clamp_and_all_gradients_equal_those_of_gpt_oss(routes, etp_size):
    expected, parameters, expected_grads = gpt_oss(routes)
    layout = ParallelLayout(world_size=etp_size, etp_size=etp_size)
    ranks = run_ranks(layout, ours, routes, parameters)
    for rank, (tensors, grads, _) in enumerate(ranks):
        for tensor, expected_tensor in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor, expected_tensor, rtol=1e-4, atol=1e-4)
        expected_part = part_of_rank(expected_grads, rank, etp_size)
        assert grads.keys() == expected_part.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_part[name], rtol=1e-4, atol=1e-4)
    norm = torch.stack([square for _, _, square in ranks]).sum().sqrt()
    expected_norm = torch.cat([grad.flatten() for grad in expected_grads.values()]).norm()
    torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)


def no_tokens(state):
    experts = grouped_experts(**GPT_OSS)
    for parameter in experts.parameters():
        parameter.data = torch.ones(parameter.shape)
    tokens = torch.zeros(0, HIDDEN, requires_grad=True)
    output, _ = experts(tokens, torch.zeros(EXPERTS, dtype=torch.int64), torch.zeros(0))
    output.sum().backward()
    return output.shape, {name: p.grad for name, p in experts.named_parameters()}


def test_experts_without_tokens_have_zero_gradients_and_not_none():
    [(shape, grads)] = run_ranks(ParallelLayout(), no_tokens)
    assert shape == (0, HIDDEN)
    assert len(grads) == 4
    assert all(torch.count_nonzero(grad) == 0 for grad in grads.values())


def marks(state):
    return {
        name: (parameter.allreduce, parameter.tensor_model_parallel, parameter.partition_dim)
        for name, parameter in grouped_experts(**GPT_OSS).named_parameters()
    }


def test_parameters_say_how_the_ranks_of_an_expert_share_them():
    assert run_ranks(ParallelLayout(world_size=2, etp_size=2), marks) == 2 * [
        {
            "linear_fc1.weight": (False, True, 1),
            "linear_fc1.bias": (False, True, 1),
            "linear_fc2.weight": (False, True, 2),
            "linear_fc2.bias": (False, True, -1),
        }
    ]
