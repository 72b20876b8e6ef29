r"""Keys of PEFT's rank_pattern and alpha_pattern: which of them a module name takes.

PEFT takes the first key, in the order of the file, that matches the end of the name as a regular
expression. Most keys are names (`q_proj`, `layers.3.mlp.down_proj`,
`^model.layers.0.self_attn.q_proj`, `.*\.gate_up_proj`, `experts.\d+.up_proj`) and there can be one
for each module, so names are looked up. Real expressions are matched in bounded time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence

from mtrain.lora.targets import match_names

ANY_NUMBER = r"\d+"

# A beginning that changes nothing (`.*\.`) or asks for the whole name (`^`), then the parts of a
# name. People escape dots or do not, and mean a dot.
_PLAIN_KEY = re.compile(
    r"(?P<start>\^|\.\*\\\.)?(?P<name>(?:\w|\\?-)+(?:\\?\.(?:(?:\w|\\?-)+|\\d\+))*)\$?", re.ASCII
)
_ALL_SECONDS = 10.0


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
