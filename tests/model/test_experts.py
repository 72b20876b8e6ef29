import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.experts import GroupedExperts
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks

EXPERTS, HIDDEN, INNER = 3, 16, 32


def grouped_and_one_by_one(state, counts):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=INNER,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["expt_tp"])
    experts = GroupedExperts(EXPERTS, config, groups)
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

    pieces = []
    for expert, rows in enumerate(zip(tokens.split(counts), probs.split(counts), strict=True)):
        gate, up = (rows[0] @ experts.linear_fc1.weight[expert].t()).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * rows[1][:, None]
        pieces.append(hidden @ experts.linear_fc2.weight[expert].t())
    expected = torch.cat(pieces)
    expected.square().sum().backward()
    return output.detach(), expected.detach(), grads, [p.grad for p in experts.parameters()]


@pytest.mark.parametrize("counts", [[4, 3, 5], [0, 7, 1], [2, 0, 0], [0, 0, 0]])
def test_grouped_product_equals_one_expert_after_the_other(counts):
    (result,) = run_ranks(ParallelLayout(), grouped_and_one_by_one, counts)
    output, expected, grads, expected_grads = result
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
