"""The kernel of the gated activation against the same maths in float64; needs a GPU."""

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_probs", [False, True])
@pytest.mark.parametrize("shape", [(5, 2, 2 * 3000), (33, 2 * 768), (0, 2 * 64)])
def test_swiglu(dtype, has_probs, shape):
    from mtrain.model.kernels.swiglu import swiglu

    torch.manual_seed(0)
    hidden = random(*shape, dtype=dtype).requires_grad_()
    probs = torch.rand(shape[:-1], device="cuda").requires_grad_() if has_probs else None
    output = swiglu(hidden, probs)
    exact = hidden.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    right = F.silu(gate) * up
    if has_probs:
        exact_probs = probs.detach().double().requires_grad_()
        right = right * exact_probs.unsqueeze(-1)
    grad = random(*output.shape, dtype=dtype)
    output.backward(grad)
    right.backward(grad.double())
    assert output.dtype == dtype
    assert output.shape == right.shape
    allowed = 1e-6 if dtype == torch.float32 else 6e-3
    assert (output.double() - right).norm() <= allowed * right.norm()
    assert (hidden.grad.double() - exact.grad).norm() <= allowed * exact.grad.norm()
    if has_probs:
        difference = (probs.grad.double() - exact_probs.grad).norm()
        assert difference <= 1e-5 * exact_probs.grad.norm()
