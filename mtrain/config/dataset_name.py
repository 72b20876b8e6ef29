"""What a value of `--dataset` names: path-or-id[:subset][#count].

The one thing to know: a path that exists is taken as it is written, colons and all.
"""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DatasetName"]

_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow")


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A value taken apart. `hub` is "hf", "ms" or None for a local path."""

    path: str
    hub: str | None
    subset: str | None
    count: int | None

    @classmethod
    def parse(cls, value: str, *, use_hf: bool, flag: str = "dataset") -> "DatasetName":
        """Split a value into path or id, subset and count.

        Args:
            value: What the user typed.
            use_hf: Ids without hf:: or ms:: are Hugging Face's, not ModelScope's.
            flag: Where it was typed, for the message.

        Raises:
            ValueError: It looks like a local file that is not there, or its form is wrong.
        """
        name, count = value, None
        if not Path(name).expanduser().exists() and (match := re.search(r"#(\d+)$", value)):
            name, count = value[: match.start()], int(match[1])
            if count == 0:
                raise ValueError(f"--{flag} {value}: #count must be at least 1")
        if Path(name).expanduser().exists():
            return cls(str(Path(name).expanduser()), None, None, count)
        hub, is_explicit = "hf" if use_hf else "ms", name.startswith(("hf::", "ms::"))
        if is_explicit:
            hub, name = name.split("::", 1)
        name, _, subset = name.partition(":")
        is_file = "/" not in name or name.lower().endswith(_FILE_SUFFIXES)
        if not _HUB_ID.fullmatch(name) or (is_file and not is_explicit):
            raise ValueError(
                f"--{flag} {value}: no such file or folder, and not a hub id "
                "(owner/name[:subset][#count])"
            )
        return cls(name, hub, subset or None, count)
