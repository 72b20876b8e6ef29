from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from xxhash import xxh3_128

from mtrain.bridge.safetensors_writer import SafetensorsWriter
from mtrain.bridge.written import record_file

TENSORS = [("b", "F32", (2, 3)), ("a", "F32", (4,))]


def as_bytes(tensor):
    return tensor.flatten().view(torch.uint8)


def test_a_streamed_file_is_the_one_the_library_writes(tmp_path):
    values = torch.arange(10.0)
    with SafetensorsWriter(tmp_path / "ours", TENSORS) as writer:
        for part in as_bytes(values).split(7):
            writer.append(part)
    ours = load_file(tmp_path / "ours")
    assert torch.equal(ours["b"], values[:6].view(2, 3))
    assert torch.equal(ours["a"], values[6:])
    # The library sorts by name; so do we here, to compare byte by byte.
    save_file({"a": ours["a"], "b": ours["b"]}, tmp_path / "library", metadata={"format": "pt"})
    with SafetensorsWriter(tmp_path / "sorted", sorted(TENSORS)) as writer:
        writer.append(as_bytes(ours["a"]))
        writer.append(as_bytes(ours["b"]))
    assert (tmp_path / "sorted").read_bytes() == (tmp_path / "library").read_bytes()


def test_a_file_with_missing_or_surplus_bytes_is_our_bug(tmp_path):
    with (
        pytest.raises(AssertionError, match="33 bytes were not written"),
        SafetensorsWriter(tmp_path / "short", TENSORS) as writer,
    ):
        writer.append(torch.zeros(7, dtype=torch.uint8))
    with (
        pytest.raises(AssertionError, match="more bytes"),
        SafetensorsWriter(tmp_path / "long", TENSORS) as writer,
    ):
        writer.append(torch.zeros(41, dtype=torch.uint8))


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "x").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path / "x", TENSORS)
    assert (tmp_path / "x").read_bytes() == b"precious"


def test_an_error_inside_is_not_hidden_by_the_missing_bytes(tmp_path):
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "x", TENSORS):
        raise KeyError


def test_the_record_is_that_of_the_file_on_disk(tmp_path):
    """T21: hashed on the way; parts may end one tensor and begin another."""
    values = torch.arange(10.0)
    with SafetensorsWriter(tmp_path / "ours", TENSORS) as writer:
        for part in as_bytes(values).split(7):
            writer.append(part)
        with pytest.raises(AssertionError, match="not complete yet"):
            _ = writer.written
    written = writer.written
    assert replace(written, tensors={}) == record_file(tmp_path, tmp_path / "ours")
    assert {name: tensor.digest for name, tensor in written.tensors.items()} == {
        "b": xxh3_128(values[:6].numpy()).hexdigest(),
        "a": xxh3_128(values[6:].numpy()).hexdigest(),
    }
