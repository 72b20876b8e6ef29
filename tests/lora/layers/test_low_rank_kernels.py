"""What adapters add to all experts' outputs in one kernel, against float64; needs a GPU."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
# Rows of each expert.
COUNTS = {
    "uneven": (70, 0, 1, 129, 0),
    "one_has_most": (3, 200, 0, 0, 1),
    "first_and_last_have_none": (0, 64, 128, 64, 0),
    "one": (150,),
}
# How far rounding once is from float64, as a share of the norm.
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def random(*shape, dtype):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def ends_of(counts):
    return torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)


def product(rows, factor, counts):
    """In float64, expert by expert."""
    experts = zip(rows.double().split(counts), factor.double(), strict=True)
    return torch.cat([own @ one for own, one in experts])


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("rank", "width", "has_mask", "is_transposed", "dtype"),
    [
        (3, 40, False, True, torch.bfloat16),
        (16, 320, True, False, torch.bfloat16),
        (32, 320, False, True, torch.float16),
        (80, 136, True, True, torch.bfloat16),
    ],
)
def test_rows_get_the_product_with_the_factor_of_their_expert(
    counts, rank, width, has_mask, is_transposed, dtype
):
    from mtrain.lora.layers.low_rank_kernels import add_low_rank

    torch.manual_seed(0)
    num_rows = sum(counts)
    output = random(num_rows, width, dtype=dtype)
    low_rank = random(num_rows, rank, dtype=dtype)
    factor = random(len(counts), rank, width, dtype=dtype)
    if is_transposed:
        factor = factor.transpose(-1, -2).contiguous().transpose(-1, -2)
    mask = random(num_rows, width, dtype=dtype) > -0.5 if has_mask else None
    delta = 1.5 * product(low_rank, factor, counts)
    expected = output.double() + (delta * mask if has_mask else delta)
    add_low_rank(output, low_rank, factor, ends_of(counts), mask=mask, scale=1.5)
    assert relative(output, expected) < ROUNDING[dtype]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_with_a_factor_of_zero_the_output_keeps_its_bits(counts):
    from mtrain.lora.layers.low_rank_kernels import add_low_rank

    num_rows = sum(counts)
    output = random(num_rows, 136, dtype=torch.bfloat16)
    expected = output.clone()
    low_rank = random(num_rows, 16, dtype=torch.bfloat16)
    factor = torch.zeros(len(counts), 16, 136, device=DEVICE, dtype=torch.bfloat16)
    add_low_rank(output, low_rank, factor, ends_of(counts), scale=2.0)
    assert torch.equal(output, expected)


def test_rows_may_lie_apart():
    """As torch's grouped product leaves them where a row has no multiple of 16 bytes."""
    from mtrain.lora.layers.low_rank_kernels import add_low_rank

    torch.manual_seed(0)
    output, low_rank = random(70, 64, dtype=torch.bfloat16), random(70, 32, dtype=torch.bfloat16)
    factor = random(2, 20, 37, dtype=torch.bfloat16)
    expected = output.double()
    expected[:, :37] += product(low_rank[:, :20], factor, (30, 40))
    add_low_rank(output[:, :37], low_rank[:, :20], factor, ends_of((30, 40)))
    assert relative(output, expected) < ROUNDING[torch.bfloat16]
    assert torch.equal(output[:, 37:].double(), expected[:, 37:])


def test_there_may_be_no_rows():
    from mtrain.lora.layers.low_rank_kernels import add_low_rank

    output, low_rank = random(0, 64, dtype=torch.bfloat16), random(0, 8, dtype=torch.bfloat16)
    add_low_rank(output, low_rank, random(2, 8, 64, dtype=torch.bfloat16), ends_of((0, 0)))


def test_many_experts_with_few_rows_each():
    from mtrain.lora.layers.low_rank_kernels import add_low_rank

    torch.manual_seed(0)
    counts = tuple(torch.randint(0, 4, (100,)).tolist())
    num_rows = sum(counts)
    output = random(num_rows, 64, dtype=torch.bfloat16)
    low_rank = random(num_rows, 8, dtype=torch.bfloat16)
    factor = random(len(counts), 8, 64, dtype=torch.bfloat16)
    expected = output.double() + product(low_rank, factor, counts)
    add_low_rank(output, low_rank, factor, ends_of(counts))
    assert relative(output, expected) < ROUNDING[torch.bfloat16]
