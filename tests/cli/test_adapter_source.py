"""The adapter of a run: planned from flags or read from a folder, before anything starts."""

import json
import shutil
from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file

from mtrain.cli.adapter_source import open_adapter
from mtrain.cli.model_source import ModelSource, open_source
from mtrain.config import ModelConfig, ParallelConfig, SftConfig, TunerConfig
from mtrain.lora.base_model import BASE_FILE, base_model
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


def opened(source, *, torch_dtype=None, use_distributed_optimizer=True, **tuner):
    config = SftConfig(
        model=ModelConfig(torch_dtype=torch_dtype),
        parallel=ParallelConfig(use_distributed_optimizer=use_distributed_optimizer),
        tuner=TunerConfig(**tuner),
    )
    return open_adapter(config, source)


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


@pytest.mark.parametrize(
    ("training", "adapter", "is_distributed", "message"),
    [
        (None, "float32", False, None),
        (None, "bfloat16", False, None),
        ("float16", "float16", False, None),
        ("float32", "bfloat16", True, None),
        (None, "float16", True, "--lora_dtype float16 does not work in bfloat16 training"),
        ("float32", "bfloat16", False, "needs --use_distributed_optimizer true; or use float32"),
    ],
)
def test_precisions_that_the_optimizer_cannot_work_with_are_refused(
    source, training, adapter, is_distributed, message
) -> None:
    settings = {"torch_dtype": training, "use_distributed_optimizer": is_distributed}
    tuner = {"tuner_type": "lora", "lora_dtype": adapter}
    if message is None:
        assert opened(source, **settings, **tuner) is not None
        return
    with pytest.raises(ValueError, match=message):
        opened(source, **settings, **tuner)


def test_an_adapter_of_another_model_of_the_same_shape_is_refused(source, stored, tmp_path) -> None:
    """T26: names of models say little, so mtrain's own adapters know what they belong to."""
    folder = shutil.copytree(stored, tmp_path / "adapter")
    own = opened(source, tuner_type="lora").fingerprint
    (folder / BASE_FILE).write_text(json.dumps(base_model(own)))
    opened(source, tuner_type="lora", adapters=(str(folder),))
    other = make_checkpoint(tmp_path / "other", "qwen2", dtype="bfloat16", seed=1)
    model = ModelConfig(model=str(other))
    source = open_source(model, ParallelConfig(), world_size=1, download=False)
    with pytest.raises(ValueError, match="trained on another model than --model"):
        opened(source, tuner_type="lora", adapters=(str(folder),))
