import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.replicated import ReplicatedLinear
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks


def project(state, is_sequence_parallel):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=state.layout.tp_size,
        sequence_parallel=is_sequence_parallel,
    )
    linear = ReplicatedLinear(8, 6, config=config)
    linear.weight.data = torch.arange(48.0).view(6, 8)
    tokens = torch.arange(16.0).view(2, 1, 8)
    output, bias = linear(tokens)
    assert bias is None
    return torch.equal(output, F.linear(tokens, linear.weight)), linear.weight.sequence_parallel


def test_every_rank_applies_all_of_it_and_marks_gradients_that_differ():
    layout = ParallelLayout(world_size=2, tp_size=2)
    assert run_ranks(layout, project, False) == [(True, False)] * 2
    assert run_ranks(layout, project, True) == [(True, True)] * 2


def outputs_of_a_trained_and_a_frozen_weight(state):
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=2)
    linear = ReplicatedLinear(64, 24, config=config)
    torch.manual_seed(0)
    linear.weight.data.normal_()
    # As norms give it: [seq, batch, hidden] of a contiguous [batch, seq, hidden].
    tokens = torch.randn(1, 32, 64).transpose(0, 1)
    with torch.no_grad():
        trained = linear(tokens)[0]
        return torch.equal(trained, linear.requires_grad_(False)(tokens)[0])


def test_a_frozen_weight_gives_the_same_bits():
    assert run_ranks(ParallelLayout(), outputs_of_a_trained_and_a_frozen_weight) == [True]
