"""A checkpoint that PEFT loads: the adapter alone, and what tokenizers and generation need.

All ranks write what they own, as they do for a whole model; then the first rank makes one file of
it, since PEFT knows no index. The bytes do not depend on the parallel layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.gather import TensorLookup
from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_writer import OpenFile
from mtrain.bridge.save import save_weights
from mtrain.bridge.written import WrittenFile, write_json
from mtrain.checkpoint.folder import Contents, PendingFiles, publish_folder
from mtrain.checkpoint.weights import SMALL_FILES_BYTES, copy_beside_weights
from mtrain.lora.adapter_file import join_adapter_files, write_adapter_file
from mtrain.lora.adapter_settings import CONFIG_FILE
from mtrain.lora.base_model import BASE_FILE, base_model
from mtrain.lora.fused_experts import ExpertLayout
from mtrain.lora.peft_config import adapter_config
from mtrain.lora.peft_format import WEIGHTS_FILE, StoredAdapter
from mtrain.lora.plan import LoraPlan, adapter_table
from mtrain.parallel import ParallelState, World

__all__ = ["AdapterFormat", "adapter_contents", "export_adapter"]

_PART_STEM = "adapter_part"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFormat:
    """How an adapter is written.

    Attributes:
        source: Folder that the model was loaded from.
        table: Weights of the model.
        lora: The adapters.
        dtype: Dtype of the saved tensors.
        base: Name or path of the model, for adapter_config.json.
        fingerprint: Of the model's checkpoint (`mtrain.bridge.fingerprint`).
        layout: How experts are stored.
        dropout: Dropout that the adapter is trained with.
    """

    source: Path
    table: WeightTable
    lora: LoraPlan
    dtype: torch.dtype
    base: str | None
    fingerprint: str
    layout: ExpertLayout
    dropout: float


def adapter_contents(
    lookup: TensorLookup,
    *,
    form: AdapterFormat,
    arguments: Mapping[str, Any],
    state: ParallelState,
    open_file: OpenFile,
    protected: Path | None = None,
) -> Contents:
    """The adapter of all ranks.

    Args:
        lookup: Finds the tensors of the adapter on this rank.
        form: How it is written.
        arguments: The resolved configuration, for args.json.
        state: This rank.
        open_file: What takes the tensors of a file.
        protected: A folder that is never overwritten: the adapter that training started from.
    """
    num_bytes = _num_bytes(form)

    def write(folder: Path) -> list[PendingFiles]:
        finish = save_weights(
            lookup,
            folder,
            table=adapter_table(form.table, form.lora),
            state=state,
            dtype=form.dtype,
            max_shard_size=max(1, num_bytes),
            stem=_PART_STEM,
            open_file=open_file,
        )

        def write_parts() -> list[WrittenFile]:
            finish()
            # They become one file and go.
            return []

        return [write_parts]

    def finish(folder: Path) -> list[WrittenFile]:
        return [_join(folder, form), *_write_beside(folder, form, arguments)]

    return Contents(
        write=write,
        # The parts and what they become are there at once.
        num_bytes=2 * num_bytes + SMALL_FILES_BYTES,
        source=_source(form),
        sources=[form.source, *([protected] if protected else [])],
        finish=finish,
    )


def export_adapter(
    folder: Path,
    stored: StoredAdapter,
    *,
    form: AdapterFormat,
    arguments: Mapping[str, Any],
    world: World,
    exist_ok: bool,
) -> None:
    """Writes an adapter that was read as a folder that is no checkpoint of a run.

    Only the first rank reads and writes; the others wait.

    Args:
        folder: Its name.
        stored: The adapter.
        form: How it is written.
        arguments: The resolved configuration, for args.json.
        world: This rank; every rank must call this.
        exist_ok: See `publish_folder`.

    Raises:
        SaveError: On every rank.
    """

    def finish(staged: Path) -> list[WrittenFile]:
        with stored.open() as source:
            weights = write_adapter_file(
                source,
                staged / WEIGHTS_FILE,
                lora=form.lora,
                table=form.table,
                layout=form.layout,
                dtype=form.dtype,
            )
        return [weights, *_write_beside(staged, form, arguments)]

    contents = Contents(
        write=lambda _: [],
        num_bytes=_num_bytes(form) + SMALL_FILES_BYTES,
        source=_source(form),
        sources=[form.source, stored.folder],
        finish=finish,
    )
    publish_folder(folder, contents, world=world, exist_ok=exist_ok)


def _source(form: AdapterFormat) -> dict[str, Any]:
    """What an adapter belongs to, for its manifest."""
    return {"model": str(form.source), "base fingerprint": form.fingerprint}


def _num_bytes(form: AdapterFormat) -> int:
    shapes = hf_tensors(adapter_table(form.table, form.lora)).values()
    return sum(prod(shape) for shape in shapes) * form.dtype.itemsize


def _write_beside(
    folder: Path, form: AdapterFormat, arguments: Mapping[str, Any]
) -> list[WrittenFile]:
    """Writes all but the weights."""
    config = adapter_config(
        form.lora, form.table, base=form.base, layout=form.layout, dropout=form.dropout
    )
    return [
        *copy_beside_weights(form.source, folder),
        write_json(folder, CONFIG_FILE, config),
        write_json(folder, BASE_FILE, base_model(form.fingerprint)),
        write_json(folder, "args.json", arguments),
    ]


def _join(folder: Path, form: AdapterFormat) -> WrittenFile:
    """Makes one file of those that the ranks wrote, and removes them."""
    written = sorted(folder.glob(f"{_PART_STEM}*"))
    parts = [path for path in written if path.suffix == ".safetensors"]
    joined = join_adapter_files(
        parts, folder / WEIGHTS_FILE, lora=form.lora, table=form.table, layout=form.layout
    )
    for path in written:
        path.unlink()
    return joined
