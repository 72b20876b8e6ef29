"""Reads tensors, or parts of them, from the safetensors files of a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mtrain.bridge.safetensors_header import StoredTensor


class SafetensorsReader:
    """The files of a checkpoint, each opened when it is first needed; a `TensorSource`.

    Args:
        tensors: Where each tensor is, by name.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def slices(self, name: str) -> Any:
        """The slice object of a tensor; indexing it gives a view of the mapped file."""
        path = self._tensors[name].path
        with self._lock:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            return self._open[path].get_slice(name)
