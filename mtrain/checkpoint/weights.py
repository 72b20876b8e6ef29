"""A checkpoint that transformers loads: weights, and what the source folder has beside them.

The one thing to know: besides the weights, only `config.json` differs from the source, and in it
only the dtype, and how weights are quantised where they no longer are. Tokenizer, chat template and
generation settings are copied byte for byte.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.gather import TensorLookup
from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_header import tensor_bytes
from mtrain.bridge.safetensors_writer import OpenFile
from mtrain.bridge.save import save_weights
from mtrain.bridge.storage.quantization import without_quantization
from mtrain.bridge.storage.stored_as import CANONICAL, StoredAs
from mtrain.bridge.written import WrittenFile, record_file, write_json
from mtrain.checkpoint.folder import Contents, PendingFiles
from mtrain.parallel import ParallelState

__all__ = ["WeightsFormat", "weights_contents"]

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
# What all files besides the weights may take.
SMALL_FILES_BYTES = 64 * 2**20

_DTYPE_KEYS = ("torch_dtype", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFormat:
    """How weights are written.

    Attributes:
        source: Folder that the model was loaded from.
        hf_config: Its config.json.
        table: Its weights.
        dtype: Dtype of the saved tensors.
        max_shard_size: Most bytes of tensors in a file.
        stored: The form that they are stored in.
    """

    source: Path
    hf_config: Mapping[str, Any]
    table: WeightTable
    dtype: torch.dtype
    max_shard_size: int
    stored: StoredAs = CANONICAL


def weights_contents(
    lookup: TensorLookup,
    *,
    form: WeightsFormat,
    arguments: Mapping[str, Any],
    state: ParallelState,
    open_file: OpenFile,
) -> Contents:
    """The model of all ranks as a Hugging Face checkpoint.

    Args:
        lookup: Finds the weights of this rank, as for `save_weights`.
        form: How weights are written.
        arguments: The resolved configuration, for args.json.
        state: This rank.
        open_file: What takes the tensors of a file.
    """

    def write(folder: Path) -> list[PendingFiles]:
        weights = save_weights(
            lookup,
            folder,
            table=form.table,
            state=state,
            dtype=form.dtype,
            max_shard_size=form.max_shard_size,
            open_file=open_file,
            form=form.stored,
        )
        if not state.is_first_rank:
            return [weights]
        return [weights, functools.partial(_write_beside, folder, form, arguments)]

    return Contents(
        write=write,
        num_bytes=_num_bytes(form),
        source=_source(form),
        sources=[form.source],
    )


def _source(form: WeightsFormat) -> dict[str, Any]:
    """What a checkpoint was made from, for its manifest."""
    return {"model": str(form.source)}


def _num_bytes(form: WeightsFormat) -> int:
    num_elements = sum(prod(shape) for shape in hf_tensors(form.table).values())
    copied = form.stored.carried.entries if form.stored.carried else ()
    num_copied = sum(tensor_bytes(dtype, shape) for _, dtype, shape in copied)
    return num_elements * form.dtype.itemsize + num_copied + SMALL_FILES_BYTES


def _write_beside(
    folder: Path, form: WeightsFormat, arguments: Mapping[str, Any]
) -> list[WrittenFile]:
    return [
        *copy_beside_weights(form.source, folder),
        write_json(
            folder, "config.json", saved_config(form.hf_config, form.dtype, stored=form.stored)
        ),
        write_json(folder, "args.json", arguments),
    ]


def copy_beside_weights(source: Path, folder: Path) -> list[WrittenFile]:
    """Copies tokenizer, chat template and generation settings.

    Args:
        source: A Hugging Face folder; its files may be links, as in the hub's cache.
        folder: Where to.

    Returns:
        Records of the new files.
    """
    copies = []
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            copies.append(record_file(folder, copy))
    return copies


def saved_config(
    hf_config: Mapping[str, Any], dtype: torch.dtype | None, *, stored: StoredAs
) -> dict[str, Any]:
    """The config of saved weights.

    Args:
        hf_config: That of the source.
        dtype: Dtype of the saved tensors, told under the key or keys that the config uses; None
            where each has its own.
        stored: The form that they are stored in.
    """
    kept = dict(hf_config) if stored.quantized else without_quantization(hf_config)
    if dtype is None:
        return kept
    keys = [key for key in _DTYPE_KEYS if key in hf_config] or ["dtype"]
    return {**kept, **dict.fromkeys(keys, str(dtype).removeprefix("torch."))}
