r"""Names of modules and the regular expressions that choose among them, in bounded time.

Of the keys of rank_pattern and alpha_pattern PEFT takes the first, in the order of the file, that
matches the end of a name as a regular expression. Most keys are names (`q_proj`,
`layers.3.mlp.down_proj`, `^model.layers.0.self_attn.q_proj`, `.*\.gate_up_proj`,
`experts.\d+.up_proj`) and there can be one for each module, so names are looked up.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

ANY_NUMBER = r"\d+"

# A beginning that changes nothing (`.*\.`) or asks for the whole name (`^`), then the parts of a
# name. People escape dots or do not, and mean a dot.
_PLAIN_KEY = re.compile(
    r"(?P<start>\^|\.\*\\\.)?(?P<name>(?:\w|\\?-)+(?:\\?\.(?:(?:\w|\\?-)+|\\d\+))*)\$?", re.ASCII
)
_MAX_PATTERN_LENGTH = 1_000
# Processor time for one pattern; an honest one takes milliseconds on the largest models.
_PATTERN_SECONDS = 2.0
_ALL_SECONDS = 10.0


def match_names(pattern: str, names: Iterable[str], *, anywhere: bool = False) -> set[str]:
    """Finds the names that a regular expression matches, in bounded time.

    A pattern may come with an adapter that somebody else made, and a short one can keep Python's
    matcher busy for years. So its length is bounded, and a timer of the process's own processor
    time interrupts it (the matcher looks for signals as it backtracks; a thread could not stop it,
    since it holds the interpreter's lock).

    Args:
        pattern: The regular expression.
        names: What to match; short names, as those of modules are.
        anywhere: Whether a match inside a name is enough; PEFT wants all of the name.

    Returns:
        The names that match.

    Raises:
        ValueError: It is too long, no regular expression, or takes too long. The message begins
            with the pattern, so that a caller can put before it where it is from.
    """
    assert threading.current_thread() is threading.main_thread(), "signals reach the main thread"
    shown = repr(pattern if len(pattern) <= 100 else f"{pattern[:100]}...")
    if len(pattern) > _MAX_PATTERN_LENGTH:
        raise ValueError(f"{shown} is longer than {_MAX_PATTERN_LENGTH:,} characters; shorten it")
    try:
        with _time_limit(_PATTERN_SECONDS):
            compiled = re.compile(pattern)
            matches = compiled.search if anywhere else compiled.fullmatch
            return {name for name in names if matches(name)}
    except TimeoutError:
        raise ValueError(
            f"{shown} takes more than {_PATTERN_SECONDS:g} seconds to match the names of this "
            "model; rewrite it without repeats inside of repeats"
        ) from None
    except RecursionError:
        raise ValueError(f"{shown} has too many nested groups; simplify it") from None
    except (re.error, OverflowError) as error:
        raise ValueError(f"{shown} is not a regular expression: {error}") from None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so much processor time, which a busy machine does not use up."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        raise TimeoutError

    previous = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def first_matches(keys: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The key that each name takes; names that take none are left out.

    Args:
        keys: Keys of a pattern, in the order of the file.
        names: Names of modules or parameters, with the numbers of at most a layer and an expert.

    Raises:
        ValueError: A key is no regular expression, or matching takes too long.

    Source: `get_pattern_key` of PEFT.
    """
    plain: dict[str, int] = {}
    first: dict[str, int] = {}
    start = time.process_time()
    for index, key in enumerate(keys):
        if match := _PLAIN_KEY.fullmatch(key):
            name = re.sub(r"\\([.-])", r"\1", match["name"])
            plain.setdefault(f"^{name}" if match["start"] == "^" else name, index)
            continue
        for name in match_names(rf"(.*\.)?({key})", names):
            first.setdefault(name, index)
        if time.process_time() - start > _ALL_SECONDS:
            raise ValueError(f"{keys[0]!r} and others take too long to match; write plain names")
    for name in names:
        for spelling in _spellings(name) if plain else ():
            if spelling in plain:
                first[name] = min(plain[spelling], first.get(name, len(keys)))
    return {name: keys[index] for name, index in first.items()}


def _spellings(name: str) -> Iterator[str]:
    """All plain keys that match a name."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    for choice in range(2 ** len(numbers)):
        spelled = list(parts)
        for bit, index in enumerate(numbers):
            if choice >> bit & 1:
                spelled[index] = ANY_NUMBER
        yield "^" + ".".join(spelled)
        for start in range(len(spelled)):
            yield ".".join(spelled[start:])
