"""Reads a pickle that holds plain data, and refuses any other before it can do anything.

The one thing to know: a pickle may call whatever it can name, so it only gets names that the caller
lists. A `Record` that is listed stands for an empty class made for this one reading, because a
pickle may also change the classes that it is given. This is the only place where mtrain reads a
pickle.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

# By the name that a pickle asks for: subclasses of `Record`, or values that cannot be changed.
Allowed = Mapping[tuple[str, str], Any]

_NUMBERED = ("PUT", "BINPUT", "LONG_BINPUT")
# What pickle raises for bytes that are none, besides an UnpicklingError.
_BROKEN = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Record:
    """Some attributes and what it was made with; nothing that they could do."""

    args: tuple[Any, ...] = ()

    def __init__(self, *args: object) -> None:
        """Takes what it is given."""
        self.args = args


def read_pickle(
    data: bytes, allowed: Allowed, *, find_stored: Callable[[Any], object] | None = None
) -> Any:
    """What is in a pickle.

    Args:
        data: The pickle.
        allowed: What its names stand for; all others are refused.
        find_stored: Called with the numbers of objects that are stored elsewhere.

    Raises:
        ValueError: It is broken, or asks for more; in one line.
    """
    try:
        _check_numbers(data)
        return _Unpickler(data, allowed, find_stored).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{error!s:.400}") from error
    except _BROKEN as error:
        raise ValueError(f"{error!r:.400}") from error


def _check_numbers(data: bytes) -> None:
    """Refuses numbers of objects so high that unpickling would take up all memory for a table."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _NUMBERED and argument > len(data):
            raise pickle.UnpicklingError(f"it numbers an object {argument}")


class _Unpickler(pickle.Unpickler):
    """Refuses every name that is not on the list, before anything is called."""

    def __init__(
        self, data: bytes, allowed: Allowed, find_stored: Callable[[Any], object] | None
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed
        self._find_stored = find_stored
        self._made: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for."""
        asked = (module, name)
        if asked not in self._allowed:
            text = f"{module}.{name}"
            raise pickle.UnpicklingError(f"it asks for {text!r:.200}, which could run code")
        if asked not in self._made:
            value = self._allowed[asked]
            is_record = isinstance(value, type) and issubclass(value, Record)
            self._made[asked] = type(name, (value,), {}) if is_record else value
        return self._made[asked]

    def persistent_load(self, pid: Any) -> object:
        """What an object that is stored elsewhere stands for."""
        if self._find_stored is None:
            raise pickle.UnpicklingError("it asks for an object that is stored elsewhere")
        return self._find_stored(pid)
