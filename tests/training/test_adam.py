"""The update rule: torch's AdamW in float32, whatever the parameters and moments are kept in."""

import pytest
import torch

from mtrain.training.adam import MAIN, AdamW, join_halves, split_halves

BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-8, 1e-2, 0.1
SHAPES = ((3, 5), (1,), (70, 40))
KINDS = (MAIN, "exp_avg", "exp_avg_sq")


def optimizer_of(parameters, **options):
    group = {"params": parameters, "lr": LR, "weight_decay": DECAY}
    return AdamW([group], betas=BETAS, eps=EPS, **options)


def trained(
    dtype,
    *,
    device="cpu",
    steps=3,
    factor=None,
    gradient_dtype=torch.float32,
    locates=False,
    **options,
):
    """Parameters and optimizer after some steps from the same start with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    parameters = [start.to(device, dtype) for start in starts]
    optimizer = optimizer_of(parameters, **options)
    for _ in range(steps):
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator).to(gradient_dtype)
            parameter.decoupled_grad = gradient.to(device)
        optimizer.gradient_factor = None if factor is None else torch.tensor(factor, device=device)
        if locates:
            optimizer.locate()
        optimizer.step()
    return parameters, optimizer


def remembered(parameters, optimizer):
    return {
        kind: torch.cat([optimizer.read(parameter, kind) for parameter in parameters])
        for kind in KINDS
    }


@pytest.mark.parametrize("factor", [None, 0.25])
def test_float32_is_updated_as_torch_does(factor):
    parameters, _ = trained(torch.float32, factor=factor)
    generator = torch.Generator().manual_seed(0)
    expected = [torch.randn(shape, generator=generator).bfloat16().float() for shape in SHAPES]
    theirs = torch.optim.AdamW(expected, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for _ in range(3):
        for one in expected:
            one.grad = torch.randn(one.shape, generator=generator) * (factor or 1.0)
        theirs.step()
    for ours, one in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-6, atol=1e-7)


def test_looking_everything_up_beforehand_changes_nothing():
    at_once, before = (trained(torch.bfloat16, locates=locates) for locates in (False, True))
    assert [group["step"] for group in before[1].param_groups] == [3]
    for one, other in zip(at_once[0], before[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_nothing(dtype):
    """Main parameters and moments are those of a float32 run, bit for bit."""
    wide = remembered(*trained(torch.float32))
    parameters, optimizer = trained(dtype)
    narrow = remembered(parameters, optimizer)
    assert all(torch.equal(narrow[kind], wide[kind]) for kind in KINDS)
    rounded = wide[MAIN].to(dtype)
    assert torch.equal(torch.cat([one.flatten() for one in parameters]), rounded)


def test_a_bfloat16_parameter_needs_two_bytes_more():
    _, optimizer = trained(torch.bfloat16, exp_avg_dtype=torch.bfloat16)
    sizes = {
        name: tensor.element_size()
        for state in optimizer.state.values()
        for name, tensor in state.items()
    }
    assert sizes == {"exp_avg": 2, "exp_avg_sq": 4, "remainder": 2}


def test_moments_are_rounded_after_the_update():
    _, wide = trained(torch.float32, steps=1)
    _, narrow = trained(
        torch.float32, steps=1, exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16
    )
    for one, other in zip(wide.state.values(), narrow.state.values(), strict=True):
        for kind in ("exp_avg", "exp_avg_sq"):
            assert other[kind].dtype == torch.bfloat16
            assert torch.equal(other[kind], one[kind].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read(dtype):
    parameter = torch.zeros(300, dtype=dtype)
    optimizer = optimizer_of([parameter])
    for kind in KINDS:
        values = torch.randn(300)
        optimizer.write(parameter, kind, values)
        assert torch.equal(optimizer.read(parameter, kind), values)
        if kind == MAIN:
            assert torch.equal(parameter, values.to(dtype))


def test_a_parameter_without_a_gradient_stays():
    parameters = [torch.ones(2), torch.ones(2)]
    optimizer = optimizer_of(parameters)
    parameters[0].decoupled_grad = torch.ones(2)
    optimizer.step()
    assert parameters[0].max() < 1
    assert torch.equal(parameters[1], torch.ones(2))


def test_halves_are_put_together_again():
    """All upper halves of finite numbers with lower ones on both sides of a tie."""
    upper_bits = torch.arange(2**16, dtype=torch.int32) << 16
    lower_bits = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (upper_bits[:, None] | lower_bits).view(torch.float32)
    values = values[values.bfloat16().isfinite() & values.isfinite()]
    upper, lower = values.bfloat16(), torch.empty_like(values, dtype=torch.int16)
    nearest = upper.clone()
    split_halves(values, upper=upper, lower=lower)
    assert torch.equal(join_halves(upper, lower).view(torch.int32), values.view(torch.int32))
    # Ties go away from zero; everything else to the nearest.
    is_tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(upper[~is_tie], nearest[~is_tie])
    assert (upper.abs() >= values.abs())[is_tie].all()
