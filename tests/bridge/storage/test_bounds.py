import pytest
import torch

from mtrain.bridge.storage.bounds import bounds_of, slices_of, within

KEYS = [
    slice(None),
    slice(2, 5),
    slice(3, 99),
    slice(4, 2),
    (slice(1, 3), slice(2, None)),
    (slice(None), slice(None), slice(0, 1)),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_the_numbers_ask_for_what_the_key_asks_for(key):
    tensor = torch.arange(6 * 4 * 3).view(6, 4, 3)
    bounds = bounds_of(key, (6, 4, 3))
    assert torch.equal(tensor[slices_of(bounds)], tensor[key])
    assert all(0 <= start <= stop for start, stop in bounds)


def test_a_tensor_without_axes_has_no_bounds():
    assert bounds_of(slice(0, 1), ()) == ()


def test_a_part_of_a_part_is_counted_from_its_corner():
    tensor = torch.arange(48).view(6, 8)
    outer, inner = ((1, 6), (2, 8)), ((2, 4), (5, 7))
    assert torch.equal(tensor[slices_of(outer)][within(inner, outer)], tensor[slices_of(inner)])


def test_steps_and_axes_that_are_not_there_are_bugs_of_the_caller():
    with pytest.raises(AssertionError, match="without gaps"):
        bounds_of(slice(0, 6, 2), (6,))
    with pytest.raises(AssertionError, match="of a tensor of shape"):
        bounds_of((slice(None), slice(None)), (6,))
