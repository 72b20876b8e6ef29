"""Files that are written without a model: the same bytes, whoever writes them."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from xxhash import xxh3_128

from mtrain.bridge import convert
from mtrain.bridge.convert import num_threads, row_blocks, write_weights
from mtrain.bridge.converted import converted
from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.safetensors_header import read_header, tensor_bytes
from mtrain.bridge.storage.composed import composed
from mtrain.bridge.storage.stored_as import stored_as
from mtrain.bridge.storage.view import arranged
from mtrain.bridge.written import record_file
from tests.lora.peft_folders import hf_model, table_of
from tests.tiny import DISTINCT, make_checkpoint

LIMIT = 60_000


@pytest.fixture(scope="module", params=DISTINCT)
def source(request, tmp_path_factory):
    """A checkpoint in one file, with at least one layer of each kind."""
    root = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(root, request.param, num_hidden_layers=2)


def in_model_order(folder, dtype="F32"):
    weights = as_stored(folder)
    return converted(weights, dict.fromkeys(weights.tensors, dtype))


def as_stored(folder):
    """The tensors in its files, in the order of the model."""
    table = table_of(folder)
    weights = arranged(open_checkpoint(folder), table)
    own = {name: weights.tensors[name].dtype for name in hf_tensors(table)}
    return composed(converted(weights, own), stored_as(weights, table, keeps_fp8=False))


def written(weights, folder, *, world_size=1, max_shard_size=LIMIT, **options):
    """The records of all ranks."""
    folder.mkdir()
    size = {"max_shard_size": max_shard_size, "world_size": world_size}
    return [
        write_weights(weights, folder, rank=rank, **size, **options) for rank in range(world_size)
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_ranks_writes_the_same_bytes(source, tmp_path):
    weights = in_model_order(source)
    one = written(weights, tmp_path / "1")
    for world_size in (2, 3):
        records = written(weights, tmp_path / str(world_size), world_size=world_size)
        assert contents(tmp_path / str(world_size)) == contents(tmp_path / "1")
        assert all(records), "each rank has something to do"
        everyone = [record for of_rank in records for record in of_rank]
        assert sorted(everyone, key=str) == sorted(one[0], key=str)


def test_files_stay_below_the_limit_unless_one_tensor_is_larger(source, tmp_path):
    written(in_model_order(source), tmp_path / "out", max_shard_size=30_000)
    sizes = [
        [tensor.num_bytes for tensor in read_header(path).values()]
        for path in (tmp_path / "out").glob("*.safetensors")
    ]
    assert len(sizes) > 3
    assert all(sum(tensors) <= 30_000 or len(tensors) == 1 for tensors in sizes)
    assert any(len(tensors) > 1 for tensors in sizes)


def test_values_names_and_index_are_those_of_the_model(source, tmp_path):
    written(in_model_order(source), tmp_path / "out", world_size=2)
    ours = open_checkpoint(tmp_path / "out")
    assert not ours.notes, "the index states the right size"
    expected = load_file(source / "model.safetensors")
    with ours.open() as reader:
        assert ours.tensors.keys() == expected.keys()
        assert all(torch.equal(reader.slices(name)[:], expected[name]) for name in expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert list(index["weight_map"]) == sorted(expected)


def test_transformers_loads_all_of_it(source, tmp_path):
    written(in_model_order(source), tmp_path / "out")
    shutil.copy(source / "config.json", tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    expected = hf_model(source).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_one_file_has_no_number_and_no_index(source, tmp_path):
    records = written(
        in_model_order(source), tmp_path / "out", world_size=2, max_shard_size=10**9, stem="x"
    )
    assert [[record.name for record in of_rank] for of_rank in records] == [["x.safetensors"], []]
    assert list(contents(tmp_path / "out")) == ["x.safetensors"]
    names = list(read_header(tmp_path / "out" / "x.safetensors"))
    assert names == list(as_stored(source).tensors)


def test_records_are_those_of_the_files_on_disk(source, tmp_path):
    """T21."""
    folder = tmp_path / "out"
    (records,) = written(in_model_order(source, "BF16"), folder)
    assert {record.name for record in records} == set(contents(folder))
    for record in records:
        assert replace(record, tensors={}) == record_file(folder, folder / record.name)
        if record.name.endswith(".json"):
            continue
        tensors = load_file(folder / record.name)
        assert record.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            known = record.tensors[name]
            assert (known.dtype, known.shape) == ("BF16", tensor.shape)
            data = tensor.flatten().view(torch.uint8).numpy()
            assert known.digest == xxh3_128(data).hexdigest()


def test_a_tensor_keeps_its_own_dtype(source, tmp_path):
    """As a router in float32 among weights in bfloat16."""
    dtypes = {
        name: "F32" if len(shape) == 1 or ".mlp.gate." in name else ("BF16", "F16")[index % 2]
        for index, (name, shape) in enumerate(
            (name, tensor.shape) for name, tensor in as_stored(source).tensors.items()
        )
    }
    written(converted(as_stored(source), dtypes), tmp_path / "out")
    ours, expected = open_checkpoint(tmp_path / "out"), open_checkpoint(source)
    assert {name: tensor.dtype for name, tensor in ours.tensors.items()} == dtypes
    with ours.open() as reader, expected.open() as reference:
        for name in dtypes:
            part = reader.slices(name)[:]
            assert torch.equal(part, reference.slices(name)[:].to(part.dtype)), name


@dataclass
class Watched:
    """Weights that note how much is asked for at once."""

    weights: object
    sizes: list

    @property
    def folder(self):
        return self.weights.folder

    @property
    def tensors(self):
        return self.weights.tensors

    @contextmanager
    def open(self):
        with self.weights.open() as source:
            self._source = source
            yield self

    def slices(self, name):
        return _Watched(self._source.slices(name), self.sizes)


class _Watched:
    def __init__(self, stored, sizes):
        self._stored, self._sizes = stored, sizes

    def __getitem__(self, key):
        part = self._stored[key]
        self._sizes.append((part.nbytes, part.shape[0]))
        return part


def test_what_is_read_at_once_is_bounded(source, tmp_path, monkeypatch):
    written(in_model_order(source), tmp_path / "whole")
    monkeypatch.setattr(convert, "_BLOCK_BYTES", 1000)
    watched = Watched(in_model_order(source), [])
    written(watched, tmp_path / "parts", world_size=2)
    assert all(num_bytes <= 1000 or num_rows == 1 for num_bytes, num_rows in watched.sizes)
    assert len(watched.sizes) > len(watched.tensors)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("shape", [(1,), (7,), (1000,), (5, 300), (3, 2000), (64, 4, 10)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_are_all_rows_in_turn(shape, itemsize, monkeypatch):
    monkeypatch.setattr(convert, "_BLOCK_BYTES", 1000)
    blocks = list(row_blocks(shape, itemsize=itemsize))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(shape[0]))
    row_bytes = tensor_bytes("U8", shape[1:]) * itemsize
    assert all(stop - start == 1 or (stop - start) * row_bytes <= 1000 for start, stop in blocks)


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert num_threads() == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert num_threads() == 16


def test_a_file_that_is_there_is_not_overwritten(source, tmp_path):
    written(in_model_order(source), tmp_path / "out")
    with pytest.raises(FileExistsError):
        write_weights(
            in_model_order(source), tmp_path / "out", max_shard_size=LIMIT, rank=0, world_size=1
        )
