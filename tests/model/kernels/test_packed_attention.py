"""What the kernels can be asked for; needs Triton, which comes with torch for GPUs."""

import pytest
import torch

from mtrain.model.flash import FlashArguments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCALE = 0.11


def test_what_is_not_supported_is_told():
    from mtrain.model.kernels.packed_attention import supports

    def answer(group_size=4, head_dim=128, v_channels=None, dtype=torch.bfloat16, **arguments):
        query = torch.empty(8, 2 * group_size, head_dim, dtype=dtype)
        key = torch.empty(8, 2, head_dim, dtype=dtype)
        value = torch.empty(8, 2, v_channels or head_dim, dtype=dtype)
        told = {"scale": SCALE, "window": None, "longest": 8, **arguments}
        return supports(query, key, value, FlashArguments(**told))

    assert all(answer(group_size) for group_size in (1, 2, 4, 8, 16))
    assert answer(head_dim=64)
    assert answer(dtype=torch.float16)
    assert not any(answer(group_size) for group_size in (3, 5, 6, 7, 12, 32))
    assert not answer(head_dim=96)
    assert not answer(head_dim=256)
    assert not answer(v_channels=64)
    assert not answer(dtype=torch.float32)
    assert not answer(window=16)
    assert not answer(scale=-1.0)
