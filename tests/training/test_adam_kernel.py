"""The kernel beside torch's update; needs a GPU."""

import pytest
import torch

from tests.training.test_adam import KINDS, remembered, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [None, 0.25])
def test_the_kernel_updates_as_torch_does(dtype, gradient_dtype, moments, factor):
    options = {
        "factor": factor,
        "gradient_dtype": gradient_dtype,
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
    }
    parameters, optimizer = trained(dtype, device="cuda", **options)
    expected = remembered(*trained(dtype, **options))
    found = remembered(parameters, optimizer)
    # A moment that is rounded the other way is half a percent away, and moves the weight by less.
    allowed = 1e-6 if moments == torch.float32 else 1e-2
    for kind in KINDS:
        ours, theirs = found[kind].cpu(), expected[kind]
        torch.testing.assert_close(ours, theirs, rtol=allowed, atol=allowed * theirs.abs().max())


def test_a_step_allocates_nothing_as_large_as_a_parameter():
    parameter = torch.zeros(1 << 24, device="cuda", dtype=torch.bfloat16)
    parameters, optimizer = [parameter], None
    from tests.training.test_adam import optimizer_of

    optimizer = optimizer_of(
        parameters, exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16
    )
    parameter.decoupled_grad = torch.ones_like(parameter, dtype=torch.float32)
    optimizer.step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_a_table_is_made_again_only_when_something_moved():
    parameters, optimizer = trained(torch.bfloat16, device="cuda")
    [table] = optimizer._tables.values()
    optimizer.step()
    assert next(iter(optimizer._tables.values())) is table
    parameters[0].decoupled_grad = parameters[0].decoupled_grad.clone()
    optimizer.step()
    assert next(iter(optimizer._tables.values())) is not table
