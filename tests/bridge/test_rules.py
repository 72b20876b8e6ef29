"""The layouts against the formulas of Megatron-Core, with numpy as the judge."""

import numpy as np
import pytest

from mtrain.bridge.rules import (
    Concatenated,
    Interleaved,
    Padded,
    Regrouped,
    Selected,
    Spaced,
    divided,
)
from mtrain.bridge.spans import Span


def apply(layout, sources, *, num_shards, index):
    """Runs a layout forwards: one row index at a time, on purpose."""
    num_rows, rows = layout.shard(
        tuple(len(source) for source in sources), num_shards=num_shards, index=index
    )
    shard = np.zeros((num_rows, *sources[0].shape[1:]), dtype=int)
    for part in rows:
        for repeat in range(part.hf.count):
            for offset in range(part.hf.size):
                theirs = part.hf.start + repeat * part.hf.step + offset
                ours = part.local.start + repeat * part.local.step + offset
                assert not shard[ours].any(), "a row is filled twice"
                shard[ours] = sources[part.source][theirs]
    return shard


def numbered(*num_rows):
    """Tensors [rows, 1] in which every row has a number of its own, from 1."""
    ends = np.cumsum(num_rows)
    return [np.arange(end - n + 1, end + 1)[:, None] for n, end in zip(num_rows, ends, strict=True)]


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_one_source_is_cut_into_equal_parts(num_shards):
    (source,) = numbered(8)
    shards = [
        apply(Concatenated(), [source], num_shards=num_shards, index=i) for i in range(num_shards)
    ]
    np.testing.assert_array_equal(np.concatenate(shards), source)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_gate_and_up_are_cut_before_they_are_joined(num_shards):
    gate, up = numbered(6, 6)
    for index in range(num_shards):
        expected = np.concatenate(
            [np.split(gate, num_shards)[index], np.split(up, num_shards)[index]]
        )
        shard = apply(Concatenated(), [gate, up], num_shards=num_shards, index=index)
        np.testing.assert_array_equal(shard, expected)


@pytest.mark.parametrize(
    ("num_heads", "num_groups", "head_dim", "num_shards"),
    [
        (8, 2, 4, 1),
        (8, 2, 4, 2),
        (8, 2, 4, 4),
        (8, 2, 4, 8),
        (4, 4, 2, 2),
        (6, 1, 2, 4),
        (8, 1, 6, 4),
    ],
)
def test_query_key_value_rows_are_those_of_megatron(num_heads, num_groups, head_dim, num_shards):
    """T24: also with more shards than groups, where a shard begins inside a head."""
    query, key, value = numbered(num_heads * head_dim, num_groups * head_dim, num_groups * head_dim)
    fused = np.concatenate(
        [
            query.reshape(num_groups, num_heads // num_groups * head_dim, 1),
            key.reshape(num_groups, head_dim, 1),
            value.reshape(num_groups, head_dim, 1),
        ],
        axis=1,
    ).reshape(-1, 1)
    for index, expected in enumerate(np.split(fused, num_shards)):
        shard = apply(
            Interleaved(num_groups), [query, key, value], num_shards=num_shards, index=index
        )
        np.testing.assert_array_equal(shard, expected)


def test_query_key_value_take_few_copies_whatever_the_number_of_groups():
    _, rows = Interleaved(32).shard((4096, 4096, 4096), num_shards=1, index=0)
    assert len(rows) == 3
    _, rows = Interleaved(32).shard((4096, 4096, 4096), num_shards=64, index=5)
    assert len(rows) <= 5


@pytest.mark.parametrize(("num_rows", "num_shards"), [(131, 1), (131, 2), (131, 4), (5, 4), (8, 4)])
def test_padding_adds_zeros_at_the_end_and_no_more_than_needed(num_rows, num_shards):
    (source,) = numbered(num_rows)
    shards = [apply(Padded(), [source], num_shards=num_shards, index=i) for i in range(num_shards)]
    together = np.concatenate(shards)
    assert len({len(shard) for shard in shards}) == 1
    assert len(together) - num_rows < num_shards
    np.testing.assert_array_equal(together[:num_rows], source)
    assert not together[num_rows:].any()


def test_spaced_sources_begin_at_multiples_of_the_size():
    first, second, third = numbered(2, 3, 1)
    shard = apply(Spaced(3), [first, second, third], num_shards=1, index=0)
    expected = np.zeros((9, 1), dtype=int)
    expected[0:2], expected[3:6], expected[6:7] = first, second, third
    np.testing.assert_array_equal(shard, expected)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("sources", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("layout", [Interleaved(2), Concatenated()], ids=str)
def test_selected_sources_lie_where_they_would_among_all(layout, sources, num_shards):
    everything = numbered(16, 8, 8)
    absent = [source if index in sources else source * 0 for index, source in enumerate(everything)]
    selected = Selected(layout, num_rows=(16, 8, 8), sources=sources)
    for index in range(num_shards):
        where = {"num_shards": num_shards, "index": index}
        shard = apply(selected, [everything[source] for source in sources], **where)
        np.testing.assert_array_equal(shard, apply(layout, absent, **where))


def test_a_shard_may_have_nothing_of_the_selected_sources():
    # Four shards of two groups: every other shard holds queries alone.
    keys = Selected(Interleaved(2), num_rows=(16, 4, 4), sources=(1,))
    assert keys.shard((4,), num_shards=4, index=0) == (6, ())
    assert len(keys.shard((4,), num_shards=4, index=1)[1]) == 1


def test_selected_padding_keeps_the_padding():
    (source,) = numbered(5)
    for index in range(4):
        selected = Selected(Padded(), num_rows=(5,), sources=(0,))
        shard = apply(selected, [source], num_shards=4, index=index)
        np.testing.assert_array_equal(shard, apply(Padded(), [source], num_shards=4, index=index))


def test_rows_that_do_not_divide_are_refused():
    assert divided(12, 4) == 3
    with pytest.raises(ValueError, match="10 rows or columns cannot be split into 4 equal parts"):
        Concatenated().shard((10,), num_shards=4, index=0)
    with pytest.raises(ValueError, match="equal parts"):
        Interleaved(2).shard((12, 4, 4), num_shards=3, index=0)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 6])
def test_parts_of_one_tensor_are_arranged_like_tensors_of_their_own(num_shards):
    """Queries, keys and values in one tensor (Phi-3): 6 heads of 2 rows in 3 groups."""
    query, key, value = numbered(12, 6, 6)
    parts = tuple((0, Span(start, size)) for start, size in ((0, 12), (12, 6), (18, 6)))
    fused = Regrouped(Interleaved(3), parts)
    for index in range(num_shards):
        alone = apply(Interleaved(3), [query, key, value], num_shards=num_shards, index=index)
        together = np.concatenate([query, key, value])
        np.testing.assert_array_equal(
            apply(fused, [together], num_shards=num_shards, index=index), alone
        )


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_a_query_and_a_gate_for_each_head_are_taken_apart(num_shards):
    """4 heads of 3 rows in 2 groups: Megatron-Core has all queries of a group, then its gates."""
    both, key, value = numbered(24, 6, 6)
    heads = both.reshape(4, 2, 3, 1)
    queries, gates = heads[:, 0].reshape(12, 1), heads[:, 1].reshape(12, 1)
    parts = ((0, Span(0, 3, 4, 6)), (0, Span(3, 3, 4, 6)), (1, Span(0, 6)), (2, Span(0, 6)))
    for index in range(num_shards):
        np.testing.assert_array_equal(
            apply(
                Regrouped(Interleaved(2), parts),
                [both, key, value],
                num_shards=num_shards,
                index=index,
            ),
            apply(Interleaved(2), [queries, gates, key, value], num_shards=num_shards, index=index),
        )


def test_parts_that_leave_rows_out_are_a_bug():
    with pytest.raises(AssertionError, match="rows left over"):
        Regrouped(Concatenated(), ((0, Span(0, 3)),)).shard((4,), num_shards=1, index=0)
