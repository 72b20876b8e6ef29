"""One file out of many: its bytes depend on the values and the layout of experts alone."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.safetensors_header import read_header
from mtrain.lora.adapter_file import AdapterReader, join_adapter_files, write_adapter_file
from mtrain.lora.fused_experts import fused_factors
from mtrain.lora.plan import adapter_table
from tests.lora.peft_folders import random_values, uniform_plan
from tests.tiny import tiny_config

TABLE = weight_table(tiny_config("qwen3_moe_mixed"))
LORA = uniform_plan(
    TABLE, "q_proj", "gate_proj", "up_proj", "down_proj", modules_to_save=("lm_head.weight",)
)
VALUES = random_values(LORA, TABLE)


def join(folder, *parts, layout="per_expert"):
    """Joins parts that are given by the names that they hold."""
    folder.mkdir()
    paths = [folder / f"{index}.safetensors" for index in range(len(parts))]
    for path, names in zip(paths, parts, strict=True):
        save_file({name: VALUES[name] for name in names}, path)
    target = folder / "joined.safetensors"
    join_adapter_files(paths, target, lora=LORA, table=TABLE, layout=layout)
    return target


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_the_bytes_do_not_depend_on_the_parts(tmp_path, layout):
    names = sorted(VALUES)
    one = join(tmp_path / "one", names, layout=layout)
    three = join(tmp_path / "three", names[2::3], names[::3], names[1::3], layout=layout)
    assert one.read_bytes() == three.read_bytes()


def test_single_experts_are_copied_in_the_order_of_the_model(tmp_path):
    target = join(tmp_path / "a", sorted(VALUES))
    assert list(read_header(target)) == list(hf_tensors(adapter_table(TABLE, LORA)))
    stored = load_file(target)
    assert stored.keys() == VALUES.keys()
    assert all(torch.equal(stored[name], VALUES[name]) for name in VALUES)


def test_fused_experts_are_one_tensor_a_layer(tmp_path):
    target = join(tmp_path / "a", sorted(VALUES), layout="fused")
    shapes = {name: tensor.shape for name, tensor in read_header(target).items()}
    experts = "base_model.model.model.layers.2.mlp.experts"
    assert {name: shape for name, shape in shapes.items() if experts in name} == {
        f"{experts}.base_layer.lora_A.weight": (4 * 8, 64),
        f"{experts}.base_layer.lora_B.weight": (96, 4 * 8),
        f"{experts}.lora_A.weight": (4 * 4, 48),
        f"{experts}.lora_B.weight": (64, 4 * 4),
    }
    with AdapterReader(target, fused_factors(LORA, TABLE)) as reader:
        assert all(torch.equal(reader.slices(name)[:], VALUES[name]) for name in VALUES)


def test_slices_of_single_experts_can_be_read_from_fused_ones(tmp_path):
    target = join(tmp_path / "a", sorted(VALUES), layout="fused")
    name = "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_B.weight"
    with AdapterReader(target, fused_factors(LORA, TABLE)) as reader:
        assert torch.equal(reader.slices(name)[12:20, 1:3], VALUES[name][12:20, 1:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_converted_to_the_dtype_that_is_wanted(tmp_path, dtype):
    source = join(tmp_path / "a", sorted(VALUES))
    target = tmp_path / "converted.safetensors"
    with AdapterReader(source, ()) as reader:
        write_adapter_file(reader, target, lora=LORA, table=TABLE, layout="per_expert", dtype=dtype)
    stored = load_file(target)
    assert all(torch.equal(stored[name], VALUES[name].to(dtype)) for name in VALUES)


def test_parts_that_are_not_the_adapter_are_a_bug(tmp_path):
    names = sorted(VALUES)
    with pytest.raises(AssertionError, match="parts are not the adapter"):
        join(tmp_path / "less", names[1:])
    with pytest.raises(AssertionError, match="parts are not the adapter"):
        join(tmp_path / "twice", names, names[:1])


def test_tensors_that_always_have_the_same_dtype_keep_it(tmp_path):
    """The biases that choose experts, which a saved router has; rounded, they choose others."""
    table = weight_table(tiny_config("deepseek_v3"))
    gate = "model.layers.{layer}.mlp.gate."
    saved = (f"{gate}weight", f"{gate}e_score_correction_bias")
    lora = uniform_plan(table, "q_a_proj", modules_to_save=saved)
    values = random_values(lora, table)
    parts = [tmp_path / "part-0.safetensors", tmp_path / "part-1.safetensors"]
    stored = {
        name: value if name.endswith("correction_bias") else value.bfloat16()
        for name, value in values.items()
    }
    for index, path in enumerate(parts):
        save_file({name: stored[name] for name in sorted(stored)[index::2]}, path)
    target = tmp_path / "joined.safetensors"
    join_adapter_files(parts, target, lora=lora, table=table, layout="per_expert")
    joined = load_file(target)
    assert joined.keys() == stored.keys()
    for name, value in stored.items():
        assert joined[name].dtype == value.dtype
        assert torch.equal(joined[name], value)


def test_a_module_that_transformers_renamed_is_stored_under_its_new_name(tmp_path):
    table = weight_table(tiny_config("mixtral"))
    lora = uniform_plan(table, "gate", "w1", "w2", "w3")
    values = random_values(lora, table)
    save_file(values, tmp_path / "part.safetensors")
    for layout in ("per_expert", "fused"):
        target = tmp_path / f"{layout}.safetensors"
        join_adapter_files(
            [tmp_path / "part.safetensors"], target, lora=lora, table=table, layout=layout
        )
        names = set(read_header(target))
        experts = "block_sparse_moe.experts.3.w2" if layout == "per_expert" else "mlp.experts"
        for module in ("mlp.gate", experts):
            assert f"base_model.model.model.layers.0.{module}.lora_A.weight" in names
        assert not any("block_sparse_moe.gate" in name for name in names)
