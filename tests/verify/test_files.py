"""T21: damage is found and said where it is."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch

from mtrain.bridge.safetensors_header import read_header
from mtrain.bridge.safetensors_writer import SafetensorsWriter
from mtrain.bridge.written import write_json
from mtrain.checkpoint.manifest import write_manifest
from mtrain.verify.files import FileFault, check_files

ENTRIES = [("first", "F32", (300, 7)), ("second", "F32", (64,)), ("third", "F32", (5,))]
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint with three tensors, a config and a manifest."""
    with SafetensorsWriter(tmp_path / WEIGHTS, ENTRIES) as writer:
        writer.append(torch.arange(300.0 * 7 + 64 + 5).view(torch.uint8))
    config = write_json(tmp_path, "config.json", {"model_type": "qwen3"})
    write_manifest(tmp_path, [writer.written, config], source={})
    return tmp_path


def flip(path: Path, *, byte: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def test_an_intact_folder_has_no_faults(folder):
    (folder / "precision.json").write_text("added later")
    assert check_files(folder) == []


@pytest.mark.parametrize("name", ["first", "second", "third"])
@pytest.mark.parametrize("place", ["first byte", "last byte"])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_of_a_tensor_is_found_and_the_tensor_named(folder, name, place, bit):
    """T21."""
    tensor = read_header(folder / WEIGHTS)[name]
    offset = 0 if place == "first byte" else tensor.num_bytes - 1
    flip(folder / WEIGHTS, byte=tensor.start + offset, bit=bit)
    assert check_files(folder) == [
        FileFault("other content", f"{WEIGHTS}, in 1 of 3 tensors"),
        FileFault("damaged tensor", f"{name} in {WEIGHTS}"),
    ]


def test_one_flipped_bit_anywhere_in_the_header_is_found(folder):
    """T21: the length, a name, a shape, an offset, the padding."""
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for byte in range(end):
        flip(folder / WEIGHTS, byte=byte)
        faults = check_files(folder)
        assert faults, byte
        assert faults[0].kind == "other content", byte
        assert faults[0].text.startswith(WEIGHTS), byte
        flip(folder / WEIGHTS, byte=byte)
    assert check_files(folder) == []


def test_a_bit_of_the_header_that_changes_no_tensor_is_said_to_be_there(folder):
    """T21."""
    content = (folder / WEIGHTS).read_bytes()
    flip(folder / WEIGHTS, byte=content.index(b'"pt"') + 1)
    assert check_files(folder) == [FileFault("other content", f"{WEIGHTS}, in its header")]
    flip(folder / WEIGHTS, byte=content.index(b'"pt"') + 1)
    flip(folder / WEIGHTS, byte=content.index(b"second"))
    (fault,) = check_files(folder)
    assert fault.text == f"{WEIGHTS}, in its header: it names other tensors"


def test_one_flipped_bit_of_another_file_is_found(folder):
    """T21."""
    flip(folder / "config.json", byte=5)
    assert check_files(folder) == [FileFault("other content", "config.json")]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_found(folder, change):
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, size + change)
    text = f"{WEIGHTS} has {size + change} bytes, was saved with {size}"
    assert check_files(folder) == [FileFault("other size", text)]


@pytest.mark.parametrize("instead", ["nothing", "folder", "dangling link"])
def test_a_missing_file_is_found(folder, instead):
    path = folder / WEIGHTS
    path.unlink()
    if instead == "folder":
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()
    elif instead == "dangling link":
        path.symlink_to(folder / "gone")
    names = ["config.json", WEIGHTS] if instead == "folder" else [WEIGHTS]
    assert check_files(folder) == [FileFault("missing", name) for name in names]


@pytest.mark.parametrize("name", ["model-00002.safetensors", "state/x.safetensors", "0.distcp"])
def test_weights_that_nobody_recorded_are_found(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    assert check_files(folder) == [FileFault("not in the manifest", name)]


def test_a_file_that_cannot_be_read_is_a_fault(folder, monkeypatch):
    def fail(path: Path, **kwargs) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("mtrain.verify.files.hash_file", fail)
    faults = check_files(folder)
    assert {fault.kind for fault in faults} == {"cannot be read"}
    assert faults[0].text == "config.json: Input/output error"


def test_no_file_outside_the_folder_is_read(folder):
    """T21: a hostile manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 0, "hash": "0" * 32}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="only files in the folder are accepted"):
        check_files(folder)
