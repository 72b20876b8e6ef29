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
