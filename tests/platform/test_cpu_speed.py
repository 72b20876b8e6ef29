import pytest
import torch
import torch.nn.functional as F

from mtrain.platform.cpu_speed import _unless_alone, keep_freed_memory, swiglu_gradient


@pytest.mark.parametrize("grad_dtype", [torch.float64, torch.float32])
def test_gradient_of_swiglu_is_the_one_of_the_formula(grad_dtype):
    torch.manual_seed(0)
    hidden = torch.randn(5, 2, 24, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 2, 12, dtype=grad_dtype)
    gate, up = hidden.chunk(2, dim=-1)
    (F.silu(gate) * up).backward(grad.double())
    result = swiglu_gradient(grad, hidden.detach())
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, hidden.grad, rtol=1e-12, atol=1e-12)


def test_freed_memory_can_be_kept_more_than_once():
    keep_freed_memory()
    keep_freed_memory()
    assert torch.zeros(2**24).sum() == 0


class Group:
    def __init__(self, size):
        self.members = size

    def size(self):
        return self.members


@pytest.mark.parametrize(
    ("size", "is_in_place", "options", "is_called"),
    [
        (1, True, {}, False),
        (1, True, {"async_op": False}, False),
        (1, True, {"async_op": True}, True),
        (1, False, {}, True),
        (2, True, {}, True),
    ],
)
def test_only_a_collective_in_place_without_others_is_left_out(
    size, is_in_place, options, is_called
):
    calls = []
    collective = _unless_alone(lambda *_args, **_options: calls.append(1))
    own = torch.ones(3)
    collective(own if is_in_place else torch.ones(3), own, group=Group(size), **options)
    assert bool(calls) == is_called
