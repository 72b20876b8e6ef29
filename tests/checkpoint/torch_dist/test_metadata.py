"""What torch writes is read; whatever else a `.metadata` file asks for is refused."""

import fractions
import os
import pickle
import resource
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata, planner

from mtrain.checkpoint.torch_dist.metadata import GlobalTensor, read_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

VALUES = {
    "weight": torch.arange(12.0).view(4, 3),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "state": {"step": 3, "bytes": b"\0" * 9},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Written by torch; its fields are changed by `rewrite`."""
    dcp.save(VALUES, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def rewrite(folder: Path, change) -> None:
    """Changes what a real `.metadata` file says."""
    content = pickle.loads((folder / ".metadata").read_bytes())
    change(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def place_of(content: metadata.Metadata, key: str) -> Any:
    return next(place for index, place in content.storage_data.items() if index.fqn == key)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_metadata(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    assert message.startswith(str(folder))
    return message


def test_what_torch_writes_is_read(folder) -> None:
    found = read_metadata(folder)
    described = {key: (tensor.dtype, tensor.shape) for key, tensor in found.items()}
    assert described == {"weight": ("F32", (4, 3)), "half": ("BF16", (5,)), "scalar": ("I64", ())}
    for key, tensor in found.items():
        [chunk] = tensor.chunks
        entry = chunk.path.read_bytes()[chunk.start : chunk.start + chunk.num_bytes]
        path = folder / "entry"
        path.write_bytes(entry)
        assert torch.equal(torch.load(path, weights_only=True), VALUES[key])
        assert chunk.sizes == tensor.shape
        assert chunk.offsets == (0,) * len(tensor.shape)


@dataclass
class MCoreMetadata(metadata.Metadata):
    """As in Megatron-Core 0.12."""

    mcore_data: dict = field(default_factory=dict)


@dataclass(frozen=True)
class MCoreSavePlan(planner.SavePlan):
    """As in Megatron-Core 0.12."""

    mcore_data: dict = field(default_factory=dict)


def test_what_older_versions_of_megatron_core_write_is_read(folder, monkeypatch) -> None:
    expected = read_metadata(folder)
    old = types.ModuleType("megatron.core.dist_checkpointing.strategies.torch")
    for kind in (MCoreMetadata, MCoreSavePlan):
        monkeypatch.setattr(kind, "__module__", old.__name__)
        setattr(old, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, old.__name__, old)
    content = pickle.loads((folder / ".metadata").read_bytes())
    item = planner.WriteItem(
        metadata.MetadataIndex("weight", torch.Size([0, 0])), planner.WriteItemType.SHARD
    )
    extra = {"weight": {"nd_reformulated_orig_global_shape": (4, 3)}}
    plan = MCoreSavePlan([item], storage_data=filesystem._StoragePrefix("__0_"), mcore_data=extra)
    content = MCoreMetadata(**vars(content) | {"planner_data": [plan]}, mcore_data=extra)
    (folder / ".metadata").write_bytes(written := pickle.dumps(content))
    assert written.count(b"MCore") == 2
    assert read_metadata(folder) == expected


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args) -> None:
        self._call = (function, args)

    def __reduce__(self):
        return self._call


HOSTILE = {
    "posix.system": lambda path: Call(os.system, f"touch {path}"),
    "builtins.eval": lambda path: Call(eval, f"open({str(path)!r}, 'w')"),
    "io.open": lambda path: Call(open, str(path), "w"),
    "torch.serialization.load": lambda path: Call(torch.load, str(path)),
    "builtins.getattr": lambda path: Call(getattr, Call(__import__, "os"), "system"),
    "fractions.Fraction": lambda path: fractions.Fraction(1, 3),
    "torch._utils._rebuild_tensor_v2": lambda path: torch.ones(2),
}


@pytest.mark.parametrize("asked", HOSTILE)
@pytest.mark.parametrize("where", ["whole", "planner_data", "place"])
def test_a_name_that_is_not_listed_is_refused_before_anything_runs(
    folder, tmp_path, asked, where
) -> None:
    """T25: also deep inside of a file that is sound otherwise."""
    made = tmp_path / "made"
    hostile = HOSTILE[asked](made)
    content = pickle.loads((folder / ".metadata").read_bytes())
    if where == "whole":
        content = hostile
    elif where == "planner_data":
        content.planner_data = [{"deep": (hostile,)}]
    else:
        place_of(content, "weight").relative_path = hostile
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    shown = "builtins.__import__" if asked == "builtins.getattr" else asked
    # Some of these are pickled before what they are called with.
    assert f"it asks for '{shown}'" in refusal(folder) or f"{asked!r}" in refusal(folder)
    assert not made.exists()


def named(module: str, name: str) -> bytes:
    """A name in a pickle of protocol 4."""
    words = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)]
    return b"".join(words) + b"\x93"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "getattr"),
        ("torch", "Size.__class__"),
        ("torch", "serialization.os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
        ("torch", "\x1b[2Jred\nand a second line"),
        ("torch", "long" * 60),
    ],
)
def test_attributes_of_what_is_listed_are_not(folder, module, name) -> None:
    """T25."""
    (folder / ".metadata").write_bytes(b"\x80\x04" + named(module, name) + b".")
    message = refusal(folder)
    assert f"it asks for {f'{module}.{name}'!r}"[:200] in message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("module", "name", "attribute"),
    [
        ("pathlib", "PosixPath", "_str"),
        ("torch.distributed.checkpoint.metadata", "Metadata", "planner_data"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo", "__init__"),
        ("torch.distributed.checkpoint.planner", "SavePlan", "items"),
        ("torch.serialization", "_get_layout", "__doc__"),
        ("torch", "Size", "numel"),
        ("collections", "OrderedDict", "items"),
    ],
)
def test_a_pickle_cannot_change_classes_of_this_process(folder, module, name, attribute) -> None:
    """T25: pickle sets attributes of whatever it has; so all paths could become another one."""
    owner = sys.modules.get(module, torch)
    before = getattr(getattr(owner, name), attribute, None)
    change = b"N}\x8c" + bytes([len(attribute)]) + attribute.encode() + b"\x8c\x05/evils\x86b"
    (folder / ".metadata").write_bytes(b"\x80\x04" + named(module, name) + change + b".")
    refusal(folder)
    assert getattr(getattr(owner, name), attribute, None) is before
    assert str(Path("/a/b")) == "/a/b"
    # Nor does it change what is read next.
    dcp.save(VALUES, checkpoint_id=folder.parent / "next", no_dist=True)
    assert read_metadata(folder.parent / "next").keys() == {"weight", "half", "scalar"}


def test_a_file_that_is_cut_off_anywhere_is_refused(folder) -> None:
    """T20."""
    content = (folder / ".metadata").read_bytes()
    for percent in range(100):
        (folder / ".metadata").write_bytes(content[: len(content) * percent // 100])
        assert "not the metadata of a checkpoint" in refusal(folder)


@pytest.mark.parametrize("change", [1, 128])
def test_a_file_with_a_wrong_byte_is_refused_or_read_as_data(folder, change) -> None:
    """T21; every fifth, for speed."""
    path = folder / ".metadata"
    content = path.read_bytes()
    for position in range(change % 5, len(content), 5):
        wrong = bytearray(content)
        wrong[position] = (wrong[position] + change) % 256
        path.write_bytes(wrong)
        try:
            found = read_metadata(folder)
        except ValueError as error:
            assert str(error).startswith(str(folder))
        else:
            assert all(isinstance(tensor, GlobalTensor) for tensor in found.values())


@pytest.mark.parametrize(
    "content",
    [b"Nr\xff\xff\xff\x3f.", b"Np1073741824\n.", b"\x8e" + b"\xff" * 6 + b"\0\0.", b"(" * 9],
    ids=["number", "number in text", "length", "marks"],
)
def test_a_small_file_does_not_take_much_memory(folder, content) -> None:
    """T20: numbers and lengths in it are not believed."""
    (folder / ".metadata").write_bytes(b"\x80\x04" + content)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    try:
        assert "MemoryError" not in refusal(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_file_that_is_too_large_is_not_read(folder) -> None:
    with (folder / ".metadata").open("r+b") as file:
        file.truncate(2**30 + 1)
    assert "larger than 1073741824 bytes" in refusal(folder)


def test_a_folder_without_one_is_no_checkpoint(tmp_path) -> None:
    assert ".metadata is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *({}, [1], 7, None, "text", metadata.BytesStorageMetadata()),
        metadata.Metadata({}, None, None),
        metadata.Metadata([], None, {}),
        metadata.Metadata({}, None, {"weight": 1}),
    ],
    ids=repr,
)
def test_what_is_no_metadata_is_refused(folder, content) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    assert "not the metadata of a checkpoint" in refusal(folder)


def set_chunks(content, *boxes, size=(4, 3)) -> None:
    entry = content.state_dict_metadata["weight"]
    entry.size = torch.Size(size)
    entry.chunks = [
        metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        for offsets, sizes in boxes
    ]
    place = place_of(content, "weight")
    for offsets, _ in boxes:
        content.storage_data[metadata.MetadataIndex("weight", torch.Size(offsets))] = place


OUTSIDE = r"weight: a chunk at .* lies outside of \(4, 3\)"
NOT_COVERED = r"weight: its chunks do not cover \(4, 3\)"


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([((1, 0), (4, 3))], OUTSIDE),
        ([((0, 0), (4, 4))], OUTSIDE),
        ([((2**62, 0), (2**62, 3))], OUTSIDE),
        ([((-1, 0), (4, 3))], "-1 is no length"),
        ([((0, 0), (-4, -3))], "-4 is no length"),
        ([((0,), (4,))], "has other axes than"),
        ([((0, 0), (3, 3))], NOT_COVERED),
        ([], NOT_COVERED),
        ([((0, 0), (4, 3)), ((0, 0), (0, 3)), ((2, 0), (2, 3))], NOT_COVERED),
        ([((0, 0), (2, 3)), ((0, 0), (2, 3))], NOT_COVERED),
        ([((0, 0), (2, 3)), ((1, 0), (2, 3))], NOT_COVERED),
        ([((0, 0), (3, 2)), ((2, 0), (2, 3))], NOT_COVERED),
    ],
)
def test_chunks_that_are_no_division_of_their_tensor_are_refused(folder, boxes, problem) -> None:
    """T21: what no chunk holds would be read as whatever is in memory."""
    rewrite(folder, lambda content: set_chunks(content, *boxes))
    with pytest.raises(ValueError, match=problem):
        read_metadata(folder)
    refusal(folder)


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 3)), ((2, 0), (2, 3))],
        [((0, 0), (4, 1)), ((0, 1), (1, 2)), ((1, 1), (3, 2))],
        [((row, column), (1, 1)) for row in range(4) for column in range(3)],
    ],
    ids=["rows", "uneven", "single"],
)
def test_chunks_that_divide_a_tensor_are_read(folder, boxes) -> None:
    rewrite(folder, lambda content: set_chunks(content, *boxes))
    chunks = read_metadata(folder)["weight"].chunks
    assert [(chunk.offsets, chunk.sizes) for chunk in chunks] == boxes


def test_a_tensor_in_very_many_chunks_is_read_at_once(folder) -> None:
    boxes = [((layer, expert), (1, 1)) for layer in range(100) for expert in range(128)]
    rewrite(folder, lambda content: set_chunks(content, *boxes, size=(100, 128)))
    assert len(read_metadata(folder)["weight"].chunks) == 12800


@pytest.mark.parametrize(
    "name",
    ["../outside.distcp", "/outside.distcp", "sub/x.distcp", "common.pt", ".distcp", "", 7, b"x"],
)
def test_only_plain_names_of_data_files_are_followed(folder, name) -> None:
    """T22."""
    (folder.parent / "outside.distcp").write_bytes(bytes(10**5))
    rewrite(folder, lambda c: setattr(place_of(c, "weight"), "relative_path", name))
    assert f"names the file {name!r}; only a plain name" in refusal(folder)


def test_a_link_that_leaves_the_folder_is_not_followed(folder) -> None:
    """T22; one within it is."""
    [data] = folder.glob("*.distcp")
    data.rename(folder / "kept")
    data.symlink_to("kept")
    assert read_metadata(folder)
    outside = (folder / "kept").rename(folder.parent / "outside.distcp")
    data.unlink()
    data.symlink_to(outside)
    assert f"{data}: links to {outside}, outside the checkpoint folder" in refusal(folder)


def test_a_data_file_that_is_missing_is_named(folder) -> None:
    """T20."""
    [data] = folder.glob("*.distcp")
    data.unlink()
    assert refusal(folder) == f"{folder}: {data.name} is missing"


def test_a_data_file_that_is_cut_off_is_named(folder) -> None:
    """T20."""
    [data] = folder.glob("*.distcp")
    ends = [c.start + c.num_bytes for t in read_metadata(folder).values() for c in t.chunks]
    os.truncate(data, max(ends) - 1)
    assert f"{data}: truncated: " in refusal(folder)
    assert f"ends at byte {max(ends)}, the file has {max(ends) - 1}" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"offset": -1}, "-1 is no length"),
        ({"offset": 0.5}, "0.5 is no length"),
        ({"length": "many"}, "'many' is no length"),
        ({"length": 2**70}, "truncated"),
        ({"transform_descriptors": ["zstd"]}, r"weight is stored with \['zstd'\]; not built"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(folder, changes, problem) -> None:
    """T21."""
    rewrite(folder, lambda content: vars(place_of(content, "weight")).update(changes))
    with pytest.raises(ValueError, match=problem):
        read_metadata(folder)
    refusal(folder)


@pytest.mark.parametrize("key", [7, None, "two\nlines", "\x1b[2J"])
def test_a_tensor_without_a_decent_name_is_refused(folder, key) -> None:
    rewrite(folder, lambda c: c.state_dict_metadata.update({key: c.state_dict_metadata["weight"]}))
    assert f"names a tensor {key!r}" in refusal(folder)


def test_a_tensor_that_is_stored_nowhere_is_refused(folder) -> None:
    rewrite(folder, lambda content: content.storage_data.clear())
    assert "not the metadata of a checkpoint: KeyError(" in refusal(folder)


def test_a_dtype_that_weights_do_not_have_is_refused(folder) -> None:
    complex_ = metadata.TensorProperties(dtype=torch.complex64)
    rewrite(folder, lambda c: vars(c.state_dict_metadata["weight"]).update(properties=complex_))
    assert "it asks for 'torch.complex64'" in refusal(folder)
