"""What ranks know before they have a model: the precision."""

import os

import pytest
import torch

from mtrain.cli.joining import training_dtype
from mtrain.cli.launch import let_gpu_memory_grow
from mtrain.config import ModelConfig


@pytest.mark.parametrize(
    ("asked", "hf_config", "expected"),
    [
        (None, {"dtype": "bfloat16"}, torch.bfloat16),
        (None, {"torch_dtype": "float16"}, torch.float16),
        (None, {}, torch.float32),
        ("float32", {"dtype": "bfloat16"}, torch.float32),
        ("bfloat16", {"torch_dtype": "float64"}, torch.bfloat16),
    ],
)
def test_the_precision_is_that_of_the_checkpoint_unless_told(asked, hf_config, expected) -> None:
    assert training_dtype(ModelConfig(torch_dtype=asked), hf_config) == expected


def test_an_adapter_may_have_a_precision_of_its_own() -> None:
    model, hf_config = ModelConfig(torch_dtype="float16"), {"dtype": "bfloat16"}
    assert training_dtype(model, hf_config, wanted="float32") == torch.float32


def test_a_precision_that_cannot_be_trained_in_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config\.json: dtype 'float8_e4m3fn' cannot be trained"):
        training_dtype(ModelConfig(), {"dtype": "float8_e4m3fn"})


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_grows_in_place_unless_the_allocator_was_set(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for every in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(every, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    let_gpu_memory_grow()
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True"
    os.environ[name] = "max_split_size_mb:64"
    let_gpu_memory_grow()
    assert [key for key in os.environ if "ALLOC_CONF" in key] == [name]
    assert os.environ[name] == "max_split_size_mb:64"
