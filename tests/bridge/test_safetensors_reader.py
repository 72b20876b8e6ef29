"""Tensors are read out of the files that hold them, and a file is opened when it is needed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
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
    """Names of the files that were opened so far."""
    names = []

    def spy(path, framework):
        names.append(path.name)
        return safe_open(path, framework=framework)

    monkeypatch.setattr(safetensors_reader, "safe_open", spy)
    return names


def test_parts_are_those_of_the_tensors_in_all_files(tensors):
    with SafetensorsReader(tensors) as reader:
        for name, value in ALL.items():
            whole = reader.slices(name)[:]
            assert whole.dtype == value.dtype
            assert torch.equal(whole, value)
        assert torch.equal(reader.slices("a")[1:3], ALL["a"][1:3])
        assert torch.equal(reader.slices("a")[2:4, 1:2], ALL["a"][2:4, 1:2])


def test_a_file_is_opened_when_it_is_first_needed_and_once(tensors, opened):
    with SafetensorsReader(tensors) as reader:
        assert opened == []
        for name in ("c", "c", "a", "b", "c"):
            reader.slices(name)
        assert opened == ["two", "one"]


def test_threads_open_a_file_once(tensors, opened):
    with SafetensorsReader(tensors) as reader, ThreadPoolExecutor(8) as threads:
        parts = threads.map(lambda name: reader.slices(name)[:], ["a", "b", "c"] * 30)
        for name, part in zip(["a", "b", "c"] * 30, parts, strict=True):
            assert torch.equal(part, ALL[name])
    assert sorted(opened) == ["one", "two"]


def test_an_unknown_name_is_a_bug_of_the_caller(tensors):
    with SafetensorsReader(tensors) as reader, pytest.raises(KeyError, match="unknown"):
        reader.slices("unknown")


def test_files_are_closed_at_the_end(tensors, monkeypatch):
    closed = []

    class Spy:
        def __init__(self, path, framework):
            self._path, self._file = path, safe_open(path, framework=framework)

        def __enter__(self):
            return self._file.__enter__()

        def __exit__(self, *exception):
            closed.append(self._path.name)
            return self._file.__exit__(*exception)

    monkeypatch.setattr(safetensors_reader, "safe_open", Spy)
    with SafetensorsReader(tensors) as reader:
        reader.slices("a")
        assert closed == []
    assert closed == ["one"]
