"""What an index may and may not say (T22), and that pickles stay closed (T25)."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from mtrain.bridge.safetensors_folder import open_checkpoint

SHARDS = {"a.safetensors": ["x", "y"], "b.safetensors": ["z"]}


def write_folder(folder, shards=SHARDS, *, weight_map=None, total_size=36):
    folder.mkdir(parents=True, exist_ok=True)
    for name, keys in shards.items():
        save_file({key: torch.ones(3) for key in keys}, folder / name)
    if weight_map is None:
        weight_map = {key: name for name, keys in shards.items() for key in keys}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_table(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path))
    assert {name: tensor.path.name for name, tensor in checkpoint.tensors.items()} == {
        "x": "a.safetensors",
        "y": "a.safetensors",
        "z": "b.safetensors",
    }
    assert checkpoint.notes == ()


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["x"]


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/passwd",
        "/a.safetensors",
        "sub/../../a.safetensors",
        "sub/a.safetensors",
        "..\\a.safetensors",
        "C:\\a.safetensors",
        "C:a.safetensors",
        "a.safetensors\0",
        "a\0.safetensors",
        "..",
        ".",
        "",
        ".safetensors",
        "a.bin",
        "\ud800.safetensors",
        "a" * 300 + ".safetensors",
        5,
        None,
        ["a.safetensors"],
    ],
)
def test_a_weight_map_that_leaves_the_folder_is_refused(tmp_path, name):
    """T22"""
    write_folder(tmp_path / "model", weight_map={"x": "a.safetensors", "y": name})
    save_file({"y": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"weight_map sends 'y' to .*; only the plain name"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd"])
@pytest.mark.parametrize("link", ["a.safetensors", "model.safetensors.index.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path, link, target):
    """T22"""
    folder = write_folder(tmp_path / "model")
    os.replace(folder / "a.safetensors", tmp_path / "outside.safetensors")
    save_file({"x": torch.ones(3), "y": torch.ones(3)}, folder / "a.safetensors")
    (folder / link).unlink()
    (folder / link).symlink_to(target)
    with pytest.raises(ValueError, match="outside the checkpoint folder"):
        open_checkpoint(folder)


def test_a_single_file_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    """T22"""
    save_file({"x": torch.ones(3)}, tmp_path / "outside.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(ValueError, match="outside the checkpoint folder"):
        open_checkpoint(tmp_path / "model")


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    folder = write_folder(tmp_path / "models--a--b/snapshots/0123")
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        os.replace(path, blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert sorted(open_checkpoint(folder).tensors) == ["x", "y", "z"]


def test_a_folder_that_is_itself_a_link_is_fine(tmp_path):
    write_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert len(open_checkpoint(tmp_path / "link").tensors) == 3


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "c.safetensors"}, "'c.safetensors' of weight_map not in the folder"),
        ({"x": "a.safetensors"}, "a.safetensors: weight_map does not list 'y'"),
        (
            {"x": "a.safetensors", "y": "a.safetensors", "w": "b.safetensors"},
            "b.safetensors does not hold tensor 'w'",
        ),
        (
            {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"},
            "b.safetensors does not hold tensor 'x'",
        ),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, weight_map, message):
    """T22"""
    with pytest.raises(ValueError, match=message):
        open_checkpoint(write_folder(tmp_path, weight_map=weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    """T22"""
    folder = write_folder(tmp_path, {"a.safetensors": ["x", "y"], "b.safetensors": ["y", "z"]})
    with pytest.raises(ValueError, match=r"b.safetensors: tensor 'y' is in a.safetensors too"):
        open_checkpoint(folder)


def test_a_wrong_total_size_is_noted_only(tmp_path):
    """T22"""
    (note,) = open_checkpoint(write_folder(tmp_path, total_size=35)).notes
    assert "total_size is 35, the tensors have 36 bytes" in note


@pytest.mark.parametrize("metadata", [None, [], {"total_size": "36 bytes"}, {}])
def test_odd_metadata_does_no_harm(tmp_path, metadata):
    write_folder(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": metadata}))
    assert len(open_checkpoint(tmp_path).tensors) == 3


def test_an_index_with_a_duplicate_key_is_refused(tmp_path):
    write_folder(tmp_path)
    text = '{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json: .*key 'x' occurs twice"):
        open_checkpoint(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path):
    """T20"""
    shard = write_folder(tmp_path) / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"b.safetensors: truncated: tensor 'z'"):
        open_checkpoint(tmp_path)


def test_an_index_beside_an_unrelated_single_file_is_refused(tmp_path):
    write_folder(tmp_path)
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="remove one of the two"):
        open_checkpoint(tmp_path)


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another copy in another format")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    assert len(open_checkpoint(tmp_path).tensors) == 3


def test_pickle_files_are_named_and_not_opened(tmp_path):
    """T25: opening the pipe would wait forever."""
    os.mkfifo(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"'pytorch_model.bin'.*never opened"):
        open_checkpoint(tmp_path)


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no safetensors checkpoint \(model.safetensors or"):
        open_checkpoint(tmp_path)
