"""Names and axes of whole models are those of Megatron-Core's checkpoints."""

import pytest

from mtrain.bridge.global_tensors import global_parameters, has_equal_layers, places_by_name
from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.spans import box_size
from mtrain.lora.plan import Adapter, adapter_table
from tests.lora.peft_folders import make_plan, uniform_plan
from tests.tiny import TINY, tiny_config

MIXED = ("qwen3_moe_mixed", "deepseek_v2", "deepseek_v3", "deepseek_v3_groups")
MIXED += ("glm4_moe", "qwen3_next_moe")


def table_for(name, **changes):
    return weight_table(tiny_config(name, **changes))


def keys_of(table, *, stacked):
    return {parameter.key(stacked=stacked) for parameter in global_parameters(table)}


@pytest.mark.parametrize("name", TINY)
def test_layers_are_stacked_where_all_are_alike(name):
    assert has_equal_layers(table_for(name)) is (name not in MIXED)


def test_equal_layers_share_a_name():
    """Copied from `sharded_state_dict` of a Megatron-Core model."""
    assert keys_of(table_for("qwen3"), stacked=True) == {
        "embedding.word_embeddings.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.self_attention.k_layernorm.weight",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.mlp.linear_fc1.weight",
        "decoder.layers.mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    }


def test_layers_that_differ_have_names_of_their_own():
    keys = keys_of(table_for("qwen3_moe_mixed"), stacked=False)
    assert "decoder.layers.1.mlp.linear_fc1.weight" in keys
    assert "decoder.layers.0.mlp.linear_fc1.weight" not in keys
    for layer in (0, 2, 3):
        assert f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight" in keys
        assert f"decoder.layers.{layer}.mlp.router.weight" in keys
        assert f"decoder.layers.{layer}.pre_mlp_layernorm.weight" in keys
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight" not in keys
    assert "embedding.word_embeddings.weight" in keys
    assert not [key for key in keys if "{layer}" in key]


def find(table, ending, *, layer):
    (found,) = (
        parameter
        for parameter in global_parameters(table)
        if parameter.name.endswith(ending) and parameter.layer == layer
    )
    return found


def test_experts_are_stacked_behind_the_layers():
    fc1 = find(table_for("qwen3_moe"), ".mlp.experts.experts.linear_fc1.weight", layer=2)
    assert (fc1.num_experts, fc1.shape, fc1.experts) == (4, (96, 64), (0, 1, 2, 3))
    assert fc1.front(stacked=True, expert=3) == ((2, 4), (3, 4))
    assert fc1.front(stacked=False, expert=3) == ((3, 4),)
    assert fc1.key(stacked=True) == "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert fc1.key(stacked=False) == "decoder.layers.2.mlp.experts.experts.linear_fc1.weight"
    names = [piece.hf_name for piece in fc1.pieces_of(3)]
    assert names == [f"model.layers.2.mlp.experts.3.{leaf}_proj.weight" for leaf in ("gate", "up")]


def test_a_dense_parameter_has_one_axis_in_front_and_no_expert():
    qkv = find(table_for("qwen3"), "linear_qkv.weight", layer=1)
    assert (qkv.num_experts, qkv.experts) == (None, (None,))
    assert qkv.front(stacked=True, expert=None) == ((1, 4),)
    assert qkv.front(stacked=False, expert=None) == ()
    assert qkv.pieces_of(None) == qkv.pieces
    with pytest.raises(AssertionError, match="where there is none"):
        qkv.front(stacked=True, expert=0)


def test_what_is_in_no_layer_has_no_axis_in_front():
    for ending in ("word_embeddings.weight", "final_layernorm.weight", "output_layer.weight"):
        parameter = find(table_for("qwen3"), ending, layer=None)
        assert parameter.front(stacked=True, expert=None) == ()
        assert parameter.key(stacked=True) == parameter.key(stacked=False) == parameter.name


@pytest.mark.parametrize("name", TINY)
def test_only_the_vocabulary_may_be_padded(name):
    padded = {p.name for p in global_parameters(table_for(name)) if p.may_be_padded}
    tied = tiny_config(name)["tie_word_embeddings"]
    expected = {"embedding.word_embeddings.weight"} | (set() if tied else {"output_layer.weight"})
    assert padded == expected


@pytest.mark.parametrize("name", TINY)
def test_every_element_of_every_tensor_has_one_place(name):
    table = table_for(name)
    places = places_by_name(global_parameters(table))
    shapes = hf_tensors(table)
    assert places.keys() == shapes.keys()
    for hf_name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        assert sum(box_size(piece.local) for _, piece in places[hf_name]) == size, hf_name


@pytest.mark.parametrize("name", TINY)
def test_no_key_is_used_twice(name):
    parameters = global_parameters(table_for(name))
    assert len({p.key(stacked=False) for p in parameters}) == len(parameters)
    stacked = {(p.key(stacked=True), p.layer) for p in parameters}
    assert len(stacked) == len(parameters)


def test_an_adapter_of_all_layers_is_stacked_too():
    table = table_for("qwen3_moe")
    adapter = adapter_table(table, uniform_plan(table, "q_proj", "v_proj", "down_proj", rank=3))
    assert has_equal_layers(adapter)
    assert keys_of(adapter, stacked=True) == {
        "decoder.layers.self_attention.linear_qkv.adapter.lora_a",
        "decoder.layers.self_attention.linear_qkv.adapter.lora_b",
        "decoder.layers.mlp.experts.experts.linear_fc2.adapter.lora_a",
        "decoder.layers.mlp.experts.experts.linear_fc2.adapter.lora_b",
    }
    lora_a = find(adapter, "linear_fc2.adapter.lora_a", layer=1)
    assert (lora_a.num_experts, lora_a.shape) == (4, (3, 48))
    assert lora_a.front(stacked=True, expert=2) == ((1, 4), (2, 4))
    # Rows of k, which has no adapter, are in B of the fused projection and come from nowhere.
    lora_b = find(adapter, "linear_qkv.adapter.lora_b", layer=0)
    assert lora_b.shape == (4 * 32 + 2 * 2 * 32, 3)
    assert sum(box_size(piece.local) for piece in lora_b.pieces) == (4 * 32 + 2 * 32) * 3


def test_an_adapter_of_some_layers_is_not_stacked():
    table = table_for("qwen3")
    lora = make_plan(
        table,
        lambda name, layer: Adapter(rank=2, alpha=4.0) if layer == 1 and "q_proj" in name else None,
    )
    adapter = adapter_table(table, lora)
    assert not has_equal_layers(adapter)
    assert keys_of(adapter, stacked=False) == {
        f"decoder.layers.1.self_attention.linear_qkv.adapter.lora_{factor}" for factor in "ab"
    }


def test_an_adapter_whose_ranks_differ_between_layers_has_one_parameter_a_layer():
    table = table_for("qwen3")
    lora = make_plan(
        table,
        lambda name, layer: Adapter(rank=2 + layer, alpha=4.0) if "o_proj" in name else None,
    )
    adapter = adapter_table(table, lora)
    assert not has_equal_layers(adapter)
    shapes = {p.layer: p.shape for p in global_parameters(adapter) if p.name.endswith("lora_a")}
    assert shapes == {layer: (2 + layer, 128) for layer in range(4)}


def test_a_weight_that_is_saved_whole_keeps_its_name():
    table = table_for("qwen3")
    lora = uniform_plan(table, "q_proj", modules_to_save=("lm_head.weight",))
    adapter = adapter_table(table, lora)
    assert has_equal_layers(adapter)
    parameter = find(adapter, "output_layer.weight", layer=None)
    assert [piece.hf_name for piece in parameter.pieces] == ["base_model.model.lm_head.weight"]
    assert parameter.may_be_padded
