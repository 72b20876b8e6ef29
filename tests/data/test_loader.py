import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch

from mtrain.data import loader
from mtrain.data.encode import Encoded
from mtrain.data.loader import BatchLayout, BatchPlan, Position, collate, load_steps
from mtrain.data.storage import IGNORED, TokenizedDataset, write_samples

# Each sample's tokens tell whose they are, so that a mix-up shows.
NUM_SAMPLES = 37
FIRST_TOKEN = 1000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(0)
    samples = []
    for index, length in enumerate(rng.integers(2, 33, NUM_SAMPLES)):
        ids = np.arange(length, dtype=np.int32) + FIRST_TOKEN * (index + 1)
        labels = np.append(ids[1:], IGNORED).astype(np.int32)
        samples.append(Encoded(ids, labels, f"line {index}", False))
    folder = tmp_path_factory.mktemp("data") / "d"
    write_samples(folder, [samples[:20], samples[20:]])
    return TokenizedDataset(folder)


def make_plan(dataset, **changes):
    values = {
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "num_epochs": 1,
        "shuffle": True,
        "seed": 5,
    }
    return BatchPlan(dataset.lengths, **{**values, **changes})


PLANS = [
    {},
    {"shuffle": False},
    {"micro_batch_size": 2},
    {"packing_length": 40},
    {"packing_length": 40, "packing_strategy": "sequential"},
    {"packing_length": 40, "packing_strategy": "sequential", "shuffle": False},
]


@pytest.mark.parametrize("changes", PLANS)
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_every_sample_is_seen_exactly_once_an_epoch(dataset, changes, dp_size):
    """T12: a ledger of sample ids over three epochs; nothing is dropped at the end."""
    plan = make_plan(dataset, num_epochs=3, **changes)
    stream = []
    for step in range(plan.total_steps):
        ranks = [plan.micro_batches(step, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
        assert len({len(micro_batches) for micro_batches in ranks}) == 1
        for micro_batch in zip(*ranks, strict=True):
            stream += [unit for units in micro_batch for unit in units]
    filled = [unit.tolist() for unit in stream if len(unit)]
    assert all(len(unit) == 0 for unit in stream[len(filled) :])
    assert len(stream) - len(filled) < 8
    ledger = [index for unit in filled for index in unit]
    for epoch in range(3):
        of_epoch = ledger[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]
        assert sorted(of_epoch) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("changes", PLANS)
def test_a_step_trains_on_the_same_micro_batches_at_any_number_of_ranks(dataset, changes):
    """T12, T43."""
    plan = make_plan(dataset, num_epochs=2, **changes)
    for step in range(plan.total_steps):
        seen = [
            {
                tuple(tuple(unit.tolist()) for unit in micro_batch)
                for rank in range(dp_size)
                for micro_batch in plan.micro_batches(step, dp_rank=rank, dp_size=dp_size)
            }
            for dp_size in (1, 2, 4)
        ]
        assert seen[0] == seen[1] == seen[2]


def test_epochs_have_orders_of_their_own_unless_shuffle_is_off(dataset):
    shuffled, plain = make_plan(dataset), make_plan(dataset, shuffle=False)
    assert not np.array_equal(shuffled.units(0).sample_ids, shuffled.units(1).sample_ids)
    assert plain.units(1).sample_ids.tolist() == list(range(NUM_SAMPLES))


def test_the_stream_goes_on_across_epochs(dataset):
    """37 units, 8 a step: step 4 takes 5 units of epoch 0 and 3 of epoch 1."""
    plan = make_plan(dataset, num_epochs=None)
    ids = [int(unit[0]) for unit in plan.step_units(4)]
    assert ids[:5] == plan.units(0).sample_ids[32:].tolist()
    assert ids[5:] == plan.units(1).sample_ids[:3].tolist()
    assert plan.position(5) == Position(1, 3)
    assert plan.epochs_consumed(5) == 1 + 3 / 37
    with pytest.raises(ValueError, match="--num_train_epochs or --train_iters"):
        plan.total_steps  # noqa: B018


def test_the_number_of_steps_is_rounded_up_once(dataset):
    assert make_plan(dataset, num_epochs=3).total_steps == -(-3 * NUM_SAMPLES // 8)
    done = make_plan(dataset, num_epochs=1)
    assert done.position(done.total_steps) == Position(1, 0)
    assert done.epochs_consumed(done.total_steps) == 1.0


def test_any_step_can_be_the_first_one_asked_for(dataset):
    for changes in PLANS:
        plan = make_plan(dataset, num_epochs=4, **changes)
        walked = [plan.step_units(step) for step in range(plan.total_steps)]
        for step in reversed(range(plan.total_steps)):
            jumped = make_plan(dataset, num_epochs=4, **changes).step_units(step)
            assert [u.tolist() for u in jumped] == [u.tolist() for u in walked[step]]


def test_sizes_that_do_not_divide_and_empty_data_are_refused(dataset):
    plan = make_plan(dataset, micro_batch_size=2)
    with pytest.raises(ValueError, match="--global_batch_size 8 is not a multiple of"):
        plan.micro_batches(0, dp_rank=0, dp_size=3)
    with pytest.raises(ValueError, match="no samples"):
        BatchPlan(
            np.empty(0, dtype=np.int32),
            micro_batch_size=1,
            global_batch_size=1,
            num_epochs=1,
            shuffle=False,
            seed=0,
        )


def assert_label_positions_are_those_of_the_labels(batch):
    positions = (batch.labels.flatten() != IGNORED).nonzero().squeeze(1)
    assert torch.equal(batch.label_positions, positions)


def assert_documents_are_intact(batch, dataset):
    """Documents are the samples, with own positions; the rest is padding without loss."""
    bounds = batch.cu_seqlens.tolist()
    assert_label_positions_are_those_of_the_labels(batch)
    assert batch.cu_seqlens.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == batch.input_ids.shape[1]
    documents = list(pairwise(bounds))
    assert max(end - start for start, end in documents) == batch.max_seqlen
    for number, (start, end) in enumerate(documents):
        assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
        if number < len(batch.sample_ids):
            sample = dataset[batch.sample_ids[number]]
            assert batch.input_ids[0, start:end].tolist() == sample.input_ids.tolist()
            assert batch.labels[0, start:end].tolist() == sample.labels.tolist()
        else:
            assert (batch.labels[0, start:end] == IGNORED).all()
            assert (batch.input_ids[0, start:end] == 3).all()
    assert batch.num_tokens == int(dataset.lengths[list(batch.sample_ids)].sum())
    for tensor in (batch.input_ids, batch.labels, batch.label_positions, batch.position_ids):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_packed_batches_have_one_shape_and_never_mix_documents(dataset, micro_batch_size):
    plan = make_plan(dataset, packing_length=42, micro_batch_size=micro_batch_size)
    layout = BatchLayout(
        micro_batch_size=micro_batch_size, packing_length=42, pad_to_multiple=8, pad_token_id=3
    )
    total = {1: 48, 2: 88}[micro_batch_size]
    for step in range(plan.total_steps):
        for units in plan.micro_batches(step, dp_rank=0, dp_size=1):
            batch = collate(dataset, units, layout)
            assert batch.input_ids.shape == (1, total)
            assert batch.max_seqlen <= 42
            assert_documents_are_intact(batch, dataset)


def test_padding_free_pads_the_concatenation(dataset):
    layout = BatchLayout(micro_batch_size=3, pad_to_multiple=16, pad_token_id=3)
    units = [np.array([4]), np.array([30]), np.array([0])]
    batch = collate(dataset, units, layout)
    tokens = int(dataset.lengths[[4, 30, 0]].sum())
    assert batch.input_ids.shape[1] == -(-tokens // 16) * 16
    assert batch.sample_ids == (4, 30, 0)
    assert_documents_are_intact(batch, dataset)


def test_no_padding_document_is_added_where_none_is_needed(dataset):
    batch = collate(dataset, [np.array([4])], BatchLayout(micro_batch_size=1, pad_to_multiple=1))
    assert batch.cu_seqlens.tolist() == [0, dataset.lengths[4]]


def test_rows_are_padded_on_the_right(dataset):
    layout = BatchLayout(micro_batch_size=3, padding_free=False, pad_token_id=3)
    batch = collate(dataset, [np.array([4]), np.array([30]), np.array([], dtype=int)], layout)
    longest = int(dataset.lengths[[4, 30]].max())
    assert batch.cu_seqlens is None
    assert batch.input_ids.shape == (3, -(-longest // 8) * 8)
    for row, index in enumerate((4, 30)):
        length = dataset.lengths[index]
        assert batch.input_ids[row, :length].tolist() == dataset[index].input_ids.tolist()
        assert batch.labels[row, :length].tolist() == dataset[index].labels.tolist()
        assert (batch.labels[row, length:] == IGNORED).all()
    assert (batch.labels[2] == IGNORED).all()
    assert_label_positions_are_those_of_the_labels(batch)
    assert (batch.position_ids == torch.arange(batch.max_seqlen)).all()


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (BatchLayout(micro_batch_size=2, packing_length=40), (1, 80)),
        (BatchLayout(micro_batch_size=2), (1, 8)),
        (BatchLayout(micro_batch_size=2, padding_free=False), (2, 8)),
    ],
)
def test_an_empty_micro_batch_is_all_padding(dataset, layout, shape):
    empty = np.empty(0, dtype=np.int64)
    batch = collate(dataset, [empty, empty], layout)
    assert batch.input_ids.shape == shape
    assert (batch.labels == IGNORED).all()
    assert (batch.num_tokens, batch.sample_ids) == (0, ())
    assert batch.position_ids.max() < 40


def steps_of(dataset, steps=None, plan=None, **arguments):
    plan = plan or make_plan(dataset, num_epochs=2, packing_length=40)
    layout = BatchLayout(micro_batch_size=1, packing_length=40)
    steps = steps or range(plan.total_steps)
    return load_steps(dataset, plan, layout, steps, dp_rank=1, dp_size=2, **arguments)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_steps_come_in_order_and_can_start_anywhere(dataset, num_workers):
    expected = [[batch.sample_ids for batch in step] for step in steps_of(dataset)]
    assert len(expected) == 5
    assert all(len(step) == 4 for step in expected)
    for first in (0, 3):
        steps = steps_of(dataset, range(first, 5), num_workers=num_workers)
        assert [[batch.sample_ids for batch in step] for step in steps] == expected[first:]
    limited = steps_of(dataset, range(1, 3), num_workers=num_workers)
    assert len(list(limited)) == 2


def test_batches_are_built_ahead_by_other_threads(dataset, monkeypatch):
    builders = []
    original = loader.collate

    def watched(*arguments):
        builders.append(threading.current_thread().name)
        return original(*arguments)

    monkeypatch.setattr(loader, "collate", watched)
    steps = steps_of(dataset, num_workers=1, prefetch_factor=2)
    next(steps)
    steps.close()
    assert builders
    assert all(name.startswith("mtrain-data") for name in builders)


def test_nobody_waits_while_packs_of_another_epoch_are_planned(dataset, monkeypatch):
    plan = make_plan(dataset, num_epochs=None, packing_length=40)
    begins, may_end = threading.Event(), threading.Event()
    plan_packs = loader.plan_packs

    def slow_plan_packs(*args, **options):
        begins.set()
        assert may_end.wait(30)
        return plan_packs(*args, **options)

    monkeypatch.setattr(loader, "plan_packs", slow_plan_packs)
    num_steps = len(plan.units(0)) // 8
    steps = steps_of(dataset, range(num_steps + 2), plan=plan, num_workers=1, prefetch_factor=9)
    first = next(steps)
    assert begins.wait(30)
    assert plan.epochs_consumed(1) == 8 / len(plan.units(0))
    assert plan.position(num_steps).epoch == 0
    may_end.set()
    assert len([first, *steps]) == num_steps + 2


def test_threads_that_plan_at_once_agree(dataset):
    changes = {"num_epochs": None, "packing_length": 40, "packing_strategy": "sequential"}
    expected = [make_plan(dataset, **changes).step_units(step) for step in range(40)]
    plan = make_plan(dataset, **changes)
    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(plan.step_units, range(40)))
    for ours, theirs in zip(found, expected, strict=True):
        assert [unit.tolist() for unit in ours] == [unit.tolist() for unit in theirs]
