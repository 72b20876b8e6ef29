"""Kinds of linears: what a weight is as far as adapters are concerned."""

import pytest

from mtrain.bridge.plan import weight_table
from mtrain.lora.plan import kind_of, tied_tensors
from tests.lora.test_plan import ALL, plan_of
from tests.tiny import TINY, tiny_config


def test_every_module_is_of_a_kind():
    _, lora = plan_of("qwen3_moe_mixed", target_modules=ALL)
    kinds = {
        linear.rule.megatron.split(".layers.{layer}.")[-1]: linear.kind for linear in lora.linears
    }
    assert kinds == {
        "embedding.word_embeddings.weight": "embedding",
        "self_attention.linear_qkv.weight": "column",
        "self_attention.linear_proj.weight": "row",
        "mlp.linear_fc1.weight": "column",
        "mlp.linear_fc2.weight": "row",
        "mlp.router.weight": "router",
        "mlp.experts.linear_fc1.weight": "experts",
        "mlp.experts.linear_fc2.weight": "experts",
        "output_layer.weight": "column",
    }


def test_every_linear_of_new_kinds_is_of_one():
    kinds = {}
    for name in ("deepseek_v3", "deepseek_v3_groups", "qwen2_moe", "qwen3_next_moe", "gpt2"):
        for linear in plan_of(name, target_modules=("all-linear",))[1].linears:
            kinds[linear.rule.megatron.split(".{layer}.")[1].removesuffix("weight")] = linear.kind
    attention = "self_attention."
    assert kinds.items() >= {
        (attention + "linear_kv_down_proj.", "replicated"),
        (attention + "linear_q_down_proj.", "replicated"),
        (attention + "linear_kv_up_proj.", "column"),
        (attention + "linear_q_up_proj.", "column"),
        (attention + "linear_q_proj.", "column"),
        (attention + "in_proj.", "column"),
        (attention + "out_proj.", "row"),
        ("mlp.shared_experts.linear_fc1.", "column"),
        ("mlp.shared_experts.linear_fc2.", "row"),
        ("mlp.shared_experts.gate_", "gate"),
    }


@pytest.mark.parametrize("name", TINY)
def test_what_is_no_linear_has_no_kind(name):
    without = {
        rule.megatron.rpartition(".")[2]
        if not rule.megatron.endswith(".weight")
        else rule.megatron.split(".")[-2]
        for rule in weight_table(tiny_config(name)).rules
        if kind_of(rule) is None
    }
    assert without <= {
        *("layer_norm_weight", "layer_norm_bias", "bias", "softmax_offset", "expert_bias"),
        *("q_layernorm", "k_layernorm", "kv_layernorm", "input_layernorm", "pre_mlp_layernorm"),
        *("final_layernorm", "norm", "out_norm", "A_log", "dt_bias"),
        *("conv1d", "position_embeddings"),
    }


def test_a_copy_of_the_embedding_is_no_tie():
    config = tiny_config("deepseek_v3") | {"num_nextn_predict_layers": 1}
    assert tied_tensors(weight_table(config, 1)) == set()
    (tensor,) = tied_tensors(weight_table(tiny_config("gpt2")))
    assert tensor.name == "transformer.wte.weight"
