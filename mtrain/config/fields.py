"""How a user-facing setting is declared: default, help and limits beside the field.

The one thing to know: a setting is a dataclass field made by `flag`, and its name is the name of
the command-line flag. The parser, `--help`, the checks and docs/flags.md all read this metadata,
so a setting is described once.
"""

import dataclasses
import functools
import math
from typing import Any, get_type_hints

__all__ = ["FlagSpec", "check_values", "flag", "flag_specs", "spell"]


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


@functools.cache
def flag_specs(section: type) -> tuple[FlagSpec, ...]:
    """The flags of one section, in the order in which they are declared."""
    hints = get_type_hints(section)
    return tuple(
        FlagSpec(
            name=field.name,
            type_hint=hints[field.name],
            default=field.default,
            **field.metadata,
        )
        for field in dataclasses.fields(section)
    )


def spell(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(spell, value)) or "none"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def check_values(section: object) -> None:
    """Checks every value of a section against the choices and limits beside its field.

    Raises:
        ValueError: Naming the flag, the value and what is allowed.
    """
    for spec in flag_specs(type(section)):
        value = getattr(section, spec.name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None:
                _check_item(spec, item)


def _check_item(spec: FlagSpec, item: Any) -> None:
    given = f"--{spec.name} {item}"
    if spec.choices and item not in spec.choices:
        raise ValueError(f"{given}: must be one of {', '.join(spec.choices)}")
    if not isinstance(item, int | float):
        return
    if not math.isfinite(item):
        raise ValueError(f"{given}: must be a finite number")
    if spec.minimum is not None and item < spec.minimum:
        raise ValueError(f"{given}: must be at least {spec.minimum}")
    if spec.maximum is not None and item > spec.maximum:
        raise ValueError(f"{given}: must be at most {spec.maximum}")
