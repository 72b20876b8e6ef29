"""Settings as batches: who gets which samples, in which shape."""

import numpy as np
import pytest

from mtrain.cli.batches import Batches
from mtrain.config import DataConfig, SftConfig, TrainingConfig
from mtrain.data.encode import Encoded
from mtrain.data.storage import TokenizedDataset, write_samples
from mtrain.parallel import ParallelLayout, ParallelState, World
from tests.cli.test_rank_checks import prepared

LENGTHS = [5, 9, 16, 3, 12, 7, 8, 2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenizedDataset:
    folder = tmp_path_factory.mktemp("data") / "train"
    samples = [
        Encoded(
            np.full(length, 10 + index, dtype=np.int32),
            np.array([*[10 + index] * (length - 1), -100], dtype=np.int32),
            f"row {index}",
            False,
        )
        for index, length in enumerate(LENGTHS)
    ]
    write_samples(folder, [samples])
    return TokenizedDataset(folder)


def state_of(layout: ParallelLayout, rank: int) -> ParallelState:
    return ParallelState(
        layout=layout,
        world=World(size=layout.world_size, rank=rank, device=None, group=None, timeout_seconds=60),
        coordinates=layout.coordinates(rank),
        groups=None,
    )


def make(dataset, *, layout=None, rank=0, is_training=True, training=None, **data) -> Batches:
    training = {"global_batch_size": 4, "num_train_epochs": 2, **(training or {})}
    config = SftConfig(data=DataConfig(**data), training=TrainingConfig(**training))
    state = state_of(layout or ParallelLayout(), rank)
    report = prepared("key").report
    return Batches(config, dataset, report, state, is_training=is_training)


def ids_of(batches: Batches) -> list[list[tuple[int, ...]]]:
    steps = batches.steps(batches.plan.total_steps)
    return [[batch.sample_ids for batch in step] for step in steps]


def test_data_parallel_ranks_share_a_step_and_other_ranks_see_the_same(dataset) -> None:
    layout = ParallelLayout(world_size=8, tp_size=2, pp_size=2)
    whole = ids_of(make(dataset))
    ranks = [ids_of(make(dataset, layout=layout, rank=rank)) for rank in range(8)]
    by_dp = {0: [], 1: []}
    for rank, steps in enumerate(ranks):
        by_dp[layout.coordinates(rank).dp_rank].append(steps)
    for group in by_dp.values():
        assert all(steps == group[0] for steps in group), "tensor and pipeline ranks disagree"
    for step, micro_batches in enumerate(whole):
        ours = by_dp[0][0][step] + by_dp[1][0][step]
        assert sorted(ours) == sorted(micro_batches)
        assert not set(by_dp[0][0][step]) & set(by_dp[1][0][step])


def test_every_sample_comes_once_an_epoch_in_another_order(dataset) -> None:
    steps = ids_of(make(dataset))
    order = [sample for step in steps for ids in step for sample in ids]
    first, second = order[:8], order[8:]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_the_order_follows_the_seed(dataset) -> None:
    same, other = (ids_of(make(dataset, training={"seed": seed})) for seed in (42, 7))
    assert same == ids_of(make(dataset))
    assert other != same


def test_validation_is_one_epoch_in_order(dataset) -> None:
    steps = ids_of(make(dataset, is_training=False))
    assert [ids for step in steps for ids in step] == [(index,) for index in range(8)]


def test_shuffling_can_be_turned_off(dataset) -> None:
    steps = ids_of(make(dataset, train_dataloader_shuffle=False))
    assert [ids for step in steps for ids in step] == [(index,) for index in range(8)] * 2


def test_packs_have_the_packing_length(dataset) -> None:
    batches = make(dataset, packing=True, packing_length=16)
    (step, *_) = batches.steps(batches.plan.total_steps)
    assert {tuple(batch.input_ids.shape) for batch in step} == {(1, 16)}
    assert batches.plan.total_steps < make(dataset).plan.total_steps


def test_a_packing_length_without_packing_does_nothing(dataset) -> None:
    """The flag may stay in a config file whose packing was turned off."""
    assert ids_of(make(dataset, packing_length=16)) == ids_of(make(dataset))


def test_rows_are_padded_one_by_one_when_asked_for(dataset) -> None:
    batches = make(dataset, padding_free=False, training={"micro_batch_size": 2})
    for step in batches.steps(batches.plan.total_steps):
        assert all(batch.input_ids.shape[0] == 2 and batch.cu_seqlens is None for batch in step)


def test_lengths_divide_over_the_tensor_ranks(dataset) -> None:
    """Sequence parallelism cuts the sequence into that many parts, also odd ones."""
    batches = make(dataset, layout=ParallelLayout(world_size=3, tp_size=3))
    for step in batches.steps(batches.plan.total_steps):
        assert all(batch.input_ids.shape[1] % 24 == 0 for batch in step)


def test_threads_build_the_same_batches(dataset) -> None:
    assert ids_of(make(dataset, dataloader_num_workers=2)) == ids_of(make(dataset))
