"""Heads in three parts, in and out of memory unchanged; needs a GPU."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("head_dim", "dim"), [(128, 128), (128, 64), (96, 96), (80, 20)])
def test_every_channel_is_moved_and_no_other(head_dim, dim):
    from mtrain.model.kernels.query_key_value import split_norm_rotate

    # Turning by nothing is a copy of all three parts.
    angles = torch.stack([torch.ones(19, 1, 1, dim), torch.zeros(19, 1, 1, dim)]).cuda()
    mixed = torch.randn(19, 1, 2 * 4 * head_dim, device="cuda")
    query, key, value = split_norm_rotate(
        mixed, angles, None, None, num_groups=2, queries_per_group=2, head_dim=head_dim
    )
    heads = mixed.view(19, 1, 2, 4, head_dim)
    assert torch.equal(query, heads[:, :, :, :2].reshape(19, 1, 4, head_dim))
    assert torch.equal(key, heads[:, :, :, 2])
    assert torch.equal(value, heads[:, :, :, 3])
