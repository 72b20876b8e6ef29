import json
from pathlib import Path

import pytest

from mtrain import __version__
from mtrain.bridge.written import WrittenFile, WrittenTensor
from mtrain.checkpoint.manifest import MANIFEST_FILE, read_manifest, write_manifest

TENSOR = WrittenTensor(dtype="BF16", shape=(2, 3), digest="0" * 32)
FILES = (
    WrittenFile(name="a.safetensors", num_bytes=12, digest="a" * 32, tensors={"w": TENSOR}),
    WrittenFile(name="templates/tools.jinja", num_bytes=0, digest="b" * 32),
)


def written(folder: Path) -> dict:
    write_manifest(folder, reversed(FILES), source={"model": "org/name"})
    return json.loads((folder / MANIFEST_FILE).read_text())


def test_a_manifest_says_what_is_there_and_what_made_it(tmp_path):
    content = written(tmp_path)
    assert content["format"] == 1
    assert content["hash"] == "xxh3_128"
    assert content["source"] == {"model": "org/name"}
    assert content["versions"]["mtrain"] == __version__
    assert {"torch", "megatron-core", "transformers"} < content["versions"].keys()
    assert content["files"] == {
        "a.safetensors": {"bytes": 12, "hash": "a" * 32},
        "templates/tools.jinja": {"bytes": 0, "hash": "b" * 32},
    }
    assert content["tensors"] == {
        "w": {"file": "a.safetensors", "dtype": "BF16", "shape": [2, 3], "hash": "0" * 32}
    }


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    written(tmp_path)
    assert read_manifest(tmp_path) == FILES


def test_a_tensor_that_two_files_hold_is_a_bug(tmp_path):
    other = WrittenFile(name="b", num_bytes=1, digest="c" * 32, tensors={"w": TENSOR})
    with pytest.raises(AssertionError, match="of the same name"):
        write_manifest(tmp_path, [*FILES, other], source={})


def test_a_missing_manifest_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "a/./b", "..\\x", "C:x", "a\0"]
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    """T21: a hostile manifest."""
    content = written(tmp_path)
    content["files"][name] = content["files"].pop("templates/tools.jinja")
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="only files in the folder are accepted") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 2, "is not of format 1"),
        (["hash"], "sha256", "with hash xxh3_128"),
        (["files"], [], "must be objects"),
        (["tensors"], None, "must be objects"),
        (["files", "a.safetensors"], 12, "must have exactly bytes and hash"),
        (["files", "a.safetensors", "bytes"], -1, "must have exactly bytes and hash"),
        (["files", "a.safetensors", "bytes"], True, "must have exactly bytes and hash"),
        (["files", "a.safetensors", "hash"], "z" * 32, "must have exactly bytes and hash"),
        (["tensors", "w"], [], "must have exactly file, dtype, shape and hash"),
        (["tensors", "w", "more"], 1, "must have exactly file, dtype, shape and hash"),
        (["tensors", "w", "file"], "b", "which it does not list"),
        (["tensors", "w", "file"], ["a"], "is not described"),
        (["tensors", "w", "dtype"], "BF17", "is not described"),
        (["tensors", "w", "shape"], [2, "3"], "is not described"),
        (["tensors", "w", "hash"], "0" * 31, "is not described"),
    ],
)
def test_a_manifest_of_another_form_is_refused_in_one_line(tmp_path, path, value, message):
    content = written(tmp_path)
    inside = content
    for word in path[:-1]:
        inside = inside[word]
    inside[path[-1]] = value
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / MANIFEST_FILE))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_manifest_that_is_no_json_object_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / MANIFEST_FILE).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)
