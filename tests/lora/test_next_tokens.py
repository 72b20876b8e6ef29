"""Adapters of layers of multi-token prediction, which no class of transformers has.

The judge is the reference of `tests.next_tokens` with the adapters merged: its gradient of a weight
gives those of both factors.
"""

import peft
import pytest
import torch

from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.save import lookup_in
from mtrain.lora.peft_config import next_tokens_problem
from mtrain.lora.peft_format import read_adapter
from mtrain.lora.plan import Adapter, adapter_table
from tests.adapters import attached, gathered, plan_of, random_factors
from tests.lora.peft_folders import (
    changes_of,
    hf_model,
    logits_of,
    make_plan,
    merged_by_hand,
    random_values,
    views_of,
    write_adapter,
)
from tests.megatron import SINGLE, packed_inputs, read_config
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.ranks import run_ranks
from tests.tiny import tiny_config

LENGTHS = [7, 1, 12, 20]
VOCAB = 131
# What begins the names of the layer in files; in the reference it is the fifth one.
LAYERS = {"mimo": "model.mtp_layers.0."}
# The linear that joins embedding and hidden state.
JOINS = {
    "deepseek_v3": "model.layers.4.eh_proj.weight",
    "glm4_moe": "model.layers.4.eh_proj.weight",
    "mimo": "model.mtp_layers.0.input_proj.weight",
}


def gradients_of_factors(state, folder, lora, values, output):
    table, _ = plan_of(folder, num_next_tokens=1)
    (model,) = attached(state, folder, lora, values, num_next_tokens=1)
    model.train()
    losses, _ = model(**packed_inputs(LENGTHS, VOCAB))
    losses.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return gathered(state, lookup_in([found]), output, adapter_table(table, lora))


def gradients_of_weights(reference, changes, name):
    """Gradients of merged weights, by their names in files."""

    def views():
        found = {
            key.replace("model.layers.4.", LAYERS.get(name, "model.layers.4.")): view
            for key, view in views_of(reference.model).items()
        }
        return found | {JOINS[name]: reference.own["eh_proj"].data}

    parameters = [*reference.model.parameters(), *reference.own.values()]
    with torch.no_grad():
        for key, change in changes.items():
            views()[key].add_(change)
    inputs = packed_inputs(LENGTHS, VOCAB)
    documents = (inputs[key].split(LENGTHS, dim=1) for key in ("input_ids", "labels"))
    for document in zip(*documents, strict=True):
        main, further = reference.losses(*document)
        (main + 0.1 * further).backward()
    for parameter in parameters:
        parameter.data = parameter.grad
    return views()


@pytest.mark.parametrize("name", JOINS)
def test_gradients_are_those_of_the_merged_reference(name, tmp_path):
    folder, reference = make_checkpoint_with_next_tokens(tmp_path / "model", name)
    table, lora = plan_of(folder, num_next_tokens=1)
    values = random_factors(table, lora)
    arguments = (folder, lora, values, tmp_path / "gradients")
    ours = run_ranks(SINGLE, gradients_of_factors, *arguments)[0]
    changes = changes_of(lora, values.__getitem__, table, {})
    assert JOINS[name] in changes
    weights = gradients_of_weights(reference, changes, name)
    assert ours.keys() == hf_tensors(adapter_table(table, lora)).keys()
    scale = 6.0 / 4
    for key in changes:
        a_name, b_name = (
            f"base_model.model.{key.removesuffix('.weight')}.lora_{letter}.weight"
            for letter in "AB"
        )
        expected = {
            a_name: scale * values[b_name].t() @ weights[key],
            b_name: scale * weights[key] @ values[a_name].t(),
        }
        for factor, gradient in expected.items():
            assert (ours[factor] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), factor


def one_rank_apart(name, layer):
    """Other ranks and alphas in the layer of multi-token prediction."""
    if name.split(".")[-2] in ("embed_tokens", "lm_head", "gate"):
        return None
    return Adapter(rank=4 if ".{layer}." in name else 6, alpha=6.0 if ".{layer}." in name else 9.0)


def that_layer_and_another_linear(name, layer):
    is_chosen = ".{layer}." not in name or "o_proj" in name
    return one_rank_apart(name, layer) if is_chosen else None


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("choose", [one_rank_apart, that_layer_and_another_linear])
def test_peft_loads_the_rest_and_mtrain_all_of_it(choose, layout, tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "deepseek_v3")
    table = weight_table(read_config(folder), 1)
    lora = make_plan(table, choose)
    assert next_tokens_problem(lora).startswith("PEFT leaves out the adapters of multi-token")
    values = random_values(lora, table)
    write_adapter(tmp_path / "adapter", lora, table, values, layout=layout)
    stored = read_adapter(tmp_path / "adapter", table)
    assert stored.lora == lora
    with stored.open() as source:
        assert all(torch.equal(source.slices(name)[:], values[name]) for name in values)
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    model = peft.PeftModel(hf_model(folder), config)
    result = model.load_adapter(str(tmp_path / "adapter"), "default")
    assert all(".layers.4." in name for name in result.unexpected_keys)
    assert not [name for name in result.missing_keys if "lora_" in name]
    changes = changes_of(lora, values.__getitem__, table, {})
    known = {name: change for name, change in changes.items() if ".layers.4." not in name}
    expected = logits_of(merged_by_hand(folder, known))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_of_an_adapter_without_those_layers_nothing_is_left_out():
    table = weight_table(tiny_config("deepseek_v3"))
    assert next_tokens_problem(make_plan(table, one_rank_apart)) is None
