"""A checkpoint that transformers loads: weights, and what the source folder has beside them.

The one thing to know: besides the weights, only `config.json` differs from the source, and in it
only the dtype. Tokenizer, chat template and generation settings are copied byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.plan import Backend, hf_tensors, weight_table
from mtrain.bridge.save import lookup_in, save_weights
from mtrain.bridge.slices import tensors_by_name
from mtrain.checkpoint.folder import Retention, publish_checkpoint
from mtrain.parallel import ParallelState

__all__ = ["WeightsFormat", "save_checkpoint"]

# What belongs to a tokenizer or to generation, in all spellings that transformers knows.
_COPIED = (
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_SMALL_FILES_BYTES = 64 * 2**20
_DTYPE_KEYS = ("torch_dtype", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFormat:
    """How weights are written.

    Attributes:
        source: Folder that the model was loaded from.
        hf_config: Its config.json.
        backend: Spelling of the norms in the chunks.
        dtype: Dtype of the saved tensors.
        max_shard_size: Most bytes of tensors in a file.
    """

    source: Path
    hf_config: Mapping[str, Any]
    backend: Backend
    dtype: torch.dtype
    max_shard_size: int


def save_checkpoint(
    run: Path,
    step: int,
    chunks: Sequence[torch.nn.Module],
    *,
    form: WeightsFormat,
    arguments: Mapping[str, Any],
    state: ParallelState,
    save_total_limit: int | None,
) -> Path:
    """Saves the model of all ranks as `run/checkpoint-<step>`.

    Args:
        run: Folder of the run.
        step: Steps done.
        chunks: Bare model chunks of this rank.
        form: How weights are written.
        arguments: The resolved configuration, for args.json.
        state: This rank; every rank must call this.
        save_total_limit: Checkpoints kept, this one included; None keeps all.

    Raises:
        SaveError: On every rank; older checkpoints are untouched.
    """
    table = weight_table(form.hf_config)
    num_elements = sum(prod(shape) for shape in hf_tensors(table).values())

    def write(folder: Path) -> list[Path]:
        save_weights(
            lookup_in(tensors_by_name(chunks)),
            folder,
            table=table,
            state=state,
            backend=form.backend,
            dtype=form.dtype,
            max_shard_size=form.max_shard_size,
        )
        if not state.is_first_rank:
            return []
        return [
            *copy_beside_weights(form.source, folder),
            _write_json(folder / "config.json", _with_dtype(form.hf_config, form.dtype)),
            _write_json(folder / "args.json", arguments),
        ]

    return publish_checkpoint(
        run,
        step,
        write,
        state=state,
        num_bytes=num_elements * form.dtype.itemsize + _SMALL_FILES_BYTES,
        retention=Retention(limit=save_total_limit, protected=form.source),
    )


def copy_beside_weights(source: Path, folder: Path) -> list[Path]:
    """Copies tokenizer, chat template and generation settings.

    Args:
        source: A Hugging Face folder; its files may be links, as in the hub's cache.
        folder: Where to.

    Returns:
        The new files.
    """
    copies = []
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            copies.append(copy)
    return copies


def _with_dtype(hf_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config with the dtype of the saved tensors, under the key or keys that it uses."""
    keys = [key for key in _DTYPE_KEYS if key in hf_config] or ["dtype"]
    return {**hf_config, **dict.fromkeys(keys, str(dtype).removeprefix("torch."))}


def _write_json(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n", "utf-8")
    return path
