"""Names of transformers' classes; transformers itself is the judge."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.config.tuner import TunerConfig
from mtrain.lora.model_names import file_names, plan_in_model, renaming, table_in_model
from mtrain.lora.plan import adapter_table
from mtrain.lora.targets import choose_targets
from tests.tiny import TINY, tiny_config

MIXTRAL = weight_table(tiny_config("mixtral"))
FILES = "base_model.model.model.layers.3.block_sparse_moe."
MODEL = "base_model.model.model.layers.3.mlp."


def names_of_class(name):
    fields = tiny_config(name)
    with torch.device("meta"):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = AutoModelForCausalLM.from_config(config)
    return set(model.state_dict())


@pytest.mark.parametrize("name", TINY)
def test_all_but_single_experts_have_the_names_of_the_class(name):
    table = table_in_model(weight_table(tiny_config(name)))
    ours = {tensor for tensor in hf_tensors(table) if ".experts." not in tensor}
    theirs = {tensor for tensor in names_of_class(name) if ".experts." not in tensor}
    assert ours == theirs - {"lm_head.weight"} | ours & {"lm_head.weight"}


@pytest.mark.parametrize("name", [name for name in TINY if name != "mixtral"])
def test_other_families_have_one_name(name):
    table = weight_table(tiny_config(name))
    assert renaming(table) is None
    assert table_in_model(table) is table
    lora = choose_targets(table, TunerConfig())
    assert plan_in_model(lora, table) is lora
    assert file_names([f"{MODEL}gate.lora_A.weight"], table) == {}


def test_of_mixtral_the_router_is_renamed_and_single_experts_are_not():
    lora = choose_targets(MIXTRAL, TunerConfig(target_modules=("all-router", "all-linear")))
    before, after = (
        list(hf_tensors(adapter_table(MIXTRAL, plan)))
        for plan in (lora, plan_in_model(lora, MIXTRAL))
    )
    changed = {old: new for old, new in zip(before, after, strict=True) if old != new}
    assert len(changed) == 4 * 2
    assert changed[f"{FILES}gate.lora_B.weight"] == f"{MODEL}gate.lora_B.weight"
    assert plan_in_model(plan_in_model(lora, MIXTRAL), MIXTRAL) == plan_in_model(lora, MIXTRAL)


def test_stored_names_become_those_of_files_but_fused_experts_keep_theirs():
    stored = {
        f"{MODEL}gate.lora_A.weight": f"{FILES}gate.lora_A.weight",
        f"{MODEL}gate.weight": f"{FILES}gate.weight",
    }
    same = [
        f"{FILES}gate.lora_A.weight",
        f"{FILES}experts.0.w1.lora_A.weight",
        f"{MODEL}experts.lora_A.weight",
        f"{MODEL}experts.base_layer.lora_B.weight",
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight",
        "base_model.model.lm_head.weight",
    ]
    assert file_names([*stored, *same], MIXTRAL) == stored
