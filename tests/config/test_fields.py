"""Declared limits are kept, and the message names flag, value and limit."""

from dataclasses import dataclass, replace

import pytest

from mtrain.config.fields import check_values, flag, flag_specs, spell


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    size: int = flag(4, "A size.", minimum=1, maximum=8)
    share: float | None = flag(None, "A share.", minimum=0)
    style: str = flag("round", "A style.", choices=("round", "square"))
    styles: tuple[str, ...] = flag((), "Styles.", choices=("round", "square"))


def test_specs_come_in_order_with_resolved_types() -> None:
    specs = flag_specs(Section)
    assert [spec.name for spec in specs] == ["size", "share", "style", "styles"]
    assert specs[1].type_hint == float | None
    assert (specs[0].default, specs[0].help, specs[0].minimum) == (4, "A size.", 1)


@pytest.mark.parametrize(
    ("value", "typed"),
    [(None, "none"), (True, "true"), (("a", 2), "a 2"), ((), "none"), (1e-5, "1e-05"), ("A", "A")],
)
def test_values_are_spelled_as_they_are_typed(value: object, typed: str) -> None:
    assert spell(value) == typed


def test_defaults_and_limits_themselves_are_allowed() -> None:
    check_values(Section())
    check_values(Section(size=1, share=0.0, styles=("square", "round")))
    check_values(Section(size=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "--size 0: must be at least 1"),
        ({"size": 9}, "--size 9: must be at most 8"),
        ({"share": -0.5}, "--share -0.5: must be at least 0"),
        ({"share": float("nan")}, "--share nan: must be a finite number"),
        ({"share": float("inf")}, "--share inf: must be a finite number"),
        ({"style": "flat"}, "--style flat: must be one of round, square"),
        ({"styles": ("round", "flat")}, "--styles flat: must be one of round, square"),
    ],
)
def test_values_outside_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_values(replace(Section(), **change))
    assert str(caught.value) == message
