"""A run that goes on takes from its checkpoint what to load, and nothing that was given anew."""

import dataclasses
import json
from pathlib import Path

import pytest

from mtrain.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    SftConfig,
    TrainingConfig,
    TunerConfig,
    config_to_dict,
)
from mtrain.config.resume import (
    changed_flags,
    checkpoint_step,
    find_checkpoints,
    find_runs,
    resolve_resumed,
)

BASE = "owner/base"


def make_checkpoint(folder: Path, tuner: str, *, is_adapter: bool = False, **saved) -> Path:
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "trainer.json").write_text("{}")
    arguments = {"model": BASE, "tuner_type": tuner, **saved}
    (folder / "args.json").write_text(json.dumps(arguments))
    if is_adapter:
        (folder / "adapter_config.json").write_text("{}")
    return folder


def resolve(
    *,
    tuner: str = "lora",
    model: str | None = None,
    adapters: tuple[str, ...] = (),
    **checkpoint,
) -> SftConfig:
    return resolve_resumed(
        SftConfig(
            model=ModelConfig(model=model),
            tuner=TunerConfig(tuner_type=tuner, adapters=adapters),
            checkpoint=CheckpointConfig(**checkpoint),
        )
    )


@pytest.mark.parametrize("model", [None, BASE], ids=["no model named", "base named"])
def test_a_full_run_loads_the_weights_of_its_checkpoint(tmp_path, model):
    folder = str(make_checkpoint(tmp_path / "checkpoint-5", "full"))
    config = resolve(tuner="full", model=model, resume_from_checkpoint=folder)
    assert config.model.model == folder
    assert config.checkpoint.resume_from_checkpoint == folder
    assert not config.checkpoint.finetune
    # Named after the base, as when the run began: that is where it goes on.
    assert config.checkpoint.output_dir == "megatron_output/base"
    for name in (folder, f"{folder}/"):
        assert resolve(tuner="full", model=name, finetune=False) == config


def test_a_full_run_that_began_in_megatron_cores_format_loads_its_checkpoint(tmp_path):
    folder = str(make_checkpoint(tmp_path / "checkpoint-5", "full", model=None))
    config = SftConfig(
        model=ModelConfig(mcore_model="/data/base-mcore"),
        tuner=TunerConfig(tuner_type="full"),
        checkpoint=CheckpointConfig(resume_from_checkpoint=folder),
    )
    resumed = resolve_resumed(config)
    assert (resumed.model.model, resumed.model.mcore_model) == (folder, None)
    assert resumed.checkpoint.output_dir == "megatron_output/base-mcore"


@pytest.mark.parametrize("model", [None, BASE], ids=["no model named", "base named"])
def test_an_adapter_goes_on_with_its_base(tmp_path, model):
    folder = str(make_checkpoint(tmp_path / "checkpoint-5", "lora", is_adapter=True))
    config = resolve(model=model, resume_from_checkpoint=folder)
    assert (config.model.model, config.tuner.adapters) == (BASE, (folder,))
    assert not config.checkpoint.finetune
    for name in (folder, f"{folder}/"):
        assert resolve(model=model, adapters=(name,), finetune=False) == config
    # The adapter that the run began with is in the checkpoint already.
    assert resolve(model=model, adapters=("first",), resume_from_checkpoint=folder) == config


def test_a_base_that_was_moved_is_the_one_that_is_given(tmp_path):
    folder = str(make_checkpoint(tmp_path / "checkpoint-5", "lora", is_adapter=True))
    config = resolve(model="other/copy", resume_from_checkpoint=folder)
    assert config.model.model == "other/copy"


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_merged_checkpoint_goes_on_from_its_base_and_its_state(tmp_path, ending):
    """Its weights have the adapter in them: they are the base of nothing."""
    folder = make_checkpoint(tmp_path / "checkpoint-5", "lora", merge_lora=True)
    config = resolve(resume_from_checkpoint=str(folder))
    assert (config.model.model, config.tuner.adapters) == (BASE, ())
    assert config.checkpoint.resume_from_checkpoint == str(folder)
    assert resolve(model=f"{folder}{ending}", finetune=False) == config


def test_a_base_on_the_hub_is_looked_for_where_it_came_from(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-5", "lora", is_adapter=True, use_hf=True)
    assert resolve(resume_from_checkpoint=str(folder)).model.use_hf
    assert not resolve(model=BASE, resume_from_checkpoint=str(folder)).model.use_hf


def test_a_run_from_the_start_is_resolved_as_ever():
    config = resolve(model=BASE)
    assert config.checkpoint.resume_from_checkpoint is None
    assert (config.model.model, config.checkpoint.finetune) == (BASE, True)


def test_what_cannot_be_continued_is_refused_with_the_reason(tmp_path):
    bare = tmp_path / "checkpoint-1"
    bare.mkdir()
    full = make_checkpoint(tmp_path / "checkpoint-2", "full")
    without_arguments = make_checkpoint(tmp_path / "checkpoint-3", "lora")
    (without_arguments / "args.json").unlink()
    for folder, reason in [
        (tmp_path / "none", "no such folder; give a checkpoint that was saved with"),
        (bare, "has no state to continue from"),
        (full, "was saved with --tuner_type full, not lora; use the same"),
        (without_arguments, "has no args.json"),
    ]:
        with pytest.raises(ValueError, match=reason) as caught:
            resolve(resume_from_checkpoint=str(folder))
        assert str(folder) in str(caught.value)
    with pytest.raises(ValueError, match="name its checkpoint with --resume_from_checkpoint"):
        resolve(finetune=False)


def test_what_was_changed_is_listed_with_both_values():
    """T13: the new ones are used; what says where things are, or what to do now, is no change."""
    config = SftConfig(
        model=ModelConfig(model=BASE),
        optimizer=OptimizerConfig(lr=1e-4),
        training=TrainingConfig(train_iters=10),
    )
    saved = json.loads(json.dumps(config_to_dict(config)))
    assert changed_flags(saved, config) == []
    changed = dataclasses.replace(
        config,
        model=ModelConfig(model="moved/base"),
        optimizer=OptimizerConfig(lr=3e-4),
        training=TrainingConfig(train_iters=20, seed=7),
        tuner=TunerConfig(target_modules=("q_proj", "v_proj")),
        checkpoint=CheckpointConfig(
            resume_from_checkpoint="x", finetune=False, no_load_rng=True, output_dir="elsewhere"
        ),
    )
    before = " ".join(config.tuner.target_modules)
    assert sorted(changed_flags(saved, changed)) == [
        "--lr 0.0003 (it was 0.0001)",
        "--seed 7 (it was 42)",
        f"--target_modules q_proj v_proj (it was {before})",
        "--train_iters 20 (it was 10)",
    ]
    # A flag that the version which saved the checkpoint did not have.
    assert changed_flags({}, changed) == []


def test_runs_of_the_same_number_are_both_found(tmp_path):
    """They started at about the same time; the later one comes first."""
    names = ["v2-20260101-000000", "v10-20260101-000000", "v10-20260101-000001", "v3"]
    for name in names:
        (tmp_path / name / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "v11-20260101-000000").write_text("")
    runs = [names[2], names[1], names[0]]
    assert [run.name for run in find_runs(tmp_path)] == [*runs, tmp_path.name]
    assert find_checkpoints(tmp_path) == [tmp_path / name / "checkpoint-1" for name in runs]
    assert find_runs(tmp_path / "missing") == find_checkpoints(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-12", 12),
        ("checkpoint-", None),
        ("checkpoint-12a", None),
        (".checkpoint-12.staged-7", None),
        (".checkpoint-12.damaged-0", None),
        ("last", None),
    ],
)
def test_only_complete_checkpoints_have_a_step(name, step):
    assert checkpoint_step(Path("run", name)) == step
