"""Targets where families differ: their linears, their names, and what cannot be adapted."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from mtrain.bridge.plan import weight_table
from mtrain.config.tuner import TunerConfig
from mtrain.lora.targets import choose_targets
from tests.lora.test_targets import adapted, adapted_by_peft, choose, in_layers, model_of, refusal
from tests.tiny import DENSE, MOE, TINY, tiny_config


@pytest.mark.parametrize("name", TINY)
def test_all_linear_is_every_linear_of_the_class_but_the_output_layer(name):
    """PEFT's meaning; single experts are none there, but are in files."""
    modules = adapted(choose(name))
    assert len(modules) == len(set(modules))
    others = {module for module in modules if ".experts." not in module}
    linears = {key for key, module in model_of(name).named_modules() if is_linear(module)}
    assert others == linears - {"lm_head"}
    assert any(".experts." in module for module in modules) == (name in MOE)
    if name in DENSE:
        assert others == adapted_by_peft(name, "all-linear")


def is_linear(module):
    return isinstance(module, (torch.nn.Linear, Conv1D))


@pytest.mark.parametrize(
    ("name", "target_modules"),
    [
        ("phi3", ["qkv_proj", "layers.2.mlp.gate_up_proj"]),
        ("glm4", ["k_proj", "mlp.gate_up_proj"]),
        ("gpt2", ["c_attn", "mlp.c_proj", "h.1.attn.c_proj", "wte"]),
        ("deepseek_v3", ["kv_a_proj_with_mqa", "q_b_proj", "layers.1.self_attn.q_a_proj"]),
        ("qwen2_moe", ["shared_expert_gate", "self_attn.q_proj"]),
        ("qwen3_next_moe", ["in_proj_ba", "out_proj", "layers.3.self_attn.k_proj"]),
    ],
)
def test_names_of_other_families_choose_what_they_choose_in_peft(name, target_modules):
    modules = adapted(choose(name, target_modules=tuple(target_modules)))
    assert set(modules) == adapted_by_peft(name, target_modules)


FIRST = "decoder.layers.0."


@pytest.mark.parametrize(
    ("name", "megatron", "expected"),
    [
        ("deepseek_v3", "linear_kv_down_proj", in_layers({"self_attn.kv_a_proj_with_mqa"})),
        ("deepseek_v3", "linear_q_up_proj", in_layers({"self_attn.q_b_proj"})),
        ("deepseek_v3_groups", "linear_q_proj", in_layers({"self_attn.q_proj"})),
        ("qwen2_moe", "gate_weight", in_layers({"mlp.shared_expert_gate"})),
        ("qwen2_moe", "shared_experts.linear_fc2", in_layers({"mlp.shared_expert.down_proj"})),
        (
            "qwen3_next_moe",
            f"{FIRST}self_attention.in_proj",
            in_layers({"linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"}, (0,)),
        ),
        ("phi3", f"{FIRST}self_attention.linear_qkv", in_layers({"self_attn.qkv_proj"}, (0,))),
        ("mixtral", "router", in_layers({"block_sparse_moe.gate"})),
        ("gpt_oss_moe", "all-router", in_layers({"mlp.router"})),
        (
            "mixtral",
            f"{FIRST}mlp.experts.linear_fc2",
            in_layers({f"block_sparse_moe.experts.{expert}.w2" for expert in range(4)}, (0,)),
        ),
    ],
)
def test_megatron_names_of_other_families(name, megatron, expected):
    assert set(adapted(choose(name, target_modules=(megatron,)))) == expected


def test_what_has_no_adapter_is_no_target():
    """Convolutions, learned positions, biases, norms; nor do names of containers choose."""
    for name, target in (
        ("qwen3_next_moe", "conv1d"),
        ("qwen3_next_moe", "A_log"),
        ("gpt2", "wpe"),
        ("gpt2", "position_embeddings"),
        ("gpt_oss_moe", "sinks"),
        ("deepseek_v3", "e_score_correction_bias"),
        ("deepseek_v3", "kv_a_layernorm"),
        ("qwen2_moe", "shared_experts"),
        ("gpt2", "lm_head.weight"),
    ):
        assert "matches nothing; there are: " in refusal(name, target_modules=(target,))
    assert set(adapted(choose("gpt2", target_modules=("all-embedding",)))) == {"transformer.wte"}


def test_what_there_is_lists_the_linears_of_the_family():
    message = refusal("qwen3_next_moe", target_modules=("x",))
    for word in ("in_proj_qkvz", "in_proj_ba", "shared_expert_gate", "gate_weight", "out_proj"):
        assert f" {word} " in message
    message = refusal("gpt2", target_modules=("x",))
    assert message.endswith(
        "there are: wte c_attn c_proj c_fc (Hugging Face), word_embeddings linear_qkv linear_proj "
        "linear_fc1 linear_fc2 (Megatron), all-linear all-embedding; or longer ends of a name, as "
        "transformer.h.0.attn.c_attn"
    )


def choose_with_next_tokens(**tuner):
    config = tiny_config("deepseek_v3") | {"num_nextn_predict_layers": 1}
    return choose_targets(weight_table(config, 1), TunerConfig(**tuner))


def test_layers_of_multi_token_prediction_are_adapted_where_there_are_some():
    of_layer = {name for name in adapted(choose_with_next_tokens()) if ".layers.4." in name}
    assert "model.layers.4.eh_proj" in of_layer
    assert "model.layers.4.mlp.experts.3.up_proj" in of_layer
    like_last = {name for name in adapted(choose("deepseek_v3")) if ".layers.3." in name}
    renamed = {name.replace(".layers.3.", ".layers.4.") for name in like_last}
    assert of_layer == renamed | {"model.layers.4.eh_proj"}
    assert adapted(choose_with_next_tokens(target_modules=("eh_proj",))) == [
        "model.layers.4.eh_proj"
    ]
    assert "eh_proj" not in refusal("deepseek_v3", target_modules=("x",))


def test_a_copy_of_the_embedding_does_not_make_the_head_a_tied_one():
    lora = choose_with_next_tokens(target_modules=("lm_head", "all-embedding"))
    assert adapted(lora) == ["model.embed_tokens", "lm_head"]
    saved = choose_with_next_tokens(target_modules=("q_a_proj",), modules_to_save=("lm_head",))
    assert [rule.megatron for rule in saved.modules_to_save] == ["output_layer.weight"]


def test_learned_positions_can_be_trained_whole():
    lora = choose("gpt2", modules_to_save=("wpe",))
    assert [rule.hf[0].name for rule in lora.modules_to_save] == ["transformer.wpe.weight"]
