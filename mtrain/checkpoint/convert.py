"""Publishes converted checkpoints: a model or an adapter, as Hugging Face files or torch_dist.

The one thing to know: all of it works on tensors by their Hugging Face names, wherever they come
from, and no model is built. The ranks share the work evenly, whatever their parallel layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtrain.bridge.convert import write_weights
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_header import tensor_bytes
from mtrain.bridge.sources import StoredWeights
from mtrain.bridge.written import WrittenFile, record_file, write_json
from mtrain.checkpoint.folder import LATEST_FILE, Contents, publish_folder
from mtrain.checkpoint.torch_dist.folder import (
    FIRST_ITERATION,
    TENSORS_FILE,
    describe_tensors,
    iteration_name,
)
from mtrain.checkpoint.weights import SMALL_FILES_BYTES, copy_beside_weights
from mtrain.lora.adapter_settings import CONFIG_FILE
from mtrain.lora.base_model import BASE_FILE, base_model
from mtrain.parallel import World

__all__ = [
    "Destination",
    "ModelDescription",
    "export_torch_dist_adapter",
    "export_torch_dist_model",
    "export_weights",
]

# Entries of `.distcp` files have a frame around each tensor.
_FRAME_BYTES = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a converted checkpoint goes.

    Attributes:
        folder: Its name.
        world: This rank.
        exist_ok: See `publish_folder`.
        arguments: The resolved configuration, for args.json.
        origin: What it is made from, for the manifest.
        sources: Folders that are read meanwhile.
    """

    folder: Path
    world: World
    exist_ok: bool
    arguments: Mapping[str, Any]
    origin: Mapping[str, Any]
    sources: Sequence[Path]

    def publish(
        self,
        write: Callable[[Path], Iterable[WrittenFile]],
        finish: Callable[[Path], Iterable[WrittenFile]],
        *,
        num_bytes: int,
    ) -> None:
        """Writes the folder on all ranks; see `publish_folder`."""
        contents = Contents(
            write=lambda staged: [lambda: write(staged)],
            num_bytes=num_bytes + SMALL_FILES_BYTES,
            source=self.origin,
            sources=self.sources,
            finish=lambda staged: [
                *finish(staged),
                write_json(staged, "args.json", self.arguments),
            ],
        )
        publish_folder(self.folder, contents, world=self.world, exist_ok=self.exist_ok)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What lies beside the weights of a model.

    Attributes:
        folder: Where tokenizer and generation settings are copied from.
        hf_config: The config.json to write.
    """

    folder: Path
    hf_config: Mapping[str, Any]

    def write(self, folder: Path) -> list[WrittenFile]:
        """Writes config.json and copies the rest."""
        return [
            *copy_beside_weights(self.folder, folder),
            write_json(folder, "config.json", self.hf_config),
        ]


def export_weights(
    weights: StoredWeights,
    to: Destination,
    *,
    described: ModelDescription,
    max_shard_size: int,
) -> None:
    """Writes a model that transformers loads.

    Args:
        weights: Its tensors, in the dtypes and the order to write.
        to: Where to; every rank must call this.
        described: What lies beside the weights.
        max_shard_size: Most bytes of tensors in a file.

    Raises:
        SaveError: On every rank.
    """
    to.publish(
        functools.partial(
            write_weights,
            weights,
            max_shard_size=max_shard_size,
            rank=to.world.rank,
            world_size=to.world.size,
        ),
        described.write,
        num_bytes=_num_bytes(weights),
    )


def export_torch_dist_model(
    weights: StoredWeights,
    to: Destination,
    *,
    table: WeightTable,
    described: ModelDescription,
    fingerprint: str,
) -> None:
    """Writes a model that Megatron-Core loads.

    Args:
        weights: Its tensors, in the dtypes to write.
        to: Where to; every rank must call this.
        table: What they are.
        described: What lies beside them.
        fingerprint: What adapters will know the model by.

    Raises:
        SaveError: On every rank.
    """

    def finish(folder: Path) -> list[WrittenFile]:
        return [
            *_finish_iteration(folder),
            *described.write(folder),
            write_json(folder, BASE_FILE, base_model(fingerprint)),
        ]

    to.publish(
        _torch_dist_writer(weights, table, to.world, is_model=True),
        finish,
        num_bytes=_num_bytes(weights),
    )


def export_torch_dist_adapter(
    weights: StoredWeights,
    to: Destination,
    *,
    table: WeightTable,
    config: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    fingerprint: str,
) -> None:
    """Writes an adapter in Megatron-Core's format.

    Args:
        weights: Its tensors by PEFT's names, one linear an expert, in the dtypes to write.
        to: Where to; every rank must call this.
        table: What they are (`adapter_table`).
        config: Its adapter_config.json.
        hf_config: The config.json of its model, which says where its tensors belong.
        fingerprint: Of the model that it belongs to.

    Raises:
        SaveError: On every rank.
    """

    def finish(folder: Path) -> list[WrittenFile]:
        return [
            *_finish_iteration(folder),
            write_json(folder, CONFIG_FILE, config),
            write_json(folder, "config.json", hf_config),
            write_json(folder, TENSORS_FILE, describe_tensors(weights.tensors)),
            write_json(folder, BASE_FILE, base_model(fingerprint)),
        ]

    to.publish(
        _torch_dist_writer(weights, table, to.world, is_model=False),
        finish,
        num_bytes=_num_bytes(weights),
    )


def _torch_dist_writer(
    weights: StoredWeights, table: WeightTable, world: World, *, is_model: bool
) -> Callable[[Path], list[WrittenFile]]:
    def write(folder: Path) -> list[WrittenFile]:
        # Here, not above: it imports Megatron-Core, which other conversions do without.
        from mtrain.checkpoint.torch_dist.streaming.writer import save_torch_dist

        name = iteration_name(FIRST_ITERATION)
        (folder / name).mkdir(exist_ok=True)
        return [
            replace(file, name=f"{name}/{file.name}")
            for file in save_torch_dist(
                weights,
                folder / name,
                table=table,
                rank=world.rank,
                world_size=world.size,
                iteration=FIRST_ITERATION,
                with_states=is_model,
            )
        ]

    return write


def _finish_iteration(folder: Path) -> list[WrittenFile]:
    """Megatron-Core's own files, and the one that names the iteration."""
    tracker = folder / LATEST_FILE
    tracker.write_text(f"{FIRST_ITERATION}\n", encoding="utf-8")
    inside = sorted((folder / iteration_name(FIRST_ITERATION)).iterdir())
    own = [path for path in inside if path.suffix != ".distcp"]
    return [record_file(folder, path) for path in (*own, tracker)]


def _num_bytes(weights: StoredWeights) -> int:
    return sum(
        tensor_bytes(tensor.dtype, tensor.shape) + _FRAME_BYTES
        for tensor in weights.tensors.values()
    )
