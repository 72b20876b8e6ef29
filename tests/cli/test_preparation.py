"""Before the ranks exist: the model is looked at first and cheaply, the data prepared once."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mtrain.cli import demo
from mtrain.cli.preparation import check_inputs, open_inputs, prepare_data
from mtrain.config import (
    DataConfig,
    ExportConfig,
    ModelConfig,
    SftConfig,
    TemplateConfig,
    TunerConfig,
)
from mtrain.data.storage import TokenizedDataset
from tests.lora.peft_folders import random_values, table_of, uniform_plan, write_adapter
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    demo.run(["--output_dir", str(folder), "--hidden_size", "64", "--num_layers", "1"])
    return folder


@pytest.fixture
def config(model, tmp_path, monkeypatch) -> SftConfig:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = DataConfig(
        dataset=("swift/self-cognition#20",),
        split_dataset_ratio=0.2,
        model_name=("mtrain",),
        model_author=("us",),
    )
    return SftConfig(
        model=ModelConfig(model=str(model)), data=data, template=TemplateConfig(max_length=64)
    )


def prepare(config: SftConfig, *, show_progress: bool = False) -> str:
    source = check_inputs(config, world_size=1, show_progress=show_progress)
    return prepare_data(config, source, show_progress=show_progress)


def prepared_at(config: SftConfig) -> int:
    data = open_inputs(config, world_size=1).data
    return (data.train.parent / "report.json").stat().st_mtime_ns


def test_ranks_find_what_was_prepared(config, capsys) -> None:
    key = prepare(config, show_progress=True)
    said = capsys.readouterr().err
    assert "train data: 16 of 16 rows kept" in said
    assert "val data: 4 of 4 rows kept" in said
    inputs = open_inputs(config, world_size=1)
    source, data = inputs.source, inputs.data
    assert inputs.adapter is None
    assert source.family.name == "Qwen3"
    assert data.report.reused
    assert data.validation is not None
    assert [len(TokenizedDataset(folder)) for folder in (data.train, data.validation)] == [16, 4]
    assert capsys.readouterr().err == "", "ranks have nothing to say"
    assert open_inputs(config, world_size=1, data_key=key).data == data
    with pytest.raises(ValueError, match="prepared/gone: the prepared data are gone"):
        open_inputs(config, world_size=1, data_key="gone")


def test_a_second_run_prepares_nothing(config) -> None:
    prepare(config)
    first = prepared_at(config)
    prepare(config)
    assert prepared_at(config) == first


def test_data_that_is_wanted_fresh_is_made_once_for_all_ranks(config) -> None:
    fresh = dataclasses.replace(
        config, data=dataclasses.replace(config.data, load_from_cache_file=False)
    )
    prepare(fresh)
    first = prepared_at(fresh)
    assert prepared_at(fresh) == first, "a rank made it again"
    prepare(fresh)
    assert prepared_at(fresh) > first


def test_a_token_without_a_row_in_the_embedding_is_refused(config, model, tmp_path) -> None:
    """Tokenizers in other formats than tokenizer.json are not looked into before."""
    other = tmp_path / "other"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    settings = json.loads((other / "config.json").read_text())
    small = demo.demo_config(hidden_size=64, num_layers=1) | {"vocab_size": 300}
    assert settings["vocab_size"] > 300
    demo.write_model(other, small)
    spoiled = dataclasses.replace(config, model=ModelConfig(model=str(other)))
    with pytest.raises(ValueError, match=r"but the embedding of .* has 300 rows; the tokenizer"):
        prepare(spoiled)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("experts"), "qwen3_moe")


@pytest.mark.parametrize(
    ("tuner", "is_told"),
    [
        ({"target_modules": ("down_proj", "gate_proj")}, True),
        ({"target_modules": ("down_proj", "gate_proj"), "lora_export_layout": "fused"}, False),
        ({"target_modules": ("down_proj", "gate_proj"), "merge_lora": True}, False),
        ({}, False),
    ],
)
def test_adapters_that_peft_will_not_load_are_told_before_they_are_trained(
    experts, capsys, tuner, is_told
) -> None:
    config = SftConfig(
        model=ModelConfig(model=str(experts)), tuner=TunerConfig(tuner_type="lora", **tuner)
    )
    check_inputs(config, world_size=1, show_progress=True)
    said = capsys.readouterr().err
    assert ("note: PEFT with transformers 5 does not load experts" in said) is is_told
    assert ("--lora_export_layout fused has no such limit" in said) is is_told


def test_an_adapter_that_cannot_be_saved_is_refused_before_it_is_trained(experts, tmp_path) -> None:
    """PEFT fuses gate and up of experts, which cannot have two scales there."""
    table = table_of(experts)
    lora = uniform_plan(table, "gate_proj", "up_proj", "down_proj")
    folder = write_adapter(tmp_path / "adapter", lora, table, random_values(lora, table))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"up_proj": 12}}))
    tuner = TunerConfig(adapters=(str(folder),))
    config = ExportConfig(model=ModelConfig(model=str(experts)), tuner=tuner)
    with pytest.raises(ValueError, match="PEFT knows one scale for gate_up_proj; merge the adapt"):
        check_inputs(config, world_size=1, show_progress=False)
    merged = dataclasses.replace(config, tuner=dataclasses.replace(tuner, merge_lora=True))
    check_inputs(merged, world_size=1, show_progress=False)


def test_an_adapter_that_cannot_be_merged_is_refused_before_it_is_trained(config) -> None:
    """The embedding of this model is its output layer too, which an adapter leaves alone."""
    tuner = TunerConfig(tuner_type="lora", target_modules=("all-embedding",), merge_lora=True)
    with pytest.raises(ValueError, match=r"the adapter of model\.embed_tokens cannot be merged"):
        changed = dataclasses.replace(config, tuner=tuner)
        check_inputs(changed, world_size=1, show_progress=False)


LOOK_AT_MODULES = """
import sys
from mtrain.cli import main

def imported():
    heavy = {"torch", "transformers", "datasets", "pandas", "megatron"}
    return {name for name in heavy if sys.modules.get(name) is not None}

def launch_ranks(launch, words, prepare):
    assert not imported(), f"imported by the checks: {imported()}"
    prepare()
    return 0

main.launch_ranks = launch_ranks
assert main.main(sys.argv[1:]) == 0
print(*sorted(imported()))
"""


def test_the_process_that_starts_ranks_imports_a_tokenizer_at_most(config, model, tmp_path) -> None:
    """And data that are found in the cache need none."""
    words = (
        *(sys.executable, "-c", LOOK_AT_MODULES, "sft", "--model", str(model)),
        *("--dataset", "swift/self-cognition#20", "--model_name", "m", "--model_author", "a"),
        *("--tuner_type", "lora", "--train_iters", "1", "--output_dir", str(tmp_path / "out")),
    )
    environ = {"HOME": str(tmp_path), "NPROC_PER_NODE": "2", "PATH": "/usr/bin:/bin"}
    done = [
        subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
        for _ in range(2)
    ]
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    assert [process.stdout for process in done] == ["transformers\n", "\n"]
    assert "PyTorch" not in done[0].stderr
