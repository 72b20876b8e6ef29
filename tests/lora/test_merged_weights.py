"""Merging while reading gives the weights that PEFT's own merge gives."""

import pytest
import torch

from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.storage.view import arranged
from mtrain.lora.merged_weights import merge_weights
from mtrain.lora.peft_format import read_adapter
from mtrain.lora.plan import Adapter
from tests.lora.peft_folders import (
    hf_model,
    load_with_peft,
    make_plan,
    random_values,
    save_with_peft,
    table_of,
    weights_of,
    write_adapter,
)
from tests.tiny import TINY, make_checkpoint

CONFIGS = {
    "projections": {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
    "rslora": {"target_modules": ["k_proj", "gate_proj"], "use_rslora": True},
    "ranks and alphas": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 3},
        "alpha_pattern": {"down_proj": 7},
    },
    "embedding and output layer": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "modules to save": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "input_layernorm"],
    },
}
EXPERTS = {
    "gate, up and down": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "down": ["mlp.experts.down_proj"],
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("a"), "qwen3", num_hidden_layers=2)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("b"), "qwen3_moe_mixed", num_hidden_layers=3)


def stored(folder):
    return arranged(open_checkpoint(folder), table_of(folder))


def merged_of(folder, adapter):
    return merge_weights(stored(folder), read_adapter(adapter, table_of(folder)))


def values_of(weights):
    with weights.open() as source:
        return {name: source.slices(name)[:].clone() for name in weights.tensors}


def check(folder, adapter, expected):
    """Compares with all weights of a merged model; what has no adapter must not change."""
    merged = merged_of(folder, adapter)
    before = values_of(stored(folder))
    values = values_of(merged)
    assert values.keys() == before.keys()
    changed = merged.factors.keys() | merged.saved
    assert changed
    for name, value in values.items():
        if name in changed:
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6, msg=name)
            assert not torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_adapters_of_peft_are_merged_as_by_peft(dense, tmp_path, config):
    changes = save_with_peft(dense, tmp_path / "adapter", r=4, lora_alpha=6, **config)
    before = weights_of(hf_model(dense))
    expected = {name: value + changes.get(name, 0) for name, value in before.items()}
    check(dense, tmp_path / "adapter", expected)
    merged = merged_of(dense, tmp_path / "adapter")
    assert changes.keys() == merged.factors.keys() | merged.saved


@pytest.mark.parametrize("parameters", EXPERTS.values(), ids=EXPERTS.keys())
def test_fused_experts_of_peft_are_merged_as_by_peft(mixed, tmp_path, parameters):
    adapter = tmp_path / "adapter"
    config = {"target_modules": ["o_proj"], "target_parameters": parameters}
    save_with_peft(mixed, adapter, r=2, lora_alpha=3, lora_dropout=0.0, **config)
    check(mixed, adapter, weights_of(load_with_peft(mixed, adapter).merge_and_unload()))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_single_experts_are_merged_like_fused_ones(mixed, tmp_path, use_rslora):
    adapter = Adapter(rank=3, alpha=5.0, use_rslora=use_rslora)
    table = table_of(mixed)
    lora = make_plan(table, lambda name, _: adapter if "experts" in name else None)
    values = random_values(lora, table)
    folders = {
        layout: write_adapter(tmp_path / layout, lora, table, values, layout=layout)
        for layout in ("per_expert", "fused")
    }
    single, fused = (values_of(merged_of(mixed, folder)) for folder in folders.values())
    assert all(torch.equal(single[name], fused[name]) for name in single)
    check(
        mixed,
        folders["per_expert"],
        weights_of(load_with_peft(mixed, folders["fused"]).merge_and_unload()),
    )


@pytest.mark.parametrize("name", TINY)
def test_every_projection_of_every_family_is_merged(name, tmp_path):
    folder = make_checkpoint(tmp_path / "model", name, num_hidden_layers=2)
    table = table_of(folder)
    adapter = Adapter(rank=3, alpha=5.0)
    others = ("embed_tokens", "lm_head", "wte")
    lora = make_plan(table, lambda name, _: None if name.split(".")[-2] in others else adapter)
    values = random_values(lora, table)
    merged = merged_of(folder, write_adapter(tmp_path / "adapter", lora, table, values))
    before, after = values_of(stored(folder)), values_of(merged)
    linears = {n for n in before if before[n].dim() == 2 and n.split(".")[-2] not in others}
    linears -= {"transformer.wpe.weight"}
    assert merged.factors.keys() == linears
    for name in linears:
        module = "base_model.model." + name.removesuffix(".weight")
        product = values[f"{module}.lora_B.weight"] @ values[f"{module}.lora_A.weight"]
        torch.testing.assert_close(
            after[name], before[name] + adapter.scale * product, rtol=1e-5, atol=1e-6
        )


@pytest.fixture(scope="module")
def all_kinds(dense, tmp_path_factory):
    """Merged weights with factors, an adapted embedding and weights that are replaced."""
    adapter = tmp_path_factory.mktemp("kinds")
    config = {
        "target_modules": ["embed_tokens", "q_proj"],
        "modules_to_save": ["lm_head", "input_layernorm"],
    }
    save_with_peft(dense, adapter, r=4, lora_alpha=6, **config)
    return merged_of(dense, adapter)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ],
)
def test_parts_are_those_of_the_whole(all_kinds, name):
    with all_kinds.open() as source:
        whole = source.slices(name)[:]
        for rows in (slice(0, 1), slice(7, 20), slice(64, None)):
            for columns in (slice(0, 1), slice(5, 30)):
                part = source.slices(name)[rows, columns]
                torch.testing.assert_close(part, whole[rows, columns], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(source.slices(name)[rows], whole[rows], rtol=1e-6, atol=1e-6)


def test_what_changes_is_float32_and_the_rest_stays_as_it_is(tmp_path):
    """Rounding is left to whoever writes; base and factors are widened before they are added."""
    folder = make_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=1, dtype="bfloat16")
    table = table_of(folder)
    lora = make_plan(
        table,
        lambda name, _: Adapter(rank=2, alpha=3.0) if "q_proj" in name else None,
        modules_to_save=("lm_head.weight",),
    )
    values = {name: value.bfloat16() for name, value in random_values(lora, table).items()}
    merged = merged_of(folder, write_adapter(tmp_path / "adapter", lora, table, values))
    wide = {name for name, tensor in merged.tensors.items() if tensor.dtype == "F32"}
    query = "model.layers.0.self_attn.q_proj"
    assert wide == {f"{query}.weight", "lm_head.weight"}
    assert {t.dtype for name, t in merged.tensors.items() if name not in wide} == {"BF16"}
    after, before = values_of(merged), values_of(stored(folder))
    lora_a, lora_b = (
        values[f"base_model.model.{query}.lora_{factor}.weight"].float() for factor in "AB"
    )
    expected = before[f"{query}.weight"].float() + 1.5 * (lora_b @ lora_a)
    torch.testing.assert_close(after[f"{query}.weight"], expected, rtol=1e-6, atol=1e-7)
    saved = values["base_model.model.lm_head.weight"].float()
    assert torch.equal(after["lm_head.weight"], saved)
    assert merged.folder == folder
