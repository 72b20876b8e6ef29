import time

import numpy as np
import pytest

from mtrain.data.packing import plan_packs, plan_singles


def plan(lengths, packing_length, *, strategy="binpack", shuffle=True, seed=0, epoch=0):
    return plan_packs(
        np.asarray(lengths, dtype=np.int32),
        packing_length=packing_length,
        strategy=strategy,
        shuffle=shuffle,
        seed=seed,
        epoch=epoch,
    )


def as_lists(units):
    return [units[index].tolist() for index in range(len(units))]


def random_lengths(seed):
    rng = np.random.default_rng(seed)
    limit = int(rng.integers(1, 200))
    return rng.integers(1, limit + 1, int(rng.integers(1, 300))), limit


@pytest.mark.parametrize("strategy", ["binpack", "sequential"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_is_packed_once_and_no_pack_overflows(strategy, shuffle):
    for seed in range(40):
        lengths, limit = random_lengths(seed)
        packs = as_lists(plan(lengths, limit, strategy=strategy, shuffle=shuffle, seed=seed))
        assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
        assert all(0 < sum(lengths[index] for index in pack) <= limit for pack in packs)


def test_binpack_leaves_no_room_for_another_pack():
    """A greedy plan never has two packs that would fit into one."""
    for seed in range(20):
        lengths, limit = random_lengths(seed)
        sums = sorted(sum(lengths[i] for i in pack) for pack in as_lists(plan(lengths, limit)))
        assert len(sums) < 2 or sums[0] + sums[1] > limit


def test_sequential_without_shuffle_keeps_the_order():
    assert as_lists(plan([3, 3, 3, 5, 1, 6], 6, strategy="sequential", shuffle=False)) == [
        [0, 1],
        [2],
        [3, 4],
        [5],
    ]


def test_binpack_without_shuffle_starts_with_the_first_samples():
    packs = as_lists(plan([2, 9, 3, 9, 9], 10, shuffle=False))
    assert [min(pack) for pack in packs] == [0, 1, 3, 4]


@pytest.mark.parametrize("strategy", ["binpack", "sequential"])
def test_the_plan_depends_on_seed_and_epoch_alone(strategy):
    lengths, limit = np.random.default_rng(0).integers(1, 30, 200), 64
    first = as_lists(plan(lengths, limit, strategy=strategy))
    assert as_lists(plan(lengths, limit, strategy=strategy)) == first
    assert as_lists(plan(lengths, limit, strategy=strategy, epoch=1)) != first
    assert as_lists(plan(lengths, limit, strategy=strategy, seed=1)) != first


def test_epochs_mix_samples_differently():
    lengths = np.full(100, 5)
    packs = [{frozenset(pack) for pack in as_lists(plan(lengths, 10, epoch=e))} for e in (0, 1)]
    assert len(packs[0] & packs[1]) < 10


def test_chat_lengths_fill_packs_of_8192_in_no_time():
    lengths = np.random.default_rng(0).lognormal(6.2, 0.9, 100_000).clip(8, 8192).astype(np.int32)
    started = time.process_time()
    units = plan(lengths, 8192)
    assert time.process_time() - started < 2
    assert lengths.sum() / (len(units) * 8192) > 0.999


def test_a_sample_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match=r"--packing_length 4 .* longest sample \(5 tokens\)"):
        plan([1, 5], 4)


def test_singles_are_a_permutation_or_the_order():
    assert as_lists(plan_singles(3, shuffle=False, seed=0, epoch=0)) == [[0], [1], [2]]
    shuffled = as_lists(plan_singles(50, shuffle=True, seed=0, epoch=0))
    assert shuffled != sorted(shuffled)
    assert sorted(shuffled) == [[index] for index in range(50)]
