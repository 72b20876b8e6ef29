"""The adapter of a run: planned from flags or read from a folder, before anything starts."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrain.cli.adapter_source import open_adapter, stored_precision
from mtrain.cli.model_source import ModelSource, open_source
from mtrain.config import ModelConfig, ParallelConfig, TunerConfig
from tests.lora.peft_folders import hf_model, save_with_peft
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ModelSource:
    folder = make_checkpoint(tmp_path_factory.mktemp("base"), "qwen2", dtype="bfloat16")
    model = ModelConfig(model=str(folder))
    return open_source(model, ParallelConfig(), world_size=1, download=False)


@pytest.fixture(scope="module")
def stored(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_with_peft(
        source.folder, folder, r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 5},
    )  # fmt: skip
    return folder


def opened(source, *, torch_dtype=None, **tuner):
    return open_adapter(TunerConfig(**tuner), source, model=ModelConfig(torch_dtype=torch_dtype))


def test_full_training_has_no_adapter(source) -> None:
    assert opened(source) is None


@pytest.mark.parametrize("tuner_type", ["lora", "lora_llm"])
def test_a_fresh_adapter_is_as_large_as_that_of_peft(source, tuner_type) -> None:
    adapter = opened(source, tuner_type=tuner_type, lora_rank=3, modules_to_save=("lm_head",))
    assert adapter.stored is None
    assert adapter.ranks == (3,)
    config = peft.LoraConfig(r=3, target_modules="all-linear", modules_to_save=["lm_head"])
    expected, _ = peft.get_peft_model(hf_model(source.folder), config).get_nb_trainable_parameters()
    assert adapter.num_weights(source.table) == expected


def test_of_a_loaded_adapter_its_own_config_counts(source, stored) -> None:
    adapter = opened(source, tuner_type="lora", adapters=(str(stored),), lora_rank=64)
    assert adapter.stored.folder == stored
    assert adapter.ranks == (2, 5)
    num_saved = sum(t.numel() for t in load_file(stored / "adapter_model.safetensors").values())
    assert adapter.num_weights(source.table) == num_saved


def test_a_home_folder_is_found(source, stored, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(stored.parent))
    adapter = opened(source, tuner_type="lora", adapters=(f"~/{stored.name}",))
    assert adapter.stored.folder == stored


def test_half_precision_without_a_loss_scale_is_refused(source) -> None:
    half = {"tuner_type": "lora", "lora_dtype": "float16"}
    assert opened(source, torch_dtype="float16", **half) is not None
    assert opened(source, tuner_type="lora", lora_dtype="float32") is not None
    with pytest.raises(ValueError, match="--lora_dtype float16 does not work in bfloat16 training"):
        opened(source, **half)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], "bfloat16"),
        ([torch.float16], "float16"),
        ([torch.float32, torch.bfloat16], "float32"),
        ([torch.float64], "float32"),
    ],
)
def test_the_precision_of_files_is_found(source, stored, tmp_path, dtypes, expected) -> None:
    tensors = load_file(stored / "adapter_model.safetensors")
    cast = {n: t.to(dtypes[i % len(dtypes)]) for i, (n, t) in enumerate(tensors.items())}
    save_file(cast, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((stored / "adapter_config.json").read_bytes())
    adapter = opened(source, tuner_type="lora", adapters=(str(tmp_path),))
    assert stored_precision(adapter.stored) == expected
