"""Checkpoints in other forms give the same tensors as those with one tensor an expert."""

from dataclasses import replace

import pytest
import torch

from mtrain.bridge.fingerprint import fingerprint
from mtrain.bridge.ledger import check_checkpoint
from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.storage.forms import stacked_experts
from mtrain.bridge.storage.view import arranged
from tests.bridge.storage.checkpoints import (
    EXPERTS,
    HIDDEN,
    WIDTH,
    expert_rules,
    gpt2,
    gpt2_table,
    gpt_oss,
    gpt_oss_table,
    qwen3_moe,
    qwen3_moe_table,
    rewritten,
    tensors_of,
)
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    made = {"qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss, "gpt2": gpt2}
    return {name: make(root / name) for name, make in made.items()}


TABLES = {"qwen3_moe": qwen3_moe_table, "gpt_oss": gpt_oss_table, "gpt2": gpt2_table}


def values_of(weights):
    with weights.open() as source:
        return {name: source.slices(name)[:] for name in weights.tensors}


def test_stacked_experts_are_those_that_transformers_writes_one_by_one(folders, tmp_path):
    stacked = folders["qwen3_moe"]
    assert f"{EXPERTS}gate_up_proj".format(layer=0) in tensors_of(stacked)
    qwen3_moe(tmp_path, is_original=True)
    weights = arranged(open_checkpoint(stacked), qwen3_moe_table())
    assert check_checkpoint(qwen3_moe_table(), weights) == {}
    one_by_one = open_checkpoint(tmp_path)
    values, expected = values_of(weights), tensors_of(tmp_path)
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert fingerprint(weights) == fingerprint(one_by_one)


def test_the_experts_of_gpt_oss_compute_what_its_class_does(folders):
    """Interleaved rows and transposed matrices, judged by the formula of the class."""
    from transformers import AutoModelForCausalLM

    experts = AutoModelForCausalLM.from_pretrained(folders["gpt_oss"]).model.layers[1].mlp.experts
    values = values_of(arranged(open_checkpoint(folders["gpt_oss"]), gpt_oss_table()))
    x = torch.randn(5, HIDDEN)
    for expert in range(4):
        own = {
            name: values[f"{EXPERTS}{{expert}}.{name}".format(layer=1, expert=expert)]
            for name in (
                f"{p}_proj.{k}" for p in ("gate", "up", "down") for k in ("weight", "bias")
            )
        }
        fused = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        for first, name in enumerate(("gate_proj", "up_proj")):
            ours = x @ own[f"{name}.weight"].t() + own[f"{name}.bias"]
            torch.testing.assert_close(ours, fused[:, first::2], rtol=1e-4, atol=1e-5)
        y = torch.randn(5, WIDTH)
        theirs = y @ experts.down_proj[expert] + experts.down_proj_bias[expert]
        ours = y @ own["down_proj.weight"].t() + own["down_proj.bias"]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_matrices_of_gpt2_compute_what_its_conv1d_does(folders):
    from transformers import AutoModelForCausalLM

    block = AutoModelForCausalLM.from_pretrained(folders["gpt2"]).transformer.h[1]
    values = values_of(arranged(open_checkpoint(folders["gpt2"]), gpt2_table()))
    x = torch.randn(3, 32)
    qkv = torch.cat([x @ values[f"transformer.h.1.attn.{name}.weight"].t() for name in "qkv"], -1)
    torch.testing.assert_close(
        qkv + block.attn.c_attn.bias, block.attn.c_attn(x), rtol=1e-4, atol=1e-5
    )
    ours = x @ values["transformer.h.1.mlp.c_fc.weight"].t() + block.mlp.c_fc.bias
    torch.testing.assert_close(ours, block.mlp.c_fc(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TABLES)
def test_parts_are_those_of_the_whole(folders, name):
    weights = arranged(open_checkpoint(folders[name]), TABLES[name]())
    with weights.open() as source:
        for tensor, shape in hf_tensors(TABLES[name]()).items():
            assert tuple(weights.tensors[tensor].shape) == shape
            whole, slices = source.slices(tensor)[:], source.slices(tensor)
            assert whole.shape == shape
            for start, stop in ((0, 7), (5, 6), (shape[0] - 3, shape[0]), (4, 4)):
                assert torch.equal(slices[start:stop], whole[start:stop])
                if len(shape) == 2:
                    assert torch.equal(slices[start:stop, 3:9], whole[start:stop, 3:9])
                    assert torch.equal(slices[:, 2:5], whole[:, 2:5])


def test_a_checkpoint_with_one_tensor_an_expert_is_seen_as_it_is(tmp_path):
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, "qwen3_moe_mixed"))
    weights = arranged(checkpoint, qwen3_moe_table())
    assert (weights.arrangements, weights.tensors) == ((), checkpoint.tensors)


def test_an_expert_is_read_without_the_others(folders, monkeypatch):
    from mtrain.bridge import safetensors_reader

    read, preadv = [], safetensors_reader.os.preadv
    monkeypatch.setattr(
        safetensors_reader.os,
        "preadv",
        lambda descriptor, buffers, position: (
            read.append(sum(len(buffer) for buffer in buffers))
            or preadv(descriptor, buffers, position)
        ),
    )
    with arranged(open_checkpoint(folders["qwen3_moe"]), qwen3_moe_table()).open() as source:
        part = source.slices("model.layers.0.mlp.experts.3.up_proj.weight")[10:20]
    assert read == [part.nbytes]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("model.layers.0.mlp.experts.down_proj", "missing: model.layers.0.mlp.experts.down_proj"),
        (
            "model.layers.2.mlp.experts.gate_up_proj",
            "missing: model.layers.2.mlp.experts.gate_up_proj",
        ),
    ],
)
def test_a_form_that_is_there_in_part_is_told_by_what_is_missing(folders, tmp_path, gone, message):
    tensors = tensors_of(folders["qwen3_moe"])
    del tensors[gone]
    folder = rewritten(folders["qwen3_moe"], tmp_path / "half", tensors)
    with pytest.raises(ValueError, match=message) as caught:
        arranged(open_checkpoint(folder), qwen3_moe_table())
    assert "\n" not in str(caught.value)


def test_all_stacked_tensors_of_one_projection_may_be_what_is_missing(folders, tmp_path):
    """Then no layer shows that it should be there, but the other projection does."""
    tensors = tensors_of(folders["qwen3_moe"])
    kept = {
        name: value for name, value in tensors.items() if not name.endswith("experts.down_proj")
    }
    folder = rewritten(folders["qwen3_moe"], tmp_path / "half", kept)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.mlp\.experts\.down_proj, "):
        arranged(open_checkpoint(folder), qwen3_moe_table())


def test_an_expert_that_is_stored_twice_is_refused(folders, tmp_path):
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    tensors = tensors_of(folders["qwen3_moe"]) | {name: torch.zeros(64, 48)}
    folder = rewritten(folders["qwen3_moe"], tmp_path / "twice", tensors)
    with pytest.raises(ValueError, match=f"stored twice: {name} .by itself and in model.layers.0"):
        arranged(open_checkpoint(folder), qwen3_moe_table())


def test_a_stacked_tensor_of_another_shape_is_told_with_both_shapes(folders, tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = tensors_of(folders["qwen3_moe"]) | {name: torch.zeros(4, 48, 64)}
    folder = rewritten(folders["qwen3_moe"], tmp_path / "wrong", tensors)
    message = rf"wrong shape: {name} has \(4, 48, 64\), expected is \(4, 64, 48\)"
    with pytest.raises(ValueError, match=message):
        arranged(open_checkpoint(folder), qwen3_moe_table())


@pytest.mark.parametrize("is_transposed", [True, False])
def test_the_shape_tells_which_of_two_forms_of_one_name_it_is(tmp_path, is_transposed):
    """Qwen3-VL: `[E, in, out]` in published files, `[E, out, in]` in what transformers saves."""
    table = replace(
        gpt_oss_table(),
        rules=expert_rules()[::2],
        ignored=(),
        forms=(
            *stacked_experts(EXPERTS, is_transposed=True, is_native=True),
            *stacked_experts(EXPERTS),
        ),
    )
    tensors, expected = {}, {}
    for layer in range(2):
        gate, up = torch.randn(2, 4, WIDTH, HIDDEN)
        down = torch.randn(4, HIDDEN, WIDTH)
        fused = torch.cat([gate, up], dim=1)
        if is_transposed:
            fused, down_stored = fused.transpose(1, 2), down.transpose(1, 2)
        else:
            down_stored = down
        start = EXPERTS.format(layer=layer)
        tensors |= {f"{start}gate_up_proj": fused, f"{start}down_proj": down_stored}
        for expert in range(4):
            parts = {"gate": gate[expert], "up": up[expert], "down": down[expert]}
            expected |= {f"{start}{expert}.{p}_proj.weight": parts[p] for p in parts}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    folder = rewritten(tmp_path / "source", tmp_path / "made", tensors)
    weights = arranged(open_checkpoint(folder), table)
    assert check_checkpoint(table, weights) == {}
    values = values_of(weights)
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)
