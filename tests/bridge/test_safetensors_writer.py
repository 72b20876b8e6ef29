import resource
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from xxhash import xxh3_128

from mtrain.bridge.safetensors_writer import DeferredWriter, SafetensorsWriter, ThreadedWriter
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


@pytest.mark.parametrize("open_file", [ThreadedWriter, DeferredWriter])
def test_a_file_that_is_written_by_a_thread_or_later_is_the_same(tmp_path, open_file):
    """T07: the parts are copied, so that the caller may reuse its memory at once."""
    data = as_bytes(torch.arange(10.0))
    with SafetensorsWriter(tmp_path / "x", TENSORS) as writer:
        writer.append(data)
    (tmp_path / "other").mkdir()
    buffer = torch.empty(7, dtype=torch.uint8)
    with open_file(tmp_path / "other" / "x", TENSORS) as other:
        for part in data.split(7):
            other.append(buffer[: len(part)].copy_(part))
    assert other.written == writer.written
    assert (tmp_path / "other" / "x").read_bytes() == (tmp_path / "x").read_bytes()


def test_an_error_in_the_thread_reaches_whoever_brings_the_parts(tmp_path):
    """T03: and nobody waits for a thread that gave up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with (
            pytest.raises(OSError, match="File too large"),
            ThreadedWriter(tmp_path / "x", [("a", "U8", (2**26,))]) as writer,
        ):
            for _ in range(64):
                writer.append(torch.zeros(2**20, dtype=torch.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_error_that_nobody_foresaw_ends_the_thread_and_whoever_brings_the_parts(
    tmp_path, monkeypatch
):
    """T32: the parts that come after it are not waited for."""

    def fail(writer, part):
        raise MemoryError

    monkeypatch.setattr(SafetensorsWriter, "append", fail)
    writer = ThreadedWriter(tmp_path / "x", [("a", "U8", (64,))])

    def bring_parts():
        with pytest.raises(MemoryError), writer:
            for _ in range(8):
                writer.append(torch.zeros(8, dtype=torch.uint8))

    # In a thread that can be given up, where it waits for ever.
    thread = threading.Thread(target=bring_parts, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()
