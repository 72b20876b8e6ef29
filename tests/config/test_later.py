"""What is not built yet is refused, never ignored."""

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

from mtrain.config import (
    DataConfig,
    ExportConfig,
    ModelConfig,
    SftConfig,
    TrainingConfig,
    resolve_export,
    resolve_sft,
)
from mtrain.config.fields import check_values, flag_specs
from mtrain.config.later import LATER, WITHOUT_EFFECT, Refusal, refuse_later_features

PACKAGE = Path(__file__).parents[2] / "mtrain"
# Flag -> command, section and declaration; what both commands have is taken from sft.
SPECS = {
    spec.name: (command, part.name, spec)
    for command in (ExportConfig, SftConfig)
    for part in dataclasses.fields(command)
    for spec in flag_specs(typing.get_type_hints(command)[part.name])
}


def with_value(flag: str, value: object) -> SftConfig | ExportConfig:
    """The defaults of a command but for one flag."""
    command, part, _ = SPECS[flag]
    config = command()
    section = dataclasses.replace(getattr(config, part), **{flag: value})
    check_values(section)
    return dataclasses.replace(config, **{part: section})


def test_defaults_ask_for_nothing_that_is_missing() -> None:
    refuse_later_features(SftConfig())
    refuse_later_features(resolve_sft(SftConfig()))
    refuse_later_features(resolve_export(ExportConfig()))


def test_every_flag_has_one_row() -> None:
    flags = [row.flag for row in LATER]
    assert len(flags) == len(set(flags))


def test_every_flag_is_read_or_refused_or_explained() -> None:
    read = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "config"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
    }
    # Turned into another setting by resolve_sft, or into bytes by a property; of the two directions
    # of an export one is built, so it is only checked, as is what allows for other flags.
    resolved = {"bf16", "fp16", "max_shard_size", "to_hf", "use_precision_aware_optimizer"}
    known = read | resolved | {row.flag for row in LATER} | WITHOUT_EFFECT.keys()
    assert SPECS.keys() - known == set()


def test_explained_flags_exist_and_are_not_refused() -> None:
    assert WITHOUT_EFFECT.keys() <= SPECS.keys()
    assert not WITHOUT_EFFECT.keys() & {row.flag for row in LATER}


def value_outside(row: Refusal) -> object:
    """Some value of the right kind that the row does not accept."""
    spec = SPECS[row.flag][2]
    if spec.choices:
        other = next(choice for choice in spec.choices if choice not in row.accepted)
        return (other,) if isinstance(spec.default, tuple) else other
    if spec.type_hint in (bool, bool | None):
        return False
    if spec.type_hint in (int, int | None, float | None):
        return 7
    return ("x",) if isinstance(spec.default, tuple) else "x"


@pytest.mark.parametrize("row", LATER, ids=lambda row: row.flag)
def test_each_row_refuses_its_flag_in_one_line(row: Refusal) -> None:
    value = True if row.accepted in ((False,), (None, False)) else value_outside(row)
    with pytest.raises(ValueError) as caught:
        refuse_later_features(with_value(row.flag, value))
    message = str(caught.value)
    assert message.startswith(f"--{row.flag} ")
    assert message.endswith(row.reason)
    assert "\n" not in message


@pytest.mark.parametrize("row", LATER, ids=lambda row: row.flag)
def test_each_row_accepts_its_neutral_values(row: Refusal) -> None:
    for value in (*row.accepted, SPECS[row.flag][2].default):
        refuse_later_features(with_value(row.flag, value))


def test_values_are_spelled_as_they_were_typed() -> None:
    config = SftConfig(data=DataConfig(cached_dataset=("a", "b")))
    with pytest.raises(ValueError, match="--cached_dataset a b: it comes"):
        refuse_later_features(config)
    config = SftConfig(training=TrainingConfig(calculate_per_token_loss=False))
    with pytest.raises(ValueError, match="--calculate_per_token_loss false: the loss"):
        refuse_later_features(config)


def test_flags_without_a_row_are_let_through() -> None:
    refuse_later_features(SftConfig(model=ModelConfig(torch_dtype="float16", model="x")))
