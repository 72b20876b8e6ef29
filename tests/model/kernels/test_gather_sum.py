"""Sums of rows against float64; needs a GPU."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "summands", "hidden"), [(13, 3, 2100), (5, 8, 64), (0, 2, 64)])
def test_rows_of_a_token_are_added_up_in_float32(dtype, tokens, summands, hidden):
    from mtrain.model.kernels.gather_sum import gather_sum

    torch.manual_seed(0)
    rows = torch.randn(tokens * summands, hidden, device="cuda", dtype=dtype)
    places = torch.randperm(tokens * summands, device="cuda").view(tokens, summands)
    output = gather_sum(rows, places)
    expected = rows.double()[places].sum(dim=1)
    assert output.shape == (tokens, hidden)
    allowed = 1e-6 if dtype == torch.float32 else 4e-3
    assert (output.double() - expected).norm() <= allowed * expected.norm()
    assert torch.equal(output, gather_sum(rows, places))
