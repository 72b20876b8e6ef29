import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mtrain.bridge.storage.mxfp4 import Mxfp4Slices, unpacked


def random_experts(num_experts=3, rows=10, num_blocks=4):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(
        0, 256, (num_experts, rows, num_blocks, 16), generator=generator, dtype=torch.uint8
    )
    scales = torch.randint(
        100, 140, (num_experts, rows, num_blocks), generator=generator, dtype=torch.uint8
    )
    return blocks, scales


def test_values_are_those_of_transformers():
    blocks, scales = random_experts()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    ours = Mxfp4Slices(blocks, scales, (3, 128, 10))[:]
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


def test_every_byte_and_every_exponent_is_that_of_transformers():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    ours = unpacked(blocks, scales).transpose(1, 2)
    assert torch.equal(ours.contiguous().view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(
    "key",
    [
        slice(1, 2),
        slice(2, 2),
        (slice(0, 2), slice(5, 70)),
        (slice(None), slice(33, 34), slice(2, 9)),
        (slice(1, 2), slice(None), slice(4, 4)),
    ],
    ids=str,
)
def test_parts_are_those_of_the_whole(key):
    blocks, scales = random_experts()
    slices = Mxfp4Slices(blocks, scales, (3, 128, 10))
    assert torch.equal(slices[key], slices[:][key])
