"""A fingerprint is that of the values, not of the files."""

import torch
from safetensors.torch import load_file, save_file

from mtrain.bridge.fingerprint import fingerprint
from mtrain.bridge.safetensors_folder import open_checkpoint
from tests.tiny import make_checkpoint


def of(folder):
    return fingerprint(open_checkpoint(folder))


def test_files_do_not_matter(tmp_path):
    one = of(make_checkpoint(tmp_path / "one", "qwen3"))
    assert len(one) == 64
    assert one == of(make_checkpoint(tmp_path / "many", "qwen3", max_shard_size="200KB"))


def test_values_dtypes_and_names_do(tmp_path):
    folder = make_checkpoint(tmp_path / "one", "qwen3")
    found = {of(folder)}
    found.add(of(make_checkpoint(tmp_path / "other", "qwen3", seed=1)))
    found.add(of(make_checkpoint(tmp_path / "half", "qwen3", dtype="bfloat16")))
    found.add(of(make_checkpoint(tmp_path / "more", "qwen3", num_hidden_layers=5)))
    assert len(found) == 4


def test_one_tensor_that_differs_is_seen(tmp_path):
    """Of a model with few tensors all are looked at."""
    folder = make_checkpoint(tmp_path, "qwen3", num_hidden_layers=2)
    before = of(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        changed = tensors | {name: torch.ones_like(tensor)}
        save_file(changed, path, metadata={"format": "pt"})
        assert of(folder) != before, name
