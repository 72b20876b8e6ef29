"""The fused layout is ParamWrapper's: PEFT's own delta is the judge."""

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mtrain.bridge.plan import weight_table
from mtrain.config.tuner import TunerConfig
from mtrain.lora.fused_experts import (
    FusedFactors,
    fused_factors,
    fused_names,
    fused_parameters,
    split_ranks,
    used_ranks,
)
from mtrain.lora.targets import choose_targets
from tests.lora.peft_folders import random_values, uniform_plan
from tests.tiny import MOE, tiny_config

TABLE = weight_table(tiny_config("qwen3_moe_mixed"))
GATE_UP, DOWN = fused_parameters(TABLE)
# Transposed, and rows of gate and up take turns.
OSS = fused_parameters(weight_table(tiny_config("gpt_oss_moe")))


def factors(parameter, rank, spans):
    return FusedFactors(parameter=parameter, layer=0, depth=0, rank=rank, spans=spans)


def test_the_parameters_are_those_of_transformers():
    assert GATE_UP.lookup_name(2) == "model.layers.2.mlp.experts.gate_up_proj"
    assert DOWN.lookup_name(2) == "model.layers.2.mlp.experts.down_proj"
    assert GATE_UP.factor_shapes(3) == ((12, 64), (96, 12))
    assert DOWN.factor_shapes(3) == ((12, 48), (64, 12))


@pytest.mark.parametrize("name", MOE)
def test_every_family_has_the_parameters_of_its_class(name):
    fields = tiny_config(name)
    with torch.device("meta"):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = AutoModelForCausalLM.from_config(config)
    theirs = {
        key: tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if ".experts." in key and tensor.dim() == 3
    }
    ours = {
        parameter.lookup_name(layer): (
            parameter.num_experts,
            *sorted((sum(parameter.num_rows), parameter.rule.hf[0].shape[1])),
        )
        for parameter in fused_parameters(weight_table(tiny_config(name)))
        for layer in parameter.rule.layers
    }
    assert ours == {key: (shape[0], *sorted(shape[1:])) for key, shape in theirs.items()}


def test_layers_of_multi_token_prediction_have_no_fused_parameters():
    config = tiny_config("deepseek_v3") | {"num_nextn_predict_layers": 1}
    table = weight_table(config, 1)
    names = tuple(f"layers.4.mlp.experts.{expert}.up_proj" for expert in range(4))
    lora = choose_targets(table, TunerConfig(target_modules=names))
    assert [linear.kind for linear in lora.linears] == ["experts"]
    assert fused_factors(lora, table) == ()


@pytest.mark.parametrize(
    "parameter", [GATE_UP, DOWN, *OSS], ids=["gate_up", "down", "interleaved", "oss_down"]
)
def test_parts_of_fused_factors_multiply_to_the_change_that_peft_makes(parameter):
    class Experts(torch.nn.Module):
        is_transposed = parameter in OSS

        def __init__(self):
            super().__init__()
            shape = [sum(parameter.num_rows), parameter.rule.hf[0].shape[1]]
            weight = torch.zeros(4, *(reversed(shape) if self.is_transposed else shape))
            self.weight = torch.nn.Parameter(weight)

    model = torch.nn.Module()
    model.experts = Experts()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[], target_parameters=["experts.weight"]
    )
    wrapper = peft.inject_adapter_in_model(config, model).experts
    lora_a, lora_b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    torch.manual_seed(0)
    lora_b.data.normal_()
    stored = factors(parameter, 3, (range(3),) * len(parameter.rule.hf))
    ours = []
    for expert in range(4):
        products = [
            stored.take_b(lora_b, expert, source) @ stored.take_a(lora_a, expert, source)
            for source in range(len(parameter.rule.hf))
        ]
        rows = torch.cat(products)
        if parameter in OSS:
            rows = torch.stack(products, dim=1).flatten(0, 1).t()
        ours.append(rows)
    torch.testing.assert_close(2.0 * torch.stack(ours), wrapper.get_delta_weight("default"))


@pytest.mark.parametrize(("name", "num_factors"), [("qwen3_moe_mixed", 6), ("gpt_oss_moe", 8)])
def test_fusing_and_taking_apart_is_the_identity(name, num_factors):
    table = weight_table(tiny_config(name))
    lora = uniform_plan(table, "gate_proj", "up_proj", "down_proj", rank=3)
    values = random_values(lora, table)
    found = fused_factors(lora, table)
    assert len(found) == num_factors
    for one in found:
        fused = [one.fuse(values.__getitem__, which=which) for which in (0, 1)]
        assert [tuple(tensor.shape) for tensor in fused] == list(one.shapes)
        for a_name, b_name, expert, source in one.members():
            assert torch.equal(one.take_a(fused[0], expert, source), values[a_name])
            assert torch.equal(one.take_b(fused[1], expert, source), values[b_name])


def test_names_are_nested_as_peft_wraps_them():
    both = fused_factors(uniform_plan(TABLE, "gate_proj", "up_proj", "down_proj"), TABLE)
    module = "base_model.model.model.layers.0.mlp.experts"
    assert both[0].names[0] == f"{module}.base_layer.lora_A.weight"
    assert both[1].names[1] == f"{module}.lora_B.weight"
    (one, *_) = fused_factors(uniform_plan(TABLE, "gate_proj"), TABLE)
    assert one.names == fused_names("model.layers.{layer}.mlp.experts", 0, depth=0)
    assert one.spans == (range(4), None)


@pytest.mark.parametrize("parameter", [GATE_UP, OSS[0]], ids=["concatenated", "interleaved"])
@pytest.mark.parametrize("ranks", [(4, 4), (2, 5), (3, 0), (0, 3)])
def test_blocks_are_seen_from_their_zeros(ranks, parameter):
    rank, num_rows = sum(ranks), parameter.num_rows[0]
    spans = (range(ranks[0]) or None, range(ranks[0], rank) or None)
    stored = factors(parameter, rank, spans)
    lora_b = stored.fuse(lambda name: torch.ones(num_rows, ranks["up_proj" in name]), which=1)
    assert split_ranks([used_ranks(lora_b, parameter, rank)], rank) == spans


def test_one_expert_that_mixes_is_enough_to_share():
    stored = factors(GATE_UP, 4, (range(2), range(2, 4)))
    lora_b = stored.fuse(lambda name: torch.ones(48, 2), which=1)
    lora_b[95, 1 * 4 + 3] = 1e-30  # a row of up, a rank of gate, the last expert
    used = [(2, 2), used_ranks(lora_b, GATE_UP, 4)]
    assert split_ranks(used, 4) == (range(4), range(4))


def test_a_fresh_adapter_is_taken_for_blocks_of_the_same_size():
    used = [used_ranks(torch.zeros(96, 4 * 4), GATE_UP, 4)]
    assert split_ranks(used, 4) == (range(2), range(2, 4))
    used = [used_ranks(torch.zeros(96, 4 * 3), GATE_UP, 3)]
    assert split_ranks(used, 3) == (range(3), range(3))


def test_layers_that_were_not_trained_follow_the_others():
    assert split_ranks([(0, 6), (2, 3), (1, 2)], 6) == (range(2), range(2, 6))
