"""The pieces of `megatron sft` on a rank; whole runs are in tests/test_end_to_end.py."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mtrain.cli import demo, replaying, sft
from mtrain.cli.launch import Placement
from mtrain.cli.preparation import check_inputs, prepare_data
from mtrain.cli.start_clock import StartClock
from mtrain.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    SftConfig,
    TrainingConfig,
    TunerConfig,
    resolve_sft,
)
from mtrain.data.loader import BatchPlan
from mtrain.parallel import destroy_parallel, destroy_world


def loop_plan(*, total_steps: int, num_samples: int = 10, **changes):
    checkpoint = CheckpointConfig(**changes.get("checkpoint", {}))
    training = TrainingConfig(num_train_epochs=3, **changes.get("training", {}))
    batches = BatchPlan(
        torch.ones(num_samples, dtype=torch.int64).numpy(),
        micro_batch_size=1,
        global_batch_size=4,
        num_epochs=3,
        shuffle=True,
        seed=0,
    )
    config = resolve_sft(SftConfig(checkpoint=checkpoint, training=training))
    run = SimpleNamespace(config=config, batches=batches, total_steps=total_steps)
    return sft._loop_plan(run, first_step=changes.get("first_step", 0))


def test_checkpoints_and_evaluations_come_at_their_steps_and_at_the_end() -> None:
    plan = loop_plan(total_steps=8, checkpoint={"save_steps": 3}, training={"eval_steps": 5})
    assert (plan.checkpoints, plan.evaluations) == ({3, 6, 8}, {5, 8})


def test_evaluations_follow_checkpoints_by_default() -> None:
    plan = loop_plan(total_steps=8, checkpoint={"save_steps": 3})
    assert plan.evaluations == plan.checkpoints


def test_an_epoch_ends_with_an_evaluation_and_a_checkpoint() -> None:
    """Ten samples by four: epochs end within steps 3 and 5, and with step 8."""
    plan = loop_plan(total_steps=8, checkpoint={"save_strategy": "epoch"})
    assert (plan.checkpoints, plan.evaluations) == ({3, 5, 8}, {3, 5, 8})


def test_a_run_that_goes_on_ends_its_epochs_where_they_end() -> None:
    plan = loop_plan(total_steps=8, checkpoint={"save_strategy": "epoch"}, first_step=4)
    assert plan.checkpoints == {5, 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    demo.run(["--output_dir", str(folder), "--hidden_size", "64", "--num_layers", "2"])
    return folder


@pytest.fixture
def config(model, tmp_path, monkeypatch) -> SftConfig:
    monkeypatch.setenv("HOME", str(tmp_path))
    return resolve_sft(
        SftConfig(
            model=ModelConfig(model=str(model)),
            data=DataConfig(
                dataset=("swift/self-cognition#12",),
                val_dataset=("swift/self-cognition#7",),
                model_name=("mtrain",),
                model_author=("us",),
            ),
            training=TrainingConfig(train_iters=2, global_batch_size=4),
            optimizer=OptimizerConfig(lr=0.0),
            checkpoint=CheckpointConfig(output_dir="~/out", save_steps=2),
            logging=LoggingConfig(report_to=("none",), logging_steps=1),
        )
    )


def run_alone(config: SftConfig) -> Path:
    """Trains in this process and returns the folder of the run."""
    source = check_inputs(config, world_size=1, show_progress=False)
    prepare_data(config, source, show_progress=False)
    try:
        assert sft.run(config, Placement(), StartClock()) == 0
    finally:
        destroy_parallel()
        destroy_world()
    (folder,) = Path(config.checkpoint.output_dir).expanduser().iterdir()
    return folder


def change(config: SftConfig, section: str, **values) -> SftConfig:
    changed = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: changed})


def eval_line(folder: Path) -> dict:
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return next(line for line in lines if "eval_loss" in line)


def test_a_run_without_learning_rate_gives_the_model_back(config, model, capsys) -> None:
    """From argv's home folder to the saved file nothing is changed on the way."""
    folder = run_alone(config)
    assert folder.parent == Path.home() / "out"
    saved = folder / "checkpoint-2" / "model.safetensors"
    from safetensors.torch import load_file

    before, after = load_file(model / "model.safetensors"), load_file(saved)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = capsys.readouterr().err
    count = sum(tensor.numel() for tensor in before.values())
    assert f"Qwen3: {count:,} weights are trained on cpu (one rank, torch backend)" in said
    assert f"saved {folder / 'checkpoint-2'}" in said


def test_evaluation_sees_each_validation_sample_once(config) -> None:
    """Seven samples in steps of four: the last step is filled up with nothing."""
    whole = eval_line(run_alone(config))
    wide = change(config, "training", global_batch_size=7)
    wide = change(wide, "checkpoint", output_dir="~/wide")
    assert eval_line(run_alone(wide))["eval_num_tokens"] == whole["eval_num_tokens"]
    assert eval_line(Path(*Path.home().glob("wide/*")))["eval_loss"] == pytest.approx(
        whole["eval_loss"], rel=1e-6
    )


def test_evaluation_can_be_shortened_and_turned_off(config) -> None:
    whole = eval_line(run_alone(change(config, "checkpoint", output_dir="~/a")))
    short = change(change(config, "training", eval_iters=1), "checkpoint", output_dir="~/b")
    assert 0 < eval_line(run_alone(short))["eval_num_tokens"] < whole["eval_num_tokens"]
    off = change(change(config, "training", eval_iters=0), "checkpoint", output_dir="~/c")
    assert "eval_loss" not in (run_alone(off) / "logging.jsonl").read_text()


@pytest.mark.parametrize(
    "tuner", [TunerConfig(), TunerConfig(tuner_type="lora")], ids=["full", "lora"]
)
def test_a_run_that_replays_its_layers_saves_the_same(config, tuner, monkeypatch) -> None:
    """With work that is done again each time in place of a GPU's recordings."""
    config = dataclasses.replace(config, tuner=tuner)
    config = change(config, "data", packing=True, packing_length=64)
    config = change(config, "training", train_iters=4)
    config = change(change(config, "optimizer", lr=1e-3), "checkpoint", save_steps=4)
    started = []

    def recorder():
        return lambda work: lambda: started.append(work()) or None

    saved = []
    for impl in ("none", "auto"):
        run = change(config, "model", cuda_graph_impl=impl)
        folder = run_alone(change(run, "checkpoint", output_dir=f"~/{impl}"))
        saved.append(sorted((folder / "checkpoint-4").glob("*model.safetensors")))
        assert bool(started) is (impl == "auto")
        monkeypatch.setattr(replaying, "why_not_replayed", lambda _model: "")
        monkeypatch.setattr(replaying, "graph_recorder", recorder)
    assert all(saved)
    for plain, replayed in zip(*saved, strict=True):
        assert plain.read_bytes() == replayed.read_bytes()


@pytest.mark.parametrize(
    ("section", "values", "kind", "message"),
    [
        ("parallel", {"ddp_backend": "nccl"}, ValueError, "--ddp_backend nccl: the ranks talk"),
        ("model", {"cuda_graph_impl": "local"}, ValueError, "--cuda_graph_impl local: there is no"),
        ("model", {"attention_backend": "unfused"}, ValueError, "--attention_backend unfused is"),
        ("model", {"transformer_impl": "te"}, RuntimeError, "te needs Transformer Engine, but the"),
    ],
)
def test_what_the_machine_cannot_do_is_said_before_anything_is_made(
    config, monkeypatch, section, values, kind, message
) -> None:
    monkeypatch.setattr("mtrain.model.backends.has_gpu", lambda: False)
    monkeypatch.setattr("mtrain.cli.rank_checks.has_gpu", lambda: False)
    with pytest.raises(kind, match=re.escape(message)):
        sft.run(change(config, section, **values), Placement(), StartClock())
    assert not (Path.home() / "out").exists()
