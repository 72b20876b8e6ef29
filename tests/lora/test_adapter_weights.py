"""An adapter as weights: canonical names, whatever its file looks like."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrain.bridge.convert import write_weights
from mtrain.bridge.plan import hf_tensors
from mtrain.lora.adapter_weights import adapter_weights
from mtrain.lora.peft_format import read_adapter
from mtrain.lora.plan import adapter_table
from tests.lora.peft_folders import random_values, table_of, uniform_plan, write_adapter
from tests.tiny import DISTINCT, make_checkpoint

LEAVES = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn", "c_proj")


@pytest.fixture(scope="module", params=DISTINCT)
def model(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(root, request.param, num_hidden_layers=2)


def weights_in(folder, table):
    stored = read_adapter(folder, table)
    return adapter_weights(stored, adapter_table(table, stored.lora))


def values_of(weights):
    with weights.open() as source:
        return {name: source.slices(name)[:].clone() for name in weights.tensors}


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_tensors_are_those_of_single_experts_in_the_order_of_the_model(model, tmp_path, layout):
    table = table_of(model)
    lora = uniform_plan(table, *LEAVES)
    values = random_values(lora, table)
    weights = weights_in(
        write_adapter(tmp_path / "adapter", lora, table, values, layout=layout), table
    )
    assert weights.folder == tmp_path / "adapter"
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    assert list(shapes.items()) == list(hf_tensors(adapter_table(table, lora)).items())
    found = values_of(weights)
    assert all(torch.equal(found[name], values[name]) for name in values)


def test_what_is_written_of_it_is_an_adapter(model, tmp_path):
    table = table_of(model)
    lora = uniform_plan(table, *LEAVES)
    values = random_values(lora, table)
    folder = write_adapter(tmp_path / "adapter", lora, table, values)
    before = load_file(folder / "adapter_model.safetensors")
    weights = weights_in(folder, table)
    (tmp_path / "out").mkdir()
    options = {"max_shard_size": 10**9, "rank": 0, "world_size": 1, "stem": "adapter_model"}
    (record,) = write_weights(weights, tmp_path / "out", **options)
    assert record.name == "adapter_model.safetensors"
    after = load_file(tmp_path / "out" / record.name)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bfloat16", "bfloat16"), "BF16"),
        (("float16", "float16"), "F16"),
        (("float16", "bfloat16"), "F32"),
        (("bfloat16", "float32"), "F32"),
    ],
    ids=str,
)
def test_all_tensors_have_the_widest_dtype(tmp_path, dtypes, expected):
    """Files may mix dtypes; what is said of a tensor is what is read."""
    table = table_of(make_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=1))
    lora = uniform_plan(table, "q_proj", "down_proj")
    values = random_values(lora, table)
    folder = write_adapter(tmp_path / "adapter", lora, table, values)
    stored = {
        name: value.to(getattr(torch, dtypes[index % 2]))
        for index, (name, value) in enumerate(values.items())
    }
    save_file(stored, folder / "adapter_model.safetensors")
    weights = weights_in(folder, table)
    assert {tensor.dtype for tensor in weights.tensors.values()} == {expected}
    found = values_of(weights)
    wanted = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[expected]
    for name, value in stored.items():
        assert found[name].dtype == wanted
        assert torch.equal(found[name], value.to(wanted))


def test_a_dtype_that_is_always_the_same_does_not_widen_the_others(tmp_path):
    table = table_of(make_checkpoint(tmp_path / "model", "deepseek_v3", num_hidden_layers=2))
    gate = "model.layers.{layer}.mlp.gate."
    saved = (f"{gate}weight", f"{gate}e_score_correction_bias")
    lora = uniform_plan(table, "q_a_proj", modules_to_save=saved)
    values = random_values(lora, table)
    bias = "base_model.model.model.layers.1.mlp.gate.e_score_correction_bias"
    stored = {n: v if n == bias else v.bfloat16() for n, v in values.items()}
    weights = weights_in(write_adapter(tmp_path / "adapter", lora, table, stored), table)
    assert weights.adapter.dtype == "bfloat16"
    assert {n for n, tensor in weights.tensors.items() if tensor.dtype == "F32"} == {bias}
    found = values_of(weights)
    assert all(torch.equal(found[name], stored[name]) for name in stored)
