"""`megatron verify`: is a checkpoint what was saved; do two of them hold the same tensors?

The one thing to know: the exit code is the answer. 0 is all well, or equal bit for bit; 1 is not; 2
means that there was nothing to look at. No model is built and no rank started.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtrain.cli.errors import OneLineParser
from mtrain.verify.files import check_files

if TYPE_CHECKING:
    from mtrain.bridge.sources import StoredWeights

_MAX_LISTED = 20
_DESCRIPTION = """\
With one folder: read every file of a checkpoint of mtrain again and compare it with manifest.json.
With two: compare their tensors one by one, whatever files they are cut into; both may come from
anywhere. Of a run, the latest checkpoint is taken."""


def run(words: list[str]) -> int:
    """Checks one folder, or compares two, and prints what was found.

    Args:
        words: Words after `megatron verify`.

    Returns:
        Exit code: 0 only if nothing is wrong.

    Raises:
        ValueError: The words are wrong, or a folder is not what can be verified.
    """
    parser = OneLineParser(
        prog="megatron verify",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="A checkpoint, or a run.")
    parser.add_argument("other", type=Path, nargs="?", help="Another one to compare it with.")
    arguments = parser.parse_args(words)
    folder = _checkpoint_folder(arguments.folder)
    if arguments.other is None:
        return _verify(folder)
    return _compare(folder, _checkpoint_folder(arguments.other))


def open_folder(folder: Path) -> StoredWeights:
    """Opens a folder of any format for reading by Hugging Face names.

    Args:
        folder: A model or an adapter, as Hugging Face files or as torch_dist.

    Raises:
        ValueError: It holds nothing that can be read, or two things.
    """
    from mtrain.bridge.safetensors_folder import (
        INDEX_FILE,
        SINGLE_FILE,
        Checkpoint,
        open_checkpoint,
    )
    from mtrain.bridge.safetensors_header import read_header
    from mtrain.checkpoint.torch_dist.folder import is_torch_dist, open_torch_dist_folder
    from mtrain.lora.peft_format import WEIGHTS_FILE

    if is_torch_dist(folder):
        return open_torch_dist_folder(folder)
    adapter = folder / WEIGHTS_FILE
    if not adapter.is_file():
        return open_checkpoint(folder)
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        raise ValueError(f"{folder}: holds a model and an adapter; put them into two folders")
    return Checkpoint(folder=folder, tensors=read_header(adapter))


def open_for_comparison(first: Path, second: Path) -> tuple[StoredWeights, StoredWeights]:
    """Opens two folders so that the same weights have the same names.

    Models whose files hold them in different forms are shown by canonical names, without
    quantisation; all others as they are.

    Args:
        first: As for `open_folder`.
        second: Likewise.

    Raises:
        ValueError: As for `open_folder`.
    """
    a, b = open_folder(first), open_folder(second)
    if a.tensors.keys() == b.tensors.keys():
        return a, b
    return _canonical(a), _canonical(b)


def _canonical(weights: StoredWeights) -> StoredWeights:
    """Hugging Face files of a known family by canonical names; anything else as it is."""
    from mtrain.bridge.plan import weight_table
    from mtrain.bridge.safetensors_folder import Checkpoint
    from mtrain.bridge.storage.quantization import fp8_blocks
    from mtrain.bridge.storage.view import arranged
    from mtrain.config.model_checks import read_hf_config
    from mtrain.lora.peft_format import WEIGHTS_FILE

    folder = weights.folder
    is_model = isinstance(weights, Checkpoint) and not (folder / WEIGHTS_FILE).is_file()
    if not is_model or not (folder / "config.json").is_file():
        return weights
    hf_config = read_hf_config(folder)
    try:
        table = weight_table(hf_config)
    except ValueError:
        # Of a family that is not built the names in the files are all there is.
        return weights
    return arranged(weights, table, blocks=fp8_blocks(hf_config))


def _checkpoint_folder(path: Path) -> Path:
    """The folder itself, or the latest checkpoint of a run."""
    folder = path.expanduser()
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder")
    if not any(folder.glob("checkpoint-*")):
        return folder
    from mtrain.checkpoint.run_folder import latest_checkpoint

    latest = latest_checkpoint(folder)
    if latest is None:
        return folder
    print(f"{path}: the latest checkpoint is {latest.name}")
    return latest


def _verify(folder: Path) -> int:
    faults = check_files(folder)
    for kind in dict.fromkeys(fault.kind for fault in faults):
        _print_listed(kind, [fault.text for fault in faults if fault.kind == kind])
    print(f"{folder}: {'DAMAGED' if faults else 'every file is as it was saved'}")
    return 1 if faults else 0


def _compare(first: Path, second: Path) -> int:
    from mtrain.verify.compare import Verdict, compare_checkpoints

    found: dict[Verdict, list[str]] = {}
    for result in compare_checkpoints(*open_for_comparison(first, second)):
        found.setdefault(result.verdict, []).append(f"{result.name}: {result.text}")
    num_equal = len(found.pop("equal", ()))
    for verdict, texts in found.items():
        _print_listed(verdict, texts)
    print(f"A is {first}\nB is {second}")
    others = "".join(f", {len(texts)} {verdict}" for verdict, texts in found.items())
    print(f"{'NOT EQUAL' if found else 'EQUAL'}; tensors: {num_equal} equal{others}")
    return 1 if found else 0


def _print_listed(title: str, texts: Sequence[str]) -> None:
    print(f"{title}: {len(texts)}")
    for text in texts[:_MAX_LISTED]:
        print(f"  {text}")
    if len(texts) > _MAX_LISTED:
        print(f"  ... and {len(texts) - _MAX_LISTED} more")
