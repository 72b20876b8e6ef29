"""Tensors are read out of the files that hold them, and a file is opened when it is needed."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mtrain.bridge import safetensors_reader
from mtrain.bridge.safetensors_header import read_header
from mtrain.bridge.safetensors_reader import SafetensorsReader

VALUES = {
    "one": {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(5, dtype=torch.bfloat16)},
    "two": {"c": -torch.arange(6.0).view(2, 3)},
}
ALL = VALUES["one"] | VALUES["two"]


@pytest.fixture
def tensors(tmp_path):
    """Headers of two files."""
    found = {}
    for name, values in VALUES.items():
        save_file(values, tmp_path / name)
        found |= read_header(tmp_path / name)
    return found


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that were opened so far, with their descriptors."""
    found = []
    open_file = os.open

    def spy(path, flags):
        descriptor = open_file(path, flags)
        found.append((path.name, descriptor))
        return descriptor

    monkeypatch.setattr(safetensors_reader.os, "open", spy)
    return found


def is_open(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").exists()


def test_parts_are_those_of_the_tensors_in_all_files(tensors):
    with SafetensorsReader(tensors) as reader:
        for name, value in ALL.items():
            whole = reader.slices(name)[:]
            assert whole.dtype == value.dtype
            assert torch.equal(whole, value)
        assert torch.equal(reader.slices("a")[1:3], ALL["a"][1:3])
        assert torch.equal(reader.slices("a")[2:4, 1:2], ALL["a"][2:4, 1:2])


@pytest.mark.parametrize(
    ("key", "num_read"),
    [
        (slice(None), 120),
        ((slice(1, 2), slice(2, 4)), 2 * 5),
        ((slice(1, 2), slice(3, 4), slice(1, 4)), 3),
        ((slice(1, 2), slice(2, 4), slice(0, 1)), 2 * 5),
        ((slice(0, 2), slice(3, 4)), 2 * 20),
        ((slice(5, 6), slice(4, 4)), 0),
        ((slice(2, 2), slice(0, 1)), 0),
        (slice(5, 6), 20),
    ],
    ids=str,
)
def test_of_stacked_matrices_only_rows_of_those_that_are_asked_for_are_read(
    tmp_path, monkeypatch, key, num_read
):
    value = torch.arange(120.0).view(6, 4, 5)
    save_file({"x": value}, tmp_path / "x")
    read, preadv = [], os.preadv
    monkeypatch.setattr(
        safetensors_reader.os,
        "preadv",
        lambda file, buffers, position: (
            read.append(sum(map(len, buffers))) or preadv(file, buffers, position)
        ),
    )
    with SafetensorsReader(read_header(tmp_path / "x")) as reader:
        part = reader.slices("x")[key]
    assert torch.equal(part, value[key])
    assert sum(read) == 4 * num_read


def test_a_file_is_opened_when_it_is_first_needed_and_once(tensors, opened):
    with SafetensorsReader(tensors) as reader:
        assert opened == []
        for name in ("c", "c", "a", "b", "c"):
            reader.slices(name)
        assert [name for name, _ in opened] == ["two", "one"]


def test_threads_open_a_file_once(tensors, opened):
    with SafetensorsReader(tensors) as reader, ThreadPoolExecutor(8) as threads:
        parts = threads.map(lambda name: reader.slices(name)[:], ["a", "b", "c"] * 30)
        for name, part in zip(["a", "b", "c"] * 30, parts, strict=True):
            assert torch.equal(part, ALL[name])
    assert sorted(name for name, _ in opened) == ["one", "two"]


def test_an_unknown_name_is_a_bug_of_the_caller(tensors):
    with SafetensorsReader(tensors) as reader, pytest.raises(KeyError, match="unknown"):
        reader.slices("unknown")


def test_files_are_closed_at_the_end(tensors, opened):
    with SafetensorsReader(tensors) as reader:
        reader.slices("a")
        reader.slices("c")
        assert [is_open(descriptor) for _, descriptor in opened] == [True, True]
    assert [is_open(descriptor) for _, descriptor in opened] == [False, False]


def test_a_file_that_is_cut_short_meanwhile_is_named(tensors):
    with SafetensorsReader(tensors) as reader:
        part = reader.slices("c")
        path = tensors["c"].path
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(OSError, match=f"{path}: was cut short while it was read"):
            part[:]
