"""Which two models the precision test compares, for every kind of export."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mtrain.bridge.storage.quantization import Fp8Blocks
from mtrain.cli import precision
from mtrain.cli.adapter_source import open_adapter
from mtrain.cli.model_source import open_source
from mtrain.config import (
    CheckpointConfig,
    ExportConfig,
    ExportOptions,
    ModelConfig,
    ParallelConfig,
    TunerConfig,
)
from tests.bridge.storage.quantized import quantized_copy
from tests.lora.peft_folders import save_with_peft
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_with_peft(model, folder, r=2, lora_alpha=2, target_modules=["q_proj"])
    return folder


def sides_of(model: Path, *, adapter=None, exported=None, folder="out", merge=False, **options):
    config = ExportConfig(
        checkpoint=CheckpointConfig(fp8_export=options.pop("fp8_export", False)),
        model=ModelConfig(model=str(model), torch_dtype=options.pop("torch_dtype", None)),
        tuner=TunerConfig(adapters=(str(adapter),) if adapter else (), merge_lora=merge),
        export=ExportOptions(**options),
    )
    source = open_source(config.model, ParallelConfig(), world_size=1, download=False)
    opened = open_adapter(config, source)
    sides = precision._sides(config, source, opened, exported=exported, folder=Path(folder))
    return source, opened, sides


def test_what_was_written_for_hugging_face_is_the_judge(model) -> None:
    exported = object()
    _, _, sides = sides_of(model, to_hf=True, exported=exported)
    assert (sides.weights, sides.adapter) == (exported, None)
    assert (sides.hf_folder, sides.peft_folder) == (Path("out"), None)


def test_8_bit_weights_are_rounded_to_half_precision_on_both_sides(model, tmp_path, monkeypatch):
    """And what was rounded to 8 bits again is read back."""
    source = quantized_copy(model, tmp_path / "quantized", Fp8Blocks(rows=16, columns=16))
    monkeypatch.setattr(precision, "open_torch_dist_model", lambda folder, _: ("model", folder))
    for wanted in (None, "float32"):
        _, _, sides = sides_of(source, to_mcore=True, exported=object(), torch_dtype=wanted)
        assert sides.stored_dtype == torch.bfloat16
    exported = object()
    _, _, sides = sides_of(source, to_hf=True, exported=exported)
    assert (sides.weights, sides.stored_dtype) == (exported, None)
    _, _, sides = sides_of(source, to_hf=True, exported=exported, folder=source, fp8_export=True)
    assert (sides.weights.folder, sides.stored_dtype) == (source, torch.bfloat16)


def test_a_merged_model_has_no_adapter_on_either_side(model, adapter) -> None:
    exported = object()
    _, _, sides = sides_of(model, adapter=adapter, merge=True, to_hf=True, exported=exported)
    assert (sides.weights, sides.adapter, sides.peft_folder) == (exported, None, None)


def test_an_adapter_that_was_written_is_put_on_the_model_it_belongs_to(model, adapter) -> None:
    source, opened, sides = sides_of(model, adapter=adapter, to_hf=True)
    assert (sides.weights, sides.adapter) == (source.weights, opened)
    assert (sides.hf_folder, sides.peft_folder) == (model, Path("out"))


def test_what_was_written_for_megatron_is_read_back(model, adapter, monkeypatch) -> None:
    monkeypatch.setattr(precision, "open_torch_dist_model", lambda folder, _: ("model", folder))
    monkeypatch.setattr(precision, "read_torch_dist_adapter", lambda folder, _: ("lora", folder))
    _, _, sides = sides_of(model, to_mcore=True, exported=object(), torch_dtype="bfloat16")
    assert sides.weights == ("model", Path("out"))
    assert (sides.hf_folder, sides.peft_folder) == (model, None)
    assert str(sides.stored_dtype) == "torch.bfloat16"
    source, opened, sides = sides_of(model, adapter=adapter, to_mcore=True)
    assert sides.weights == source.weights
    assert sides.adapter == dataclasses.replace(opened, stored=("lora", Path("out")))
    assert (sides.hf_folder, sides.peft_folder) == (model, adapter)
