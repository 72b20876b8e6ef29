"""What tests/test_resume.py does not show with whole commands."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mtrain.checkpoint.trainer_state import TrainerState, write_trainer_state
from mtrain.cli.resuming import ResumePoint, find_resume_point, merged_adapter, open_batches
from mtrain.cli.saving import data_order
from mtrain.config import CheckpointConfig, DataConfig, SftConfig, TrainingConfig, TunerConfig
from mtrain.data.encode import Encoded
from mtrain.data.storage import write_samples
from mtrain.parallel import ParallelLayout
from tests.cli.test_batches import state_of
from tests.cli.test_rank_checks import prepared

CONFIG = SftConfig(
    data=DataConfig(train_dataloader_shuffle=True),
    training=TrainingConfig(global_batch_size=2, num_train_epochs=2),
)
TRAINER = TrainerState(
    step=3,
    total_steps=8,
    layout=dataclasses.asdict(ParallelLayout()),
    belongs_to={},
    num_updates=3,
    loss_scale={},
    schedule_steps=3,
    data={},
    data_unit=6,
    metrics=[[0.0] * 20],
    has_random_states=False,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    ids, labels = np.arange(4, dtype=np.int32), np.array([1, 2, 3, -100], dtype=np.int32)
    write_samples(folder, [[Encoded(ids, labels, f"row {row}", False) for row in range(8)]])
    return SimpleNamespace(data=dataclasses.replace(prepared("key"), train=folder))


def samples(config: SftConfig, inputs, point: ResumePoint | None) -> list[int]:
    """The samples of all steps that remain."""
    batches = open_batches(config, inputs, state_of(ParallelLayout(), 0), point=point)
    first = point.trainer.step if point else 0
    steps = batches.steps(batches.plan.total_steps, first=first)
    return [sample for step in steps for batch in step for sample in batch.sample_ids]


def at(inputs, config: SftConfig = CONFIG, **changes) -> ResumePoint:
    trainer = dataclasses.replace(TRAINER, data=data_order(config, inputs), **changes)
    return ResumePoint(folder=Path("checkpoint-3"), trainer=trainer)


def with_batch_size(size: int) -> SftConfig:
    return dataclasses.replace(
        CONFIG, training=dataclasses.replace(CONFIG.training, global_batch_size=size)
    )


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_every_sample_comes_once_an_epoch_also_with_another_batch_size(inputs, size):
    """T12: eight samples, two epochs, six samples done before."""
    whole = samples(CONFIG, inputs, None)
    assert sorted(whole[:8]) == sorted(whole[8:]) == list(range(8))
    assert samples(with_batch_size(size), inputs, at(inputs)) == whole[6:]


def test_other_data_or_another_order_begin_at_their_beginning(inputs):
    """T13."""
    other = dataclasses.replace(
        CONFIG, training=dataclasses.replace(CONFIG.training, seed=CONFIG.training.seed + 1)
    )
    assert samples(other, inputs, at(inputs)) == samples(other, inputs, None)


def test_a_checkpoint_is_read_where_one_is_named(tmp_path):
    assert find_resume_point(SftConfig()) is None
    (tmp_path / "state").mkdir()
    write_trainer_state(tmp_path, TRAINER)
    named = SftConfig(checkpoint=CheckpointConfig(resume_from_checkpoint=str(tmp_path)))
    assert find_resume_point(named) == ResumePoint(folder=tmp_path, trainer=TRAINER)


def test_only_a_merged_adapter_is_taken_from_the_state(tmp_path):
    point = ResumePoint(folder=tmp_path, trainer=TRAINER)
    assert merged_adapter(SftConfig(tuner=TunerConfig(merge_lora=False)), point) is None
    with pytest.raises(ValueError, match="no such folder"):
        merged_adapter(SftConfig(tuner=TunerConfig(merge_lora=True)), point)
