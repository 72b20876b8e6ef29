"""The place of prepared data: named by contents, filled by one process at a time.

The one thing to know: a folder of the cache appears under its final name complete or not at all.
"""

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mtrain import __version__

__all__ = ["content_key", "default_cache_dir", "locked"]

logger = logging.getLogger(__name__)

_TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# What a checkpoint of a run has besides; the data of a run that continues from it are the same.
_NOT_OF_TOKENIZER = ("args.json", "manifest.json")
_DTYPE_KEYS = ("torch_dtype", "dtype")


def default_cache_dir() -> Path:
    """~/.cache/mtrain."""
    return Path.home() / ".cache" / "mtrain"


def content_key(parts: Mapping[str, Any], *, model_dir: Path) -> str:
    """Hash settings with the code and the tokenizer files that turn rows into samples.

    Args:
        parts: JSON values: fingerprints of the sources and the settings; no paths, no times.
        model_dir: Its tokenizer files and config.json count, its weights do not.

    Returns:
        32 hexadecimal digits; equal keys mean equal samples.
    """
    everything = {
        **parts,
        # From their metadata: data that is found in the cache needs neither library.
        "version": [__version__, version("transformers"), version("tokenizers")],
        "code": [_hash_file(path) for path in sorted(Path(__file__).parent.glob("*.py"))],
        "tokenizer": [
            [str(path.relative_to(model_dir)), _hash_model_file(path)]
            for pattern in ("*", "additional_chat_templates/*")
            for path in sorted(model_dir.glob(pattern))
            if path.suffix in _TOKENIZER_SUFFIXES
            and not path.name.endswith(".index.json")
            and path.name not in _NOT_OF_TOKENIZER
        ],
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


def _hash_model_file(path: Path) -> str:
    """Hash of a file; of config.json without the dtype of the weights."""
    if path.name != "config.json":
        return _hash_file(path)
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _DTYPE_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock; others wait for it, and it is freed when the process ends in any way.

    Raises:
        RuntimeError: The file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise RuntimeError(
            f"cannot write prepared data to {path.parent}: {error.strerror}; set HOME to a folder "
            "that can be written"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process to prepare the data (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
