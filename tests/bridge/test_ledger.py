"""Every fault that a checkpoint or a model can have is found before anything is read (T23)."""

from dataclasses import replace
from pathlib import Path

import pytest

from mtrain.bridge.ledger import carried_names, check_checkpoint, check_model, copied_names
from mtrain.bridge.plan import hf_tensors, plan_rank, weight_table
from mtrain.bridge.rules import IgnoredKey
from mtrain.bridge.safetensors_folder import Checkpoint
from mtrain.bridge.safetensors_header import StoredTensor, tensor_bytes
from mtrain.parallel import ParallelLayout
from tests.tiny import TINY, tiny_config


def stored(shape, dtype="BF16"):
    return StoredTensor(
        path=Path("x.safetensors"),
        dtype=dtype,
        shape=shape,
        num_bytes=tensor_bytes(dtype, shape),
        start=0,
    )


def checkpoint_for(name):
    table = weight_table(tiny_config(name))
    tensors = {key: stored(shape) for key, shape in hf_tensors(table).items()}
    return table, Checkpoint(folder=Path("folder"), tensors=tensors)


@pytest.mark.parametrize("name", TINY)
def test_a_complete_checkpoint_passes(name):
    assert check_checkpoint(*checkpoint_for(name)) == {}


@pytest.mark.parametrize("name", TINY)
def test_each_missing_tensor_is_named(name):
    """T23: whichever it is."""
    table, checkpoint = checkpoint_for(name)
    for key in list(checkpoint.tensors):
        tensor = checkpoint.tensors.pop(key)
        with pytest.raises(ValueError, match=f"folder: does not fit .* missing: {key}$"):
            check_checkpoint(table, checkpoint)
        checkpoint.tensors[key] = tensor


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers.0.self_attn.q_proj.bias", stored((64,)), "not part of the model: "),
        ("model.layers.4.mlp.up_proj.weight", stored((96, 64)), "not part of the model: "),
        ("model.norm.weight.", stored((64,)), "not part of the model: "),
        ("xmodel.norm.weight", stored((64,)), "not part of the model: "),
        ("model.norm.weight", stored((65,)), r"wrong shape: model.norm.weight has \(65,\), exp"),
        ("model.norm.weight", stored((64, 1)), "wrong shape: "),
        ("model.norm.weight", stored((64,), "I8"), r"dtype not supported: model.norm.weight \(I8"),
        ("model.norm.weight", stored((64,), "F8_E4M3"), "dtype not supported: "),
        ("model.layers.0.self_attn.rotary_emb.inv_freq.weight", stored((8,)), "not part"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(key, value, message):
    """T23"""
    table, checkpoint = checkpoint_for("llama")
    checkpoint.tensors[key] = value
    with pytest.raises(ValueError, match=message) as caught:
        check_checkpoint(table, checkpoint)
    assert key in str(caught.value)


def test_a_renamed_tensor_is_named_on_both_sides():
    """T23"""
    table, checkpoint = checkpoint_for("llama")
    checkpoint.tensors["model.final.weight"] = checkpoint.tensors.pop("model.norm.weight")
    with pytest.raises(
        ValueError, match=r"missing: model.norm.weight; not part of the model: model.final.weight$"
    ):
        check_checkpoint(table, checkpoint)


def test_long_lists_end_after_ten():
    table, checkpoint = checkpoint_for("llama")
    checkpoint.tensors.clear()
    with pytest.raises(ValueError, match=r"and 29 more$") as caught:
        check_checkpoint(table, checkpoint)
    assert str(caught.value).count("weight") == 10


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_any_dtype_of_numbers_is_accepted(dtype):
    table, checkpoint = checkpoint_for("llama")
    for key, tensor in checkpoint.tensors.items():
        checkpoint.tensors[key] = stored(tensor.shape, dtype)
    check_checkpoint(table, checkpoint)


def test_what_is_left_out_comes_with_a_reason():
    table, checkpoint = checkpoint_for("llama3_tied")
    old = "model.layers.3.self_attn.rotary_emb.inv_freq"
    checkpoint.tensors[old] = stored((8,), "F32")
    checkpoint.tensors["lm_head.weight"] = stored((131, 64))
    ignored = check_checkpoint(table, checkpoint)
    assert set(ignored) == {old, "lm_head.weight"}
    assert "rotary frequencies" in ignored[old].reason
    assert ignored["lm_head.weight"].copy_of == "model.embed_tokens.weight"


def test_only_what_is_said_to_be_copied_is():
    """Not what is ignored for good, and not what a rule of the model has."""
    table, checkpoint = checkpoint_for("llama3_tied")
    extra = IgnoredKey(r"model\.(extra|norm)\..*", "not trained", is_carried=True)
    table = replace(table, ignored=(*table.ignored, extra))
    for name in ("lm_head.weight", "model.extra.a", "model.extra.b"):
        checkpoint.tensors[name] = stored((4, 4))
    assert carried_names(table, checkpoint) == ["model.extra.a", "model.extra.b"]
    assert set(check_checkpoint(table, checkpoint)) == {
        "lm_head.weight",
        "model.extra.a",
        "model.extra.b",
    }


def test_a_copy_is_not_carried_but_made_again():
    table, checkpoint = checkpoint_for("llama3_tied")
    again = IgnoredKey("copy", "for others", copy_of="model.norm.weight", is_carried=True)
    table = replace(table, ignored=(*table.ignored, again))
    for name in ("lm_head.weight", "copy"):
        checkpoint.tensors[name] = stored((4, 4))
    assert copied_names(table, checkpoint) == {"copy": "model.norm.weight"}
    assert carried_names(table, checkpoint) == []


def plan_and_shapes():
    layout = ParallelLayout(world_size=2, pp_size=2, vpp_size=2)
    plan = plan_rank(weight_table(tiny_config("qwen3")), layout=layout, rank=1)
    shapes = [{p.name: p.shape for p in plan if p.chunk == chunk} for chunk in range(2)]
    return plan, shapes


def test_a_model_that_fits_its_plan_passes():
    check_model(*plan_and_shapes())


def test_a_parameter_without_a_rule_is_named():
    """T23"""
    plan, shapes = plan_and_shapes()
    shapes[1]["decoder.extra"] = (3,)
    with pytest.raises(ValueError, match=r"no rule fills: decoder.extra \(chunk 1\)$"):
        check_model(plan, shapes)


def test_a_rule_without_a_parameter_is_named():
    """T23"""
    plan, shapes = plan_and_shapes()
    del shapes[1]["output_layer.weight"]
    with pytest.raises(ValueError, match=r"not in the model: output_layer.weight \(chunk 1\)$"):
        check_model(plan, shapes)


def test_a_parameter_of_another_shape_is_named():
    """T23"""
    plan, shapes = plan_and_shapes()
    shapes[1]["output_layer.weight"] = (132, 64)
    with pytest.raises(ValueError, match=r"has \(132, 64\), planned is \(131, 64\)$"):
        check_model(plan, shapes)
