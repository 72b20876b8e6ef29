"""The folder around a torch_dist checkpoint: which iteration is in it, and what lies beside.

    OUT/latest_checkpointed_iteration.txt  iter_0000001/ (.metadata, *.distcp, common.pt)  args.json

The one thing to know: a model's folder has the config.json and the tokenizer of its source, and an
adapter's its adapter_config.json, so that a folder can be used without the checkpoint that it was
made from. Megatron-LM and Megatron-SWIFT ignore those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrain.bridge.plan import weight_table
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_header import parse_json
from mtrain.bridge.sources import StoredWeights, TensorShape
from mtrain.checkpoint.folder import LATEST_FILE
from mtrain.checkpoint.torch_dist.metadata import METADATA_FILE
from mtrain.checkpoint.torch_dist.reader import (
    TorchDistCheckpoint,
    open_torch_dist,
)
from mtrain.lora.adapter_settings import read_settings
from mtrain.lora.peft_format import StoredAdapter, stored_adapter
from mtrain.lora.plan import adapter_table

# A converted checkpoint is no step of a training; Megatron-LM wants a number above zero.
FIRST_ITERATION = 1
# Names, dtypes and shapes of an adapter's tensors in PEFT's words, which say what is adapted.
TENSORS_FILE = "adapter_tensors.json"


def iteration_folder(root: Path) -> Path:
    """The folder with `.metadata`: the one that is given, or its latest iteration.

    Args:
        root: What the user names.

    Raises:
        ValueError: There is none.
    """
    if (root / METADATA_FILE).is_file():
        return root
    tracker = root / LATEST_FILE
    if not tracker.is_file():
        raise ValueError(
            f"{root}: no torch_dist checkpoint (neither {LATEST_FILE} nor {METADATA_FILE})"
        )
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,12}|release", text):
        raise ValueError(f"{tracker}: {text[:40]!r} is no iteration")
    folder = root / (text if text == "release" else iteration_name(int(text)))
    if not folder.is_dir():
        raise ValueError(f"{tracker}: names iteration {text}, but there is no {folder.name}")
    return folder


def iteration_name(iteration: int) -> str:
    """Name of the folder of an iteration, as Megatron-LM spells it."""
    return f"iter_{iteration:07d}"


def is_torch_dist(root: Path) -> bool:
    """Whether a folder holds a torch_dist checkpoint."""
    return (root / METADATA_FILE).is_file() or (
        (root / LATEST_FILE).is_file() and any(root.glob(f"*/{METADATA_FILE}"))
    )


def open_torch_dist_model(root: Path, table: WeightTable) -> TorchDistCheckpoint:
    """The weights of a model.

    Args:
        root: What the user names.
        table: Weights of the model.

    Raises:
        ValueError: There is no checkpoint, or it does not fit the model.
    """
    return open_torch_dist(iteration_folder(root), table)


def open_torch_dist_folder(root: Path) -> StoredWeights:
    """The weights of whatever is in a folder that has a config.json: a model or an adapter.

    Args:
        root: What the user names.

    Raises:
        ValueError: There is no config.json, which says what the tensors are.
    """
    path = root / "config.json"
    if not path.is_file():
        raise ValueError(f"{root}: has no config.json, without which its tensors have no names")
    table = weight_table(parse_json(path.read_bytes(), source=path))
    if not (root / TENSORS_FILE).is_file():
        return open_torch_dist_model(root, table)
    adapter = read_torch_dist_adapter(root, table)
    return open_torch_dist(iteration_folder(root), adapter_table(table, adapter.lora))


def read_torch_dist_adapter(root: Path, table: WeightTable) -> StoredAdapter:
    """An adapter that mtrain converted; what is adapted is written beside it.

    Args:
        root: What the user names.
        table: Weights of the model that it is for.

    Raises:
        ValueError: It is not sound, does not fit the model, or was not made by mtrain.
    """
    path = root / TENSORS_FILE
    if not path.is_file():
        iteration_folder(root)
        raise ValueError(
            f"{root}: an adapter in torch_dist format that mtrain did not make ({TENSORS_FILE} is "
            "missing); convert it to PEFT's format with the program that made it, and use "
            "--adapters"
        )
    folder = iteration_folder(root)
    shapes = _read_tensors(path)
    adapter = stored_adapter(
        shapes,
        table,
        folder=root,
        path=path,
        settings=read_settings(root),
        source=lambda _: checkpoint.open(),
    )
    checkpoint = open_torch_dist(folder, adapter_table(table, adapter.lora))
    return adapter


def describe_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What `adapter_tensors.json` holds.

    Args:
        tensors: The tensors by PEFT's names, with `dtype` and `shape`.
    """
    return {name: [tensor.dtype, list(tensor.shape)] for name, tensor in tensors.items()}


def _read_tensors(path: Path) -> dict[str, TensorShape]:
    tensors = {}
    for name, entry in parse_json(path.read_bytes(), source=path).items():
        match entry:
            case [str(dtype), [*sizes]] if all(type(size) is int and size >= 0 for size in sizes):
                tensors[name] = TensorShape(dtype, tuple(sizes))
            case _:
                raise ValueError(f"{path}: {name!r} is not described by a dtype and a shape")
    return tensors
