"""Advice about flags that do not exist; that they lead to real flags is tested in test_parser."""

import pytest

from mtrain.config.names import ABSENT, ARCHITECTURE, RENAMED, advice_for


def test_the_tables_do_not_contradict_each_other() -> None:
    assert not RENAMED.keys() & ABSENT.keys()
    assert not (RENAMED.keys() | ABSENT.keys()) & ARCHITECTURE


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("max_epochs", "--max_epochs is now --num_train_epochs"),
        ("load_safetensors", "--load_safetensors is not a flag of mtrain: --model reads safeten"),
        ("hidden_size", "--hidden_size is read from the model's config.json; to overrule it use"),
    ],
)
def test_known_names_get_advice(name: str, advice: str) -> None:
    assert advice_for(name).startswith(advice)


def test_other_names_get_none() -> None:
    assert advice_for("qwertz") is None
