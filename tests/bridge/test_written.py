import json
import tracemalloc

import pytest
from xxhash import xxh3_128

from mtrain.bridge.written import FileHasher, WrittenTensor, hash_file, record_file, write_json

DATA = bytes(range(256)) * 5
TENSORS = [("a", "F32", (5,)), ("none", "BF16", (0, 3)), ("b", "U8", (2, 10)), ("c", "BF16", ())]


@pytest.mark.parametrize("size", [1, 7, 20, 25, 42])
def test_tensors_are_hashed_however_the_bytes_are_cut(size):
    data = DATA[:42]
    hasher = FileHasher("x.safetensors", TENSORS)
    hasher.add_header(b"header")
    for start in range(0, 42, size):
        hasher.add(memoryview(data[start : start + size]))
    written = hasher.result()
    assert (written.name, written.num_bytes) == ("x.safetensors", 48)
    assert written.digest == xxh3_128(b"header" + data).hexdigest()
    parts = {"a": data[:20], "none": b"", "b": data[20:40], "c": data[40:]}
    assert written.tensors == {
        name: WrittenTensor(dtype=dtype, shape=shape, digest=xxh3_128(parts[name]).hexdigest())
        for name, dtype, shape in TENSORS
    }


def test_a_file_is_recorded_by_its_path_in_the_folder(tmp_path):
    path = tmp_path / "deep" / "x.bin"
    path.parent.mkdir()
    path.write_bytes(DATA)
    written = record_file(tmp_path, path)
    assert (written.name, written.num_bytes) == ("deep/x.bin", len(DATA))
    assert written.digest == xxh3_128(DATA).hexdigest()
    assert written.tensors == {}


def test_a_part_of_a_file_is_hashed(tmp_path):
    (tmp_path / "x").write_bytes(DATA)
    part = hash_file(tmp_path / "x", start=100, num_bytes=300)
    assert part == xxh3_128(DATA[100:400]).hexdigest()


def test_a_large_file_needs_little_memory(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(64 * 2**20)
    tracemalloc.start()
    digest = hash_file(tmp_path / "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert digest == xxh3_128(bytes(64 * 2**20)).hexdigest()


def test_json_is_recorded_as_it_was_written(tmp_path):
    written = write_json(tmp_path, "x.json", {"model": "模型"})
    assert written == record_file(tmp_path, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {"model": "模型"}
    with pytest.raises(FileExistsError):
        write_json(tmp_path, "x.json", {})
