"""What holds for every section of the configuration."""

import dataclasses
import typing
from types import NoneType

import pytest

from mtrain.config import ExportConfig, SftConfig
from mtrain.config.fields import check_values, flag_specs

SECTIONS = sorted(
    {
        hint
        for command in (SftConfig, ExportConfig)
        for hint in typing.get_type_hints(command).values()
    },
    key=lambda section: section.__name__,
)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_sections_are_frozen_keyword_only_and_have_valid_defaults(section: type) -> None:
    instance = section()
    check_values(instance)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(instance, next(iter(section.__dataclass_fields__)), None)
    with pytest.raises(TypeError):
        section(None)
    assert not hasattr(instance, "__dict__")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_defaults_have_the_declared_type(section: type) -> None:
    for spec in flag_specs(section):
        hints = typing.get_args(spec.type_hint) or (spec.type_hint,)
        origin = typing.get_origin(spec.type_hint)
        allowed = (tuple,) if origin is tuple else hints
        allowed = tuple(
            NoneType if hint is None else typing.get_origin(hint) or hint for hint in allowed
        )
        assert isinstance(spec.default, allowed), spec.name


@pytest.mark.parametrize("command", [SftConfig, ExportConfig])
def test_a_flag_belongs_to_one_section(command: type) -> None:
    names = [
        spec.name
        for section in typing.get_type_hints(command).values()
        for spec in flag_specs(section)
    ]
    assert len(names) == len(set(names))
