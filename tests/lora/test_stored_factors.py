"""Factors are found by name and shape, without reading them where nothing is shared."""

from pathlib import Path

from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.rules import layers_of
from mtrain.bridge.safetensors_header import StoredTensor
from mtrain.lora.adapter_settings import AdapterSettings
from mtrain.lora.plan import adapter_table
from mtrain.lora.stored_factors import find_fused, find_projections, fused_projections
from tests.lora.peft_folders import uniform_plan
from tests.tiny import tiny_config

TABLE = weight_table(tiny_config("qwen3_moe_mixed"))
SETTINGS = AdapterSettings(
    path=Path("adapter_config.json"),
    rank=4,
    alpha=6.0,
    use_rslora=False,
    dropout=0.0,
    rank_pattern={},
    alpha_pattern={},
    target_parameters=("mlp.gate.weight",),
    modules_to_save=(),
    base=None,
    config={},
)


def stored(shapes):
    path = Path("nothing is read from here")
    return {
        name: StoredTensor(path=path, dtype="F32", shape=shape, num_bytes=0, start=0)
        for name, shape in shapes.items()
    }


def test_projections_are_found_in_every_layer_with_all_their_experts():
    lora = uniform_plan(TABLE, "q_proj", "gate", "up_proj", "embed_tokens")
    tensors = stored(hf_tensors(adapter_table(TABLE, lora)))
    found = list(find_projections(tensors, TABLE, SETTINGS))
    assert {name for one in found for name in one.tensors} == set(tensors)
    assert {(one.rank, one.stored_rank) for one in found} == {(4, 4)}
    names = {one.lookup_names for one in found if one.layer in (None, 0)}
    assert names == {
        ("model.embed_tokens",),
        ("model.layers.0.self_attn.q_proj",),
        ("model.layers.0.mlp.gate.weight",),
        tuple(f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(4)),
    }


def test_a_fused_parameter_alone_in_its_module_is_known_by_its_shape():
    module = "base_model.model.model.layers.2.mlp.experts"
    shapes = {f"{module}.lora_A.weight": (12, 48), f"{module}.lora_B.weight": (64, 12)}
    (factors,) = find_fused(stored(shapes), TABLE)
    assert (factors.parameter.name, factors.layer, factors.rank) == ("down_proj", 2, 3)
    (projection,) = fused_projections(factors)
    assert projection.lookup_names == ("model.layers.2.mlp.experts.down_proj",)
    assert projection.tensors == tuple(shapes)


def test_layers_are_those_of_the_rule():
    layers = {rule.megatron.rpartition("mlp.")[2]: layers_of(rule) for rule in TABLE.rules}
    assert layers["linear_fc1.weight"] == (1,)
    assert layers["experts.linear_fc1.weight"] == (0, 2, 3)
    assert layers["embedding.word_embeddings.weight"] == (None,)
