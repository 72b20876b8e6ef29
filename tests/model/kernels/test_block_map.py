"""The map of blocks against a list of them; needs a GPU."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Documents of no and one token, at edges of blocks, long ones, and many.
PACKS = [
    [1],
    [1, 1, 2, 3, 1],
    [16, 32, 64, 128, 256],
    [15, 17, 31, 33, 63, 65, 127, 129, 1],
    [5, 0, 1037, 0],
    [39, 66, 161, 286, 426, 1170, 77],
    [3] * 1000,
]


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("block_tokens", [4, 64])
@pytest.mark.parametrize("lengths", PACKS)
def test_every_token_is_in_one_block_and_long_work_comes_first(lengths, block_tokens, of_keys):
    from mtrain.model.kernels.block_map import block_map

    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    blocks = block_map(ends, sum(lengths), block_tokens, of_keys=of_keys)
    assert blocks.dtype == torch.int32
    assert len(blocks) == sum(lengths) // block_tokens + len(lengths)
    begins = ends.tolist()
    expected = {
        (begin, length, first)
        for begin, length in zip(begins, lengths, strict=False)
        for first in range(0, length, block_tokens)
    }
    found = [tuple(row) for row in blocks[:, :3].tolist()]
    used = found[: len(expected)]
    assert set(used) == expected
    assert all(length == first == 0 for _, length, first in found[len(expected) :])
    spaced = {row[0]: row[3] for row in blocks[: len(expected)].tolist()}
    assert all(place % 4 == 0 for place in spaced.values())
    after = 0
    for begin, length in zip(begins, lengths, strict=False):
        if length > 0:
            assert spaced[begin] >= after
            after = spaced[begin] + length
    assert after <= sum(lengths) + 4 * len(lengths)
    work = [length - first if of_keys else first for _, length, first in used]
    assert work == sorted(work, reverse=True)
