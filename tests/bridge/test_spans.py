from itertools import pairwise

import pytest

from mtrain.bridge.spans import Span, box_shape, box_size, clip, whole


def positions(span: Span) -> list[int]:
    return [span.start + i * span.step + j for i in range(span.count) for j in range(span.size)]


def test_a_repeating_span_lists_its_runs():
    span = Span(0, 2, 3, 5)
    assert positions(span) == [0, 1, 5, 6, 10, 11]
    assert (span.length, span.extent) == (6, 12)
    assert positions(span.shifted(3)) == [3, 4, 8, 9, 13, 14]
    assert span.runs == (Span(0, 2), Span(5, 2), Span(10, 2))


def test_whole_covers_a_shape():
    assert box_shape(whole((3, 4))) == (3, 4)
    assert box_size(whole((3, 4))) == 12
    assert box_size(whole(())) == 1


@pytest.mark.parametrize("start", range(0, 14, 3))
@pytest.mark.parametrize("stop", range(16))
def test_clip_keeps_matching_positions_together(start, stop):
    kept, other = Span(1, 3, 3, 5), Span(100, 3, 3, 7)
    expected = [
        (ours, theirs)
        for ours, theirs in zip(positions(kept), positions(other), strict=True)
        if start <= ours < stop
    ]
    pairs = clip(kept, other, start=start, stop=stop)
    found = [
        pair
        for ours, theirs in pairs
        for pair in zip(positions(ours), positions(theirs), strict=True)
    ]
    assert found == expected
    assert len(pairs) <= 3


def test_clip_of_whole_runs_stays_one_span():
    assert clip(Span(0, 2, 8, 6), Span(0, 2, 8, 2), start=6, stop=30) == [
        (Span(6, 2, 4, 6), Span(2, 2, 4, 2))
    ]


def test_clips_side_by_side_keep_everything():
    span = Span(0, 4, 5, 9)
    found = [
        position
        for start, stop in pairwise([0, 2, 11, 12, 30, 45])
        for ours, _ in clip(span, Span(0, 4, 5, 4), start=start, stop=stop)
        for position in positions(ours)
    ]
    assert found == positions(span)
