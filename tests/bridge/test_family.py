from dataclasses import FrozenInstanceError

import pytest

from mtrain.bridge.families import FAMILIES
from tests.tiny import TINY, tiny_config


@pytest.mark.parametrize("name", TINY)
def test_a_family_is_two_functions_of_the_config(name):
    config = tiny_config(name)
    family = FAMILIES[config["model_type"]]
    assert config["model_type"] in family.model_types
    assert family.weight_table(config).num_layers == config["num_hidden_layers"]
    megatron = family.megatron_config(config)
    assert megatron.transformer["num_layers"] == config["num_hidden_layers"]
    assert megatron.gpt.vocab_size == config["vocab_size"]


def test_a_family_cannot_be_changed_by_one_of_its_models():
    """Elsewhere a tied model once changed the table that untied models used after it."""
    family = FAMILIES["qwen2"]
    before = family.weight_table(tiny_config("qwen2"))
    family.weight_table(tiny_config("qwen2_tied"))
    assert family.weight_table(tiny_config("qwen2")) == before
    with pytest.raises(FrozenInstanceError):
        family.name = "another"
