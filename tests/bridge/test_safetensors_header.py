"""Hostile and broken files (T20). The safetensors library is the judge of what is sound."""

import json
import os
import struct
import time

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from mtrain.bridge.safetensors_header import (
    BITS_OF_DTYPE,
    make_header,
    parse_json,
    read_header,
    tensor_bytes,
)


def write_file(path, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, *, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


SOUND = {"a": entry(0, 8), "b": entry(8, 16)}
BROKEN = {
    "empty file": (b"", "0 bytes is too short"),
    "unknown dtype": ({"a": entry(0, 8, dtype="F33")}, "'a'.*unknown dtype 'F33'"),
    "dtype no text": ({"a": entry(0, 8, dtype=["F32"])}, "'a'.*unknown dtype"),
    "shape x dtype": ({"a": entry(0, 8, shape=(3,))}, r"'a'.*\[3\] takes 12 bytes.* 8"),
    "negative shape": ({"a": entry(0, 8, shape=(-2,))}, "'a'.*shape"),
    "huge shape": ({"a": entry(0, 8, shape=(2**62, 2**62))}, "'a'.*takes"),
    "endless shape": ({"a": entry(0, 8, shape=(2**63,))}, "'a'.*shape"),
    "many axes": ({"a": entry(0, 8, shape=(1,) * 1000)}, "'a'.*shape"),
    "fractional shape": ({"a": entry(0, 8, shape=(2.0,))}, "'a'.*shape"),
    "true as a size": ({"a": entry(0, 4, shape=(True,))}, "'a'.*shape"),
    "end before begin": ({"a": entry(8, 0)}, "'a'.*data_offsets"),
    "three offsets": ({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, "'a'.*data_offsets"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, "'b' overlaps 'a'"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, "'b' leaves a gap after 'a'"),
    "gap at the front": ({"a": entry(8, 16)}, "'a' leaves a gap after the header"),
    "past the end": ({"a": entry(0, 8), "b": entry(8, 24, shape=(4,))}, "truncated: tensor 'b'"),
    "left over": ({"a": entry(0, 8)}, "8 bytes behind the last tensor"),
    "entry no object": ({"a": 1}, "'a'.*exactly dtype"),
    "entry with more": ({"a": {**entry(0, 8), "x": 1}}, "'a'.*exactly dtype"),
    "entry with less": ({"a": {"dtype": "F32"}}, "'a'.*exactly dtype"),
    "metadata no text": ({"__metadata__": {"a": 1}, **SOUND}, "__metadata__"),
    "metadata no object": ({"__metadata__": [], **SOUND}, "__metadata__"),
    "half bytes": ({"a": entry(0, 8, dtype="F4", shape=(3,))}, "'a'.*whole bytes"),
    "bad UTF-8": (b'{"\xff": 1}', "not valid JSON.*utf-8"),
    "bad JSON": (b'{"a": ', "not valid JSON"),
    "no object": (b"[1, 2]", "does not begin with"),
    "space first": (b" {}", "does not begin with"),
    "nested deeply": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "a number of a million digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", "not valid JSON"),
    "same tensor twice": (b'{"a": 1, "b": 2, "a": 3}', "key 'a' occurs twice"),
    "same field twice": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "key 'dtype' occurs twice"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_header_is_refused_with_file_and_tensor(tmp_path, fault):
    """T20"""
    header, message = BROKEN[fault]
    path = tmp_path / "model.safetensors"
    if fault == "empty file":
        path.write_bytes(b"")
    else:
        write_file(path, header, bytes(16))
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert time.monotonic() - start < 1
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(path.read_bytes())


@pytest.mark.parametrize("length", [0, 3, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_wrong_length_of_the_header_is_refused(tmp_path, length):
    """T20"""
    path = write_file(tmp_path / "x.safetensors", SOUND, bytes(16), length=length)
    with pytest.raises(ValueError, match=r"x\.safetensors: "):
        read_header(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    """T20: every 1 %, and every one of the last bytes."""
    save_file({"a": torch.ones(40, 7), "b": torch.ones(11)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in {len(content) * percent // 100 for percent in range(100)} | {
        len(content) - missing for missing in range(1, 20)
    }:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut.safetensors"):
            read_header(path)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


def test_a_sound_file_is_read_as_the_library_reads_it(tmp_path):
    """T20: also tensors without elements and files without tensors."""
    tensors = {
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "half": torch.ones(3, 2, dtype=torch.bfloat16),
        "whole": torch.ones(3, dtype=torch.int64),
        "eight": torch.ones(3, dtype=torch.float8_e4m3fn),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert {name: stored.shape for name, stored in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert found["half"].dtype == "BF16"
    assert found["half"].num_bytes == 12
    save_file({}, path, metadata={"format": "pt"})
    assert read_header(path) == {}


def test_a_header_that_we_make_is_sound(tmp_path):
    tensors = [("b", "BF16", (3, 2)), ("a", "F32", (1, 1)), ("ä", "F16", (0,))]
    head = make_header(tensors)
    path = tmp_path / "model.safetensors"
    path.write_bytes(head + np.arange(16, dtype=np.uint8).tobytes())
    assert len(head) % 8 == 0
    assert [(n, t.dtype, t.shape) for n, t in read_header(path).items()] == tensors
    assert load_file(path)["b"].view(torch.uint8).flatten().tolist() == list(range(12))
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_dtype_sizes():
    assert tensor_bytes("F4", (3, 2)) == 3
    assert tensor_bytes("BF16", (3, 2)) == 12
    assert all(bits in {4, 6, 8, 16, 32, 64} for bits in BITS_OF_DTYPE.values())


def test_json_must_be_an_object(tmp_path):
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        parse_json(b"[]", source=tmp_path)
