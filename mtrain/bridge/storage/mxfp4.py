"""4-bit floats in blocks of 32 that share an exponent, read as bfloat16.

The one thing to know: blocks run along the rows of `[out, in]`, and the tensor is shown transposed,
`[in, out]`, because that is how gpt-oss has its experts when they are not quantised.
Source: transformers' `convert_moe_packed_tensors`; the OCP Microscaling Formats specification.
"""

from __future__ import annotations

from typing import Any

import torch

from mtrain.bridge.storage.bounds import bounds_of, slices_of

_SIZE = 32
_BIAS = 127
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Mxfp4Slices:
    """Stacked matrices in 4-bit floats, in bfloat16; parts are computed when asked for.

    Args:
        blocks: Gives parts of the values: uint8 `[..., out, blocks, 16]`, the lower half of a byte
            first.
        scales: Gives parts of the exponents: uint8 `[..., out, blocks]`.
        shape: Shape of what is shown: `[..., in, out]`.
    """

    def __init__(self, blocks: Any, scales: Any, shape: tuple[int, ...]) -> None:
        self._blocks, self._scales, self._shape = blocks, scales, shape

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The part; of a row no more than the blocks that it touches is read."""
        *stacked, (start, stop), rows = bounds_of(key, self._shape)
        first, last = start // _SIZE, -(-stop // _SIZE)
        stored = slices_of((*stacked, rows, (first, last)))
        values = unpacked(self._blocks[stored], self._scales[stored])
        offset = start - first * _SIZE
        return values[..., offset : offset + stop - start].transpose(-1, -2)


def unpacked(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of blocks one after the other.

    Args:
        blocks: uint8 `[..., blocks, 16]`.
        scales: uint8 `[..., blocks]`.

    Returns:
        bfloat16 `[..., blocks * 32]`.
    """
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
    halves = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1)
    values = table[halves.flatten(-2).int()]
    scaled = torch.ldexp(values, scales.to(torch.int32).unsqueeze(-1) - _BIAS)
    return scaled.to(torch.bfloat16).flatten(-2)
