"""How a user-facing setting is declared: default, help and limits beside the field.

The one thing to know: a setting is a dataclass field made by `flag`, and its name is the name of
the command-line flag. The parser, `--help`, the checks and docs/flags.md all read this metadata,
so a setting is described once.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, get_type_hints

__all__ = ["DataclassInstance", "FlagSpec", "check_values", "flag", "flag_specs", "section_fields"]


class DataclassInstance(Protocol):
    """Any dataclass, for signatures that accept each of the sections."""

    __dataclass_fields__: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlagSpec:
    """Everything known about one flag without looking at a value.

    `type_hint` is the resolved annotation; `minimum` and `maximum` are inclusive.
    """

    name: str
    type_hint: Any
    default: Any
    help: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None


def flag(
    default: Any,
    help_text: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declares a field that is also a command-line flag.

    Args:
        default: Immutable default; lists are tuples.
        help_text: One sentence for `--help`.
        choices: The strings that are allowed (for a tuple: for each of its items).
        minimum: Smallest number allowed, inclusive.
        maximum: Largest number allowed, inclusive.

    Returns:
        A dataclass field; typed Any so that the annotation of the field decides.
    """
    metadata = {
        "help": help_text,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_specs(section: type) -> tuple[FlagSpec, ...]:
    """The flags of one section, in the order in which they are declared."""
    hints = get_type_hints(section)
    return tuple(
        FlagSpec(
            name=field.name,
            type_hint=hints[field.name],
            default=field.default,
            help=field.metadata["help"],
            choices=field.metadata["choices"],
            minimum=field.metadata["minimum"],
            maximum=field.metadata["maximum"],
        )
        for field in dataclasses.fields(section)
    )


def section_fields(section: DataclassInstance) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yields (flag name, value, metadata) of one section."""
    for field in dataclasses.fields(section):
        yield field.name, getattr(section, field.name), field.metadata


def check_values(section: DataclassInstance) -> None:
    """Checks every value of a section against the choices and limits beside its field.

    Raises:
        ValueError: Naming the flag, the value and what is allowed.
    """
    for name, value, metadata in section_fields(section):
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None:
                _check_item(name, item, metadata)


def _check_item(name: str, item: Any, metadata: Mapping[str, Any]) -> None:
    choices = metadata["choices"]
    if choices and item not in choices:
        raise ValueError(f"--{name} {item}: must be one of {', '.join(choices)}")
    if not isinstance(item, int | float):
        return
    if not math.isfinite(item):
        raise ValueError(f"--{name} {item}: must be a finite number")
    minimum, maximum = metadata["minimum"], metadata["maximum"]
    if minimum is not None and item < minimum:
        raise ValueError(f"--{name} {item}: must be at least {minimum}")
    if maximum is not None and item > maximum:
        raise ValueError(f"--{name} {item}: must be at most {maximum}")
