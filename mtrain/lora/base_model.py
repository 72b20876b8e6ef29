"""Remembers beside an adapter which model it was trained on.

adapter_config.json only has a name for it, and names and paths change. PEFT has no place for more
(it warns of unknown keys), so there is a small file of its own, which an adapter need not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtrain.bridge.safetensors_header import parse_json

BASE_FILE = "base_model.json"
_KEY = "fingerprint"
_MAX_BYTES = 4096


def base_model(fingerprint: str) -> dict[str, Any]:
    """What the file holds.

    Args:
        fingerprint: Of the model's checkpoint (`mtrain.bridge.fingerprint`).
    """
    return {_KEY: fingerprint}


def read_base_model(folder: Path) -> str | None:
    """The fingerprint that a folder has; None where it has none.

    Args:
        folder: Folder of an adapter, or of a model that was converted from another format.

    Raises:
        ValueError: The file is not sound.
    """
    path = folder / BASE_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: larger than {_MAX_BYTES} bytes")
    stored = parse_json(path.read_bytes(), source=path).get(_KEY)
    if not isinstance(stored, str):
        raise ValueError(f"{path}: has no {_KEY!r}")
    return stored


def check_base_model(folder: Path, fingerprint: str, *, named: str | None) -> None:
    """Refuses an adapter of another model; one that does not say on which it was trained passes.

    Args:
        folder: Folder of the adapter.
        fingerprint: Of the model that it is to be used with.
        named: Name of the adapter's model in its config, for the message.

    Raises:
        ValueError: It was trained on another model, or the file is not sound.
    """
    if read_base_model(folder) not in (None, fingerprint):
        raise ValueError(
            f"{folder}: trained on another model than --model; its own was called {named!r}. Use "
            f"that one, or delete {BASE_FILE} if the adapter is meant for both"
        )
