"""A folder of safetensors files as one table of tensors, checked before anything is read.

Either one `model.safetensors`, or shards that `model.safetensors.index.json` lists. Pickle files
(`.bin`, `.pt`) are never opened, and no file outside the folder is, whatever the index says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtrain.bridge.safetensors_header import (
    MAX_HEADER_BYTES,
    StoredTensor,
    parse_json,
    read_header,
)

if TYPE_CHECKING:
    from mtrain.bridge.safetensors_reader import SafetensorsReader

# `model.safetensors`, or `model-00001-of-00002.safetensors` and so on with an index.
WEIGHTS_STEM = "model"
SINGLE_FILE = f"{WEIGHTS_STEM}.safetensors"
INDEX_FILE = f"{SINGLE_FILE}.index.json"

# One component of a path: nothing that another system could read as a separator.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,200}\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The tensors of a checkpoint folder.

    Attributes:
        folder: The folder.
        tensors: Where each tensor is, by name.
        notes: Oddities that do no harm, for the user.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    notes: tuple[str, ...] = ()

    def open(self) -> SafetensorsReader:
        """Opens its files for reading; nothing is read yet."""
        # Here, not above: it imports torch, which reading headers does without.
        from mtrain.bridge.safetensors_reader import SafetensorsReader

        return SafetensorsReader(self.tensors)


def open_checkpoint(folder: Path, *, stem: str = WEIGHTS_STEM) -> Checkpoint:
    """Reads the index and the header of every file of a checkpoint; no tensor is read.

    Args:
        folder: Its folder.
        stem: How the names of its files begin.

    Raises:
        ValueError: The folder holds no safetensors checkpoint or not a sound one; the message
            names the file and the tensor.
    """
    single = folder / f"{stem}.safetensors"
    index = folder / f"{single.name}.index.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if index.is_file():
        return _open_sharded(folder, index)
    if single.is_file():
        _check_inside(folder, single)
        return Checkpoint(folder=folder, tensors=read_header(single))
    found = _found_instead(folder) or f" ({single.name} or {index.name})"
    raise ValueError(f"{folder}: no safetensors checkpoint{found}")


def _open_sharded(folder: Path, index: Path) -> Checkpoint:
    _check_inside(folder, index)
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise ValueError(f"{index}: larger than {MAX_HEADER_BYTES} bytes; this is no index")
    content = parse_json(index.read_bytes(), source=index)
    weight_map = _read_weight_map(index, content)
    files = sorted(set(weight_map.values()))
    single = index.name.removesuffix(".index.json")
    if single not in files and (folder / single).is_file():
        raise ValueError(
            f"{folder}: holds {single} and an index of other files; remove one of the two"
        )
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{index}: {_listed(missing)} of weight_map not in the folder")
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        path = folder / name
        _check_inside(folder, path)
        for key, tensor in read_header(path).items():
            if key in tensors:
                raise ValueError(f"{path}: tensor {key!r} is in {tensors[key].path.name} too")
            tensors[key] = tensor
    _check_against_index(index, weight_map, tensors)
    return Checkpoint(
        folder=folder, tensors=tensors, notes=_note_total_size(index, content, tensors)
    )


def _read_weight_map(index: Path, content: dict[str, Any]) -> dict[str, str]:
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ValueError(
                f"{index}: weight_map sends {key!r} to {name!r}; only the plain name of a "
                ".safetensors file in the same folder is accepted"
            )
    return weight_map


def _check_against_index(
    index: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]
) -> None:
    for key, name in weight_map.items():
        if key not in tensors or tensors[key].path.name != name:
            raise ValueError(f"{index}: {name} does not hold tensor {key!r}")
    unlisted = [key for key in tensors if key not in weight_map]
    if unlisted:
        path = tensors[unlisted[0]].path
        raise ValueError(f"{path}: weight_map does not list {_listed(unlisted)}")


def _check_inside(folder: Path, path: Path) -> None:
    """Refuses a link that leaves the folder, except into the blobs of a Hugging Face cache."""
    allowed = [folder.resolve()]
    if allowed[0].parent.name == "snapshots":
        allowed.append(allowed[0].parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in allowed):
        raise ValueError(f"{path}: links to {target}, outside the checkpoint folder")


def _note_total_size(
    index: Path, content: dict[str, Any], tensors: dict[str, StoredTensor]
) -> tuple[str, ...]:
    # Published checkpoints are often wrong here, and nothing depends on it.
    metadata = content.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(tensor.num_bytes for tensor in tensors.values())
    if stated is None or stated == actual:
        return ()
    return (f"{index}: total_size is {stated!r}, the tensors have {actual} bytes",)


def _found_instead(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt"})
    if pickles:
        return (
            f" (found {_listed(pickles)}; pickle files can run code and are never opened: "
            "convert them to safetensors)"
        )
    return ""


def _listed(names: list[str]) -> str:
    """The first ten names and how many more."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more
