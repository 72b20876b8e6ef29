"""Products of a wide tensor and a narrow one, of all experts, in few kernels.

The one thing to know: they are bound by reading the wide tensor, and kernels made for square
products run far below the speed of memory. The product keeps the narrow side in registers and
passes over the columns; the gradient of a factor keeps a block of it in registers and passes over
a chunk of rows. What chunks give is summed in a fixed order, without atomics: the same bits every
time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mtrain.lora.layers.low_rank_kernels import (
    Blocks,
    expert_block,
    find_rows,
    num_blocks,
    rank_block,
)
from mtrain.lora.layers.products import MOST_COLUMNS_FOR_KERNELS

__all__ = ["factor_gradient", "narrow_product", "product_and_gradient"]

# Rows that a program passes over for a gradient.
_CHUNK = 1024
_SUM_BLOCK = 1024
# Of a number, and what the compiler takes to pass numbers between threads.
_BYTES, _BYTES_FOR_LAYOUTS = 2, 16384
_BLOCKS = Blocks(rows=64, columns=64, warps=4, stages=6)
_WIDE_BLOCKS = Blocks(rows=64, columns=256, warps=8, stages=3)


def narrow_product(
    wide: torch.Tensor, factor: torch.Tensor, ends: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """`scale * wide @ factor` of each expert, summed in float32 and rounded once.

    Args:
        wide: [rows, columns], contiguous, of 16 bits; rows are sorted by expert.
        factor: [experts, columns, rank] of any strides.
        ends: int32 [experts], the row after the last of each expert.
        scale: Factor of the result.

    Returns:
        [rows, rank], in the dtype of `wide`.
    """
    num_rows, width = wide.shape
    num_experts, rank = ends.shape[0], factor.shape[2]
    assert wide.is_contiguous() and wide.itemsize == _BYTES
    assert factor.shape == (num_experts, width, rank) and rank <= MOST_COLUMNS_FOR_KERNELS
    product = wide.new_empty(num_rows, rank)
    if num_rows > 0:
        _product_kernel[(num_blocks(num_rows, ends, _BLOCKS.rows),)](
            *(wide, factor, product, ends, scale, width, num_experts, *factor.stride()),
            BLOCK_ROWS=_BLOCKS.rows,
            BLOCK_COLUMNS=_BLOCKS.columns,
            **_narrow_sizes(rank, ends),
            num_warps=_BLOCKS.warps,
            num_stages=_stages(_BLOCKS, _BLOCKS.columns, rank, wide.device),
        )
    return product


def factor_gradient(
    wide: torch.Tensor, narrow: torch.Tensor, ends: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor:
    """`narrow.t() @ wide` of each expert, summed in float32 and rounded once.

    Args:
        wide: [rows, columns], contiguous, of 16 bits; rows are sorted by expert.
        narrow: [rows, rank], contiguous.
        ends: int32 [experts], the row after the last of each expert.
        dtype: Of the result.

    Returns:
        [experts, rank, columns], contiguous, zero for experts without rows.
    """
    gradient = wide.new_empty(ends.shape[0], narrow.shape[1], wide.shape[1], dtype=dtype)
    _write_gradient(gradient.transpose(1, 2), wide, narrow, ends, _BLOCKS)
    return gradient


def product_and_gradient(
    wide: torch.Tensor,
    factor: torch.Tensor,
    narrow: torch.Tensor,
    ends: torch.Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`narrow_product` and a `factor_gradient` with columns first, reading the wide tensor once.

    Each block of columns gives a part of the product, so it pays where blocks are much wider than
    the rank.

    Args:
        wide: [rows, columns], contiguous, of 16 bits; rows are sorted by expert.
        factor: [experts, columns, rank] of any strides.
        narrow: [rows, rank], contiguous.
        ends: int32 [experts], the row after the last of each expert.
        scale: Factor of the product.
        dtype: Of the gradient.

    Returns:
        [rows, rank] in the dtype of `narrow`, and [experts, columns, rank].
    """
    num_parts = triton.cdiv(wide.shape[1], _WIDE_BLOCKS.columns)
    parts = wide.new_empty(num_parts, *narrow.shape, dtype=torch.float32)
    gradient = wide.new_empty(factor.shape, dtype=dtype)
    _write_gradient(gradient, wide, narrow, ends, _WIDE_BLOCKS, factor=factor, parts=parts)
    product = torch.empty_like(narrow)
    size = product.numel()
    if size > 0:
        _sum_parts_kernel[(triton.cdiv(size, _SUM_BLOCK),)](
            *(parts, product, size, scale), NUM_PARTS=num_parts, BLOCK=_SUM_BLOCK
        )
    return product, gradient


def _write_gradient(
    gradient: torch.Tensor,
    wide: torch.Tensor,
    narrow: torch.Tensor,
    ends: torch.Tensor,
    blocks: Blocks,
    *,
    factor: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
) -> None:
    """Writes `wide.t() @ narrow`, and what blocks of columns have of the product with a factor.

    Args:
        gradient: [experts, columns, rank], contiguous as it is or with the last two exchanged.
        wide: [rows, columns].
        narrow: [rows, rank].
        ends: int32 [experts].
        blocks: See `Blocks`.
        factor: [experts, columns, rank].
        parts: float32 [blocks of columns, rows, rank], with a factor.
    """
    num_rows, width = wide.shape
    num_experts, rank = ends.shape[0], narrow.shape[1]
    has_factor = factor is not None
    assert wide.is_contiguous() and wide.itemsize == _BYTES
    assert narrow.is_contiguous() and rank <= MOST_COLUMNS_FOR_KERNELS
    assert gradient.shape == (num_experts, width, rank)
    if not has_factor:
        # Something in their place.
        factor = parts = gradient
    num_chunks = num_blocks(num_rows, ends, _CHUNK)
    # Only where an expert has several chunks are they written.
    chunks = wide.new_empty(num_chunks, width * rank, dtype=torch.float32)
    if num_chunks > 0:
        kept = blocks.columns * rank_block(rank) * _BYTES if has_factor else 0
        _gradient_kernel[(num_chunks * triton.cdiv(width, blocks.columns),)](
            *(wide, narrow, factor, gradient, chunks, parts, ends, num_rows, width, num_experts),
            *(*factor.stride(), *gradient.stride()[1:]),
            HAS_FACTOR=has_factor,
            CHUNK=_CHUNK,
            BLOCK_ROWS=blocks.rows,
            BLOCK_COLUMNS=blocks.columns,
            **_narrow_sizes(rank, ends),
            num_warps=blocks.warps,
            num_stages=_stages(blocks, blocks.rows, rank, wide.device, kept=kept),
        )
    size = width * rank
    _sum_chunks_kernel[(num_experts, triton.cdiv(size, _SUM_BLOCK))](
        *(chunks, gradient, ends, size),
        CHUNK=_CHUNK,
        BLOCK=_SUM_BLOCK,
        BLOCK_EXPERTS=expert_block(ends),
    )


def _narrow_sizes(rank: int, ends: torch.Tensor) -> dict[str, int]:
    return {"RANK": rank, "BLOCK_RANK": rank_block(rank), "BLOCK_EXPERTS": expert_block(ends)}


def _stages(blocks: Blocks, length: int, rank: int, device: torch.device, *, kept: int = 0) -> int:
    """As many as fit beside `kept` bytes; the narrow side of a block is `length` times the rank."""
    if device.type != "cuda":
        return blocks.stages
    size = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    stage = _BYTES * (blocks.rows * blocks.columns + length * rank_block(rank))
    return max(1, min(blocks.stages, (size - kept - _BYTES_FOR_LAYOUTS) // stage))


@triton.jit
def _product_kernel(
    wide,
    factor,
    product,
    ends,
    scale,
    width,
    num_experts,
    expert_stride,
    column_stride,
    rank_stride,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    number = tl.program_id(0)
    expert, first, end = find_rows(ends, num_experts, number, BLOCK_ROWS, BLOCK_EXPERTS)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_ROWS)
    ranks = tl.arange(0, BLOCK_RANK)
    is_row, is_rank = (rows < end)[:, None], (ranks < RANK)[None, :]
    rows = rows.to(tl.int64)[:, None]
    wide += rows * width
    factor += expert.to(tl.int64) * expert_stride + ranks[None, :] * rank_stride
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        is_column = columns < width
        left = tl.load(wide + columns[None, :], mask=is_row & is_column[None, :], other=0.0)
        right = tl.load(
            factor + columns[:, None] * column_stride, mask=is_column[:, None] & is_rank, other=0.0
        )
        total = tl.dot(left, right, total)
    tl.store(product + rows * RANK + ranks[None, :], total * scale, mask=is_row & is_rank)


@triton.jit
def _gradient_kernel(
    wide,
    narrow,
    factor,
    gradient,
    chunks,
    parts,
    ends,
    num_rows,
    width,
    num_experts,
    factor_expert_stride,
    factor_column_stride,
    factor_rank_stride,
    column_stride,
    rank_stride,
    HAS_FACTOR: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    num_column_blocks = tl.cdiv(width, BLOCK_COLUMNS)
    block = tl.program_id(0) % num_column_blocks
    number = tl.program_id(0) // num_column_blocks
    expert, first, end = find_rows(ends, num_experts, number, CHUNK, BLOCK_EXPERTS)
    if first >= end:
        return
    ranks = tl.arange(0, BLOCK_RANK)
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_rank, is_column = (ranks < RANK)[None, :], columns < width
    is_inside = is_column[:, None] & is_rank
    if HAS_FACTOR:
        factor += expert.to(tl.int64) * factor_expert_stride
        factor += columns[:, None] * factor_column_stride + ranks[None, :] * factor_rank_stride
        right = tl.load(factor, mask=is_inside, other=0.0)
        parts += block.to(tl.int64) * num_rows * RANK
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_RANK), dtype=tl.float32)
    for start in range(first, end, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        is_row = (rows < end)[:, None]
        rows = rows.to(tl.int64)[:, None]
        values = tl.load(
            wide + rows * width + columns[None, :], mask=is_row & is_column[None, :], other=0.0
        )
        low = tl.load(narrow + rows * RANK + ranks[None, :], mask=is_row & is_rank, other=0.0)
        total = tl.dot(tl.trans(values), low, total)
        if HAS_FACTOR:
            part = tl.dot(values, right)
            tl.store(parts + rows * RANK + ranks[None, :], part, mask=is_row & is_rank)
    size = tl.full((), RANK, tl.int64) * width
    places = columns[:, None] * column_stride + ranks[None, :] * rank_stride
    expert_start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if (first == expert_start) & (end == tl.load(ends + expert)):
        tl.store(gradient + expert * size + places, total, mask=is_inside)
    else:
        tl.store(chunks + number * size + places, total, mask=is_inside)


@triton.jit
def _sum_parts_kernel(parts, total, size, scale, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    summed = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(NUM_PARTS):
        summed += tl.load(parts + places, mask=mask, other=0.0)
        parts += size
    tl.store(total + places, summed * scale, mask=mask)


@triton.jit
def _sum_chunks_kernel(
    chunks,
    gradient,
    ends,
    size,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """Sums the chunks of experts that have several; one alone has been written where it belongs."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_EXPERTS)
    row_ends = tl.load(ends + experts, mask=experts <= expert, other=0)
    starts = tl.load(ends + experts - 1, mask=(experts <= expert) & (experts > 0), other=0)
    counts = (row_ends - starts + CHUNK - 1) // CHUNK
    before = tl.sum(tl.where(experts < expert, counts, 0), 0)
    count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    if count == 1:
        return
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    chunks += before.to(tl.int64) * size
    for _ in range(count):
        total += tl.load(chunks + places, mask=mask, other=0.0)
        chunks += size
    tl.store(gradient + expert.to(tl.int64) * size + places, total, mask=mask)
