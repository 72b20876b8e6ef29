"""8-bit floats with one factor for each block of a matrix, read and written.

The one thing to know: `w[i, j] = q[i, j] * scale[i // rows, j // columns]`, so any part of a matrix
can be computed from that part of `q` and the factors of the blocks that it touches. Blocks at the
right and lower edge may be smaller.
Source: transformers' `Fp8Dequantize` and `Fp8Quantize`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mtrain.bridge.storage.bounds import Bounds, bounds_of, slices_of, within
from mtrain.bridge.storage.quantization import Fp8Blocks

DTYPE = torch.float8_e4m3fn
MAX = torch.finfo(DTYPE).max
# Elements that are quantised at once: in float32 they take a few copies.
_NUM_AT_ONCE = 4 * 2**20


class Fp8Slices:
    """A quantised matrix, or stacked ones, in bfloat16; parts are computed when asked for.

    Args:
        values: Gives parts of the 8-bit floats `[..., rows, columns]`.
        scales: Gives parts of the factors `[..., blocks, blocks]`.
        shape: Shape of the values.
        blocks: What each factor is for.
    """

    def __init__(self, values: Any, scales: Any, shape: tuple[int, ...], blocks: Fp8Blocks) -> None:
        self._values, self._scales, self._shape, self._blocks = values, scales, shape, blocks

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The part: rounded once, to bfloat16."""
        bounds = bounds_of(key, self._shape)
        values = self._values[slices_of(bounds)]
        if not values.numel():
            return values.to(torch.bfloat16)
        scales = self._scales[slices_of(blocks_of(bounds, self._blocks))]
        return dequantized(values, _spread(scales, bounds, self._blocks))


class QuantizedSlices:
    """Values of any source as 8-bit floats, or the factors of those.

    A part is computed from whole blocks, so it does not depend on what else is asked for.

    Args:
        values: Gives parts of the values `[..., rows, columns]`.
        shape: Their shape.
        blocks: What each factor is for.
        kept: Gives parts of the factors that the values were read with; None where there are none.
        scale_dtype: Dtype of the factors.
        gives_scales: Whether parts of the factors are asked for, not of the 8-bit floats.
    """

    def __init__(
        self,
        values: Any,
        shape: tuple[int, ...],
        blocks: Fp8Blocks,
        *,
        kept: Any | None,
        scale_dtype: torch.dtype,
        gives_scales: bool,
    ) -> None:
        self._values, self._shape, self._blocks = values, shape, blocks
        self._kept, self._scale_dtype, self._gives_scales = kept, scale_dtype, gives_scales

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The part of the 8-bit floats, or of the factors."""
        if self._gives_scales:
            touched = bounds_of(key, self._blocks.scale_shape(self._shape))
        else:
            bounds = bounds_of(key, self._shape)
            touched = blocks_of(bounds, self._blocks)
        whole = _elements_of(touched, self._shape, self._blocks)
        kept = None if self._kept is None else self._kept[slices_of(touched)]
        quantized, scales = quantize(
            self._values[slices_of(whole)], self._blocks, kept=kept, scale_dtype=self._scale_dtype
        )
        return scales if self._gives_scales else quantized[within(bounds, whole)]


def quantize(
    values: torch.Tensor,
    blocks: Fp8Blocks,
    *,
    kept: torch.Tensor | None,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds matrices to 8-bit floats, each block with the factor that makes most use of them.

    A block that is what the factor in `kept` gives, to the last bit in bfloat16, keeps that factor
    and so the 8-bit floats that it was read from.

    Args:
        values: Floats `[..., rows, columns]`.
        blocks: What each factor is for.
        kept: Factors that the values may have been read with, `[..., blocks, blocks]`.
        scale_dtype: Dtype of the factors.

    Returns:
        float8_e4m3fn of the shape of the values, and the factors.
    """
    rows = values.shape[-2]
    quantized = torch.empty(values.shape, dtype=DTYPE)
    scales = torch.empty(blocks.scale_shape(tuple(values.shape)), dtype=scale_dtype)
    per_row = max(1, values.numel() // max(1, rows))
    blocks_at_once = max(1, _NUM_AT_ONCE // (per_row * blocks.rows))
    for first in range(0, scales.shape[-2], blocks_at_once):
        here = slice(first, first + blocks_at_once)
        part = slice(first * blocks.rows, min(rows, (first + blocks_at_once) * blocks.rows))
        quantized[..., part, :], scales[..., here, :] = _quantize_rows(
            values[..., part, :].float(),
            blocks,
            kept=None if kept is None else kept[..., here, :],
            scale_dtype=scale_dtype,
        )
    return quantized, scales


def _quantize_rows(
    values: torch.Tensor,
    blocks: Fp8Blocks,
    *,
    kept: torch.Tensor | None,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    *_, rows, columns = values.shape
    in_blocks = _in_blocks(values, blocks)
    largest = in_blocks.abs().amax(dim=(-3, -1))
    fresh = torch.where(largest > 0, largest / MAX, torch.ones_like(largest))
    if blocks.has_power_scales:
        fresh = torch.exp2(torch.ceil(torch.log2(fresh)))
    scales = fresh.to(scale_dtype)
    quantized = None
    if kept is not None:
        quantized = _rounded(in_blocks, kept)
        again = dequantized(quantized, _for_elements(kept)).float()
        changed = (again != in_blocks).any(dim=-1).any(dim=-2)
        # Not every dtype of factors can be chosen from.
        scales = torch.where(changed, scales.float(), kept.float()).to(scale_dtype)
        if changed.any():
            quantized = None
    if quantized is None:
        quantized = _rounded(in_blocks, scales)
    return _side_by_side(quantized)[..., :rows, :columns], scales


def dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The bfloat16 values of 8-bit floats, each with its factor."""
    # A table of all 8-bit floats: torch converts them one by one, which takes three times as long.
    every = torch.arange(256, dtype=torch.uint8).view(DTYPE).float()
    floats = every.index_select(0, values.view(torch.uint8).reshape(-1).int())
    return floats.view(values.shape).mul_(scales.float()).to(torch.bfloat16)


def _rounded(in_blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (in_blocks / _for_elements(scales)).clamp_(-MAX, MAX).to(DTYPE)


def _for_elements(scales: torch.Tensor) -> torch.Tensor:
    """Factors beside the elements of their blocks: `[..., blocks, 1, blocks, 1]`."""
    return scales.float()[..., :, None, :, None]


def _in_blocks(values: torch.Tensor, blocks: Fp8Blocks) -> torch.Tensor:
    """Values as `[..., blocks, rows, blocks, columns]`; zeros fill up the blocks at the edges."""
    *stacked, rows, columns = values.shape
    *_, block_rows, block_columns = blocks.scale_shape(tuple(values.shape))
    right, below = block_columns * blocks.columns - columns, block_rows * blocks.rows - rows
    padded = F.pad(values, (0, right, 0, below)) if right or below else values.contiguous()
    return padded.view(*stacked, block_rows, blocks.rows, block_columns, blocks.columns)


def _side_by_side(in_blocks: torch.Tensor) -> torch.Tensor:
    """The reverse of `_in_blocks`, with what filled up the edges."""
    *stacked, block_rows, rows, block_columns, columns = in_blocks.shape
    return in_blocks.reshape(*stacked, block_rows * rows, block_columns * columns)


def _spread(scales: torch.Tensor, bounds: Bounds, blocks: Fp8Blocks) -> torch.Tensor:
    """The factor of every element of a part, from those of the blocks that it touches."""
    (first_row, last_row), (first_column, last_column) = bounds[-2:]
    spread = scales.repeat_interleave(blocks.rows, -2).repeat_interleave(blocks.columns, -1)
    top, left = first_row % blocks.rows, first_column % blocks.columns
    return spread[..., top : top + last_row - first_row, left : left + last_column - first_column]


def blocks_of(bounds: Bounds, blocks: Fp8Blocks) -> Bounds:
    """The blocks that a part of a matrix touches; axes of stacked ones stay as they are."""
    *stacked, (first_row, last_row), (first_column, last_column) = bounds
    return (
        *stacked,
        (first_row // blocks.rows, -(-last_row // blocks.rows)),
        (first_column // blocks.columns, -(-last_column // blocks.columns)),
    )


def _elements_of(touched: Bounds, shape: tuple[int, ...], blocks: Fp8Blocks) -> Bounds:
    """The elements of some blocks."""
    *stacked, (top, bottom), (left, right) = touched
    return (
        *stacked,
        (top * blocks.rows, min(shape[-2], bottom * blocks.rows)),
        (left * blocks.columns, min(shape[-1], right * blocks.columns)),
    )
