"""Values of adapters: fresh ones do not depend on the layout, and start as PEFT's do."""

import peft
import pytest
import torch

from mtrain.bridge.plan import hf_tensors
from mtrain.lora.plan import adapter_table
from mtrain.lora.weights import adapter_lookup
from tests.adapters import Judge, attached, gathered, plan_of, random_factors
from tests.megatron import SINGLE
from tests.ranks import run_ranks
from tests.test_invariance import layout
from tests.tiny import make_checkpoint

LAYOUTS = {
    "one": SINGLE,
    "tp2_pp2": layout(tp_size=2, pp_size=2),
    "tp2_etp2_ep2": layout(tp_size=2, etp_size=2, ep_size=2),
    "tp4": layout(tp_size=4),
    "tp2_ep2": layout(tp_size=2, ep_size=2),
}


def values_of(state, folder, lora, values, output):
    table, _ = plan_of(folder)
    chunks = attached(state, folder, lora, values)
    lookup = adapter_lookup(chunks, dtype=torch.float32)
    return gathered(state, lookup, output, adapter_table(table, lora))


def dtypes_of(state, folder, lora, values):
    """Dtypes of some tensors of an adapter that is saved in bfloat16, from a float32 model."""
    (chunk,) = attached(state, folder, lora, values)
    lookup = adapter_lookup([chunk], dtype=torch.bfloat16)
    router = "decoder.layers.1.mlp.router."
    return [lookup(0, router + name, None).dtype for name in ("weight", "expert_bias")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe_mixed")


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_loading_and_saving_gives_the_same_bytes(sizes, checkpoint, tmp_path):
    everything = ("all-linear", "all-router", "all-embedding", "lm_head")
    table, lora = plan_of(checkpoint, target_modules=everything, modules_to_save=("norm",))
    values = random_factors(table, lora)
    saved = run_ranks(sizes, values_of, checkpoint, lora, values, tmp_path / "out")[0]
    assert saved.keys() == values.keys()
    assert all(torch.equal(saved[name], values[name]) for name in values)


FAMILIES = {
    "deepseek_v3": "tp2_ep2",
    "qwen2_moe": "tp2_ep2",
    "qwen3_next_moe": "tp2_ep2",
    "gpt_oss_moe": "tp2_etp2_ep2",
    "mixtral": "tp2_ep2",
    "phi3": "tp4",
    "gpt2": "tp4",
}


@pytest.mark.parametrize(("name", "sizes"), FAMILIES.items())
def test_so_it_is_for_the_linears_of_other_families(name, sizes, tmp_path):
    folder = make_checkpoint(tmp_path / "model", name)
    saved = {"deepseek_v3": ("mlp.gate",), "qwen2_moe": ("shared_expert.down_proj",)}
    targets = ("q_proj", "shared_expert_gate") if name == "qwen2_moe" else ("all-linear",)
    table, lora = plan_of(folder, target_modules=targets, modules_to_save=saved.get(name, ()))
    values = random_factors(table, lora)
    saved = run_ranks(LAYOUTS[sizes], values_of, folder, lora, values, tmp_path / "out")[0]
    assert saved.keys() == values.keys()
    assert all(torch.equal(saved[key], values[key]) for key in values)


def test_a_buffer_keeps_its_dtype_where_the_adapter_is_saved_in_another_one(tmp_path):
    folder = make_checkpoint(tmp_path / "model", "deepseek_v3")
    table, lora = plan_of(folder, target_modules=("o_proj",), modules_to_save=("mlp.gate",))
    values = random_factors(table, lora)
    (dtypes,) = run_ranks(SINGLE, dtypes_of, folder, lora, values)
    assert dtypes == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("sizes", list(LAYOUTS)[1:3])
def test_a_run_starts_with_the_same_adapter_in_every_layout(sizes, checkpoint, tmp_path):
    _, lora = plan_of(checkpoint)
    one = run_ranks(SINGLE, values_of, checkpoint, lora, None, tmp_path / "one")[0]
    other = run_ranks(LAYOUTS[sizes], values_of, checkpoint, lora, None, tmp_path / "other")[0]
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fresh_values_are_spread_as_in_peft(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3", num_hidden_layers=2)
    table, lora = plan_of(folder, target_modules=("all-linear", "all-embedding"), lora_rank=32)
    ours = run_ranks(SINGLE, values_of, folder, lora, None, tmp_path / "out")[0]
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=32, target_modules=[*names, "embed_tokens"])
    theirs = peft.get_peft_model_state_dict(
        peft.get_peft_model(Judge(folder), config), save_embedding_layers=False
    )
    assert ours.keys() == theirs.keys() == hf_tensors(adapter_table(table, lora)).keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name
        assert tensor.abs().max().item() == pytest.approx(theirs[name].abs().max().item(), rel=0.4)
    different = [n for n in ours if n.endswith("lora_A.weight")]
    assert not torch.equal(ours[different[0]], ours[different[1]])
