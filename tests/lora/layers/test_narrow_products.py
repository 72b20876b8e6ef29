"""Products of a wide and a narrow tensor against float64; needs a GPU."""

import pytest
import torch

from tests.lora.layers import test_low_rank_kernels as shared
from tests.lora.layers.test_low_rank_kernels import (
    COUNTS,
    ROUNDING,
    ends_of,
    product,
    random,
    relative,
)

pytestmark = shared.pytestmark
# Rank and width of the other side.
SIZES = [(3, 40), (48, 320), (80, 136)]
DTYPE = torch.bfloat16


@pytest.fixture
def small_chunks(monkeypatch):
    """Fewer rows than some experts have, more than others have."""
    monkeypatch.setattr("mtrain.lora.layers.narrow_products._CHUNK", 128)


def gradient(wide, narrow, counts):
    """In float64, expert by expert."""
    experts = zip(wide.double().split(counts), narrow.double().split(counts), strict=True)
    return torch.stack([rows.t() @ low for rows, low in experts])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("rank", "width"), SIZES)
def test_product_is_that_of_float64(counts, rank, width, is_transposed):
    from mtrain.lora.layers.narrow_products import narrow_product

    torch.manual_seed(0)
    wide = random(sum(counts), width, dtype=DTYPE)
    factor = random(len(counts), width, rank, dtype=DTYPE)
    if is_transposed:
        factor = factor.transpose(-1, -2).contiguous().transpose(-1, -2)
    found = narrow_product(wide, factor, ends_of(counts), scale=1.5)
    assert found.dtype == DTYPE
    assert relative(found, 1.5 * product(wide, factor, counts)) < ROUNDING[DTYPE]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("rank", "width"), SIZES)
@pytest.mark.usefixtures("small_chunks")
def test_gradient_is_that_of_float64(counts, rank, width):
    """Zero for experts without rows, whatever was in memory."""
    from mtrain.lora.layers.narrow_products import factor_gradient

    torch.manual_seed(0)
    num_rows = sum(counts)
    wide, narrow = random(num_rows, width, dtype=DTYPE), random(num_rows, rank, dtype=DTYPE)
    found = factor_gradient(wide, narrow, ends_of(counts), dtype=torch.float32)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert relative(found.mT, gradient(wide, narrow, counts)) < ROUNDING[torch.float32]
    for of_expert, count in zip(found, counts, strict=True):
        assert count > 0 or not of_expert.any()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("rank", "width"), SIZES)
@pytest.mark.usefixtures("small_chunks")
def test_both_at_once_are_those_of_float64(counts, rank, width):
    from mtrain.lora.layers.narrow_products import product_and_gradient

    torch.manual_seed(0)
    num_rows = sum(counts)
    wide, narrow = random(num_rows, width, dtype=DTYPE), random(num_rows, rank, dtype=DTYPE)
    factor = random(len(counts), width, rank, dtype=DTYPE)
    options = {"scale": 1.5, "dtype": DTYPE}
    found, found_gradient = product_and_gradient(wide, factor, narrow, ends_of(counts), **options)
    assert found.dtype == found_gradient.dtype == DTYPE
    assert relative(found, 1.5 * product(wide, factor, counts)) < ROUNDING[DTYPE]
    assert relative(found_gradient, gradient(wide, narrow, counts)) < ROUNDING[DTYPE]


def test_the_same_every_time():
    from mtrain.lora.layers.narrow_products import product_and_gradient

    wide, factor = random(5000, 1536, dtype=DTYPE), random(3, 1536, 32, dtype=DTYPE)
    narrow, ends = random(5000, 32, dtype=DTYPE), ends_of((4900, 0, 100))
    options = {"scale": 1.0, "dtype": DTYPE}
    first, second = (product_and_gradient(wide, factor, narrow, ends, **options) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_there_may_be_no_rows():
    from mtrain.lora.layers.narrow_products import product_and_gradient

    wide, narrow = random(0, 64, dtype=DTYPE), random(0, 8, dtype=DTYPE)
    factor, ends = random(2, 64, 8, dtype=DTYPE), ends_of((0, 0))
    options = {"scale": 1.0, "dtype": DTYPE}
    found, found_gradient = product_and_gradient(wide, factor, narrow, ends, **options)
    assert found.shape == (0, 8)
    assert found_gradient.shape == (2, 64, 8) and not found_gradient.any()
