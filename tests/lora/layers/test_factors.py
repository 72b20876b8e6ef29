"""The factors of one linear: how they are put together, moved, dropped out and merged."""

import pytest
import torch
import torch.nn.functional as F

from mtrain.bridge.rules import HFTensor, Interleaved, Rule
from mtrain.lora.layers.factors import LoraFactors
from mtrain.lora.layers.products import add_up, spread_out
from mtrain.lora.plan import AdaptedLinear, Adapter

QKV = Rule(
    megatron="decoder.layers.{layer}.self_attention.linear_qkv.weight",
    hf=(HFTensor("q.weight", (4, 6)), HFTensor("k.weight", (2, 6)), HFTensor("v.weight", (2, 6))),
    layout=Interleaved(2),
    split="rows",
    layers=(0,),
)
# Rows of the fused weight: q q k v | q q k v. Only q and v are adapted.
SCALES = torch.tensor([[2.0, 0], [2.0, 0], [0, 0], [0, 0.5]]).repeat(2, 1)


class OneRank:
    """A process group of one."""

    def size(self):
        return 1


def make_factors(**changes):
    linear = AdaptedLinear(
        rule=QKV,
        adapters=(Adapter(rank=3, alpha=6.0), None, Adapter(rank=2, alpha=1.0)),
        layers=(0,),
    )
    arguments = {
        "a_shape": (6, 6),
        "b_shape": (8, 3),
        "scales": SCALES,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "dropout": 0.0,
        "group": OneRank(),
        "is_sequence_parallel": False,
        "is_local": False,
    }
    factors = LoraFactors(linear, **arguments | changes)
    torch.manual_seed(0)
    for factor in factors.parameters():
        torch.nn.init.normal_(factor)
    return factors


def delta_row_by_row(factors):
    """scale * B @ A with the B and A of the projection that each row belongs to."""
    rows = []
    for row, b in enumerate(factors.lora_b):
        row_of_delta = torch.zeros(6)
        for projection in range(2):
            a = factors.lora_a[3 * projection : 3 * projection + 3]
            row_of_delta += SCALES[row, projection] * (b @ a)
        rows.append(row_of_delta)
    return torch.stack(rows)


def test_each_row_meets_the_a_of_its_own_projection():
    factors = make_factors()
    lora_a, lora_b = factors()
    with torch.no_grad():
        wide_b, scale = spread_out(lora_b, factors.scaling, torch.float32)
        delta = scale * wide_b @ lora_a
    torch.testing.assert_close(delta, delta_row_by_row(factors))
    assert not delta[2].any(), "a projection without adapter got something"


def test_down_and_up_apply_the_delta():
    factors = make_factors()
    activations, output = torch.randn(5, 1, 6), torch.randn(5, 1, 8)
    expected = output + F.linear(activations, delta_row_by_row(factors))
    lora_a, lora_b = factors()
    low_rank = factors.down(activations, lora_a, is_split=False)
    torch.testing.assert_close(add_up(output, low_rank, lora_b, factors.scaling), expected)


def test_casting_the_model_leaves_the_factors_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), make_factors())
    before = {name: tensor.clone() for name, tensor in model[1].named_parameters()}
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].scales.dtype == torch.float32
    assert all(torch.equal(model[1].get_parameter(name), before[name]) for name in before)


def test_dropout_is_for_training_only():
    factors = make_factors(dropout=0.5)
    activations = torch.ones(100, 6)
    values, mask, scale = factors.dropped(activations, is_split=True)
    assert set(values.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(values, activations * mask * scale)
    factors.eval()
    assert factors.dropped(activations, is_split=True) is None


def test_both_kinds_of_dropout_drop_the_same():
    """What is one function on one rank is several on two."""
    factors = make_factors(dropout=0.3)
    activations = torch.randn(100, 6, requires_grad=True)
    torch.manual_seed(3)
    low_rank = factors.down(activations, factors.lora_a, is_split=True)
    torch.manual_seed(3)
    values, mask, scale = factors.dropped(activations, is_split=True)
    assert torch.equal(low_rank, F.linear(values, factors.lora_a))
    (grad,) = torch.autograd.grad(low_rank.sum(), activations)
    expected = factors.lora_a.sum(0) * mask * scale
    torch.testing.assert_close(grad, expected)
    assert not values.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_rounds_once_and_changes_nothing(dtype):
    factors = make_factors(dtype=dtype)
    weight = torch.randn(8, 6).to(dtype)
    before = weight.clone()
    merged = factors.merged(weight, None)
    float_factors = make_factors()
    with torch.no_grad():
        float_factors.lora_a.copy_(factors.lora_a)
        float_factors.lora_b.copy_(factors.lora_b)
    expected = (weight.float() + delta_row_by_row(float_factors)).to(dtype)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, expected)
    assert torch.equal(weight, before)
