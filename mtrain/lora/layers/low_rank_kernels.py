"""Adds what adapters add to the outputs of all experts, in place and in one kernel.

The one thing to know: it is bound by memory, so the output is read and written once; torch's
grouped product writes its result beside the output, and adding reads both. A program has a block of
rows of one expert and finds them in the ends of the experts' rows, which are on the device: the
host never waits for them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["Blocks", "add_low_rank", "expert_block", "find_rows", "num_blocks", "rank_block"]

# Columns of a low-rank tensor that are held at once; tensor cores want at least 16.
_LEAST_RANK, _MOST_RANK = 16, 64
# A number for each thread of a warp.
_LEAST_EXPERTS = 32


class Blocks(NamedTuple):
    """What a program of a kernel does at a time.

    Attributes:
        rows: Rows.
        columns: Columns of the wide tensor.
        warps: Warps of a program.
        stages: How many blocks of a loop are on their way from memory at once.
    """

    rows: int
    columns: int
    warps: int
    stages: int


_BLOCKS = Blocks(rows=64, columns=64, warps=4, stages=1)


def add_low_rank(
    output: torch.Tensor,
    low_rank: torch.Tensor,
    factor: torch.Tensor,
    ends: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """`output += scale * low_rank @ factor` where the mask is, summed in float32, rounded once.

    With a factor of zero the output keeps its bits.

    Args:
        output: [rows, columns] of 16 bits, rows sorted by expert; written to.
        low_rank: [rows, rank], rank of any size.
        factor: [experts, rank, columns] of any strides.
        ends: int32 [experts], the row after the last of each expert.
        mask: bool [rows, columns], contiguous.
        scale: Factor of what is added.
    """
    num_rows, width = output.shape
    num_experts, rank = ends.shape[0], low_rank.shape[1]
    assert output.stride(1) == low_rank.stride(1) == 1
    assert factor.shape == (num_experts, rank, width)
    assert output.itemsize == 2 and low_rank.dtype == factor.dtype == output.dtype
    assert mask is None or mask.is_contiguous()
    if output.numel() == 0:
        return
    num_programs = num_blocks(num_rows, ends, _BLOCKS.rows) * triton.cdiv(width, _BLOCKS.columns)
    _kernel[(num_programs,)](
        *(output, low_rank, factor, output if mask is None else mask, ends),
        *(scale, width, num_experts, output.stride(0), low_rank.stride(0), *factor.stride()),
        HAS_MASK=mask is not None,
        RANK=rank,
        BLOCK_RANK=min(_MOST_RANK, rank_block(rank)),
        BLOCK_ROWS=_BLOCKS.rows,
        BLOCK_COLUMNS=_BLOCKS.columns,
        BLOCK_EXPERTS=expert_block(ends),
        num_warps=_BLOCKS.warps,
        num_stages=_BLOCKS.stages,
    )


def num_blocks(num_rows: int, ends: torch.Tensor, block: int) -> int:
    """The most blocks that rows can have if none belongs to two experts."""
    assert ends.dtype == torch.int32 and ends.is_contiguous()
    return num_rows // block + min(ends.shape[0], num_rows)


def rank_block(rank: int) -> int:
    """The block that holds a whole row of a low-rank tensor."""
    return max(_LEAST_RANK, triton.next_power_of_2(rank))


def expert_block(ends: torch.Tensor) -> int:
    """The block that holds all ends."""
    return max(_LEAST_EXPERTS, triton.next_power_of_2(ends.shape[0]))


@triton.jit
def find_rows(ends, num_experts, number, BLOCK: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """Expert, first row and the row after the last of a block; of no rows if there is none."""
    experts = tl.arange(0, BLOCK_EXPERTS)
    is_expert = experts < num_experts
    row_ends = tl.load(ends + experts, mask=is_expert, other=0)
    starts = tl.load(ends + experts - 1, mask=is_expert & (experts > 0), other=0)
    counts = tl.where(is_expert, (row_ends - starts + BLOCK - 1) // BLOCK, 0)
    # Blocks up to the end of each expert.
    totals = tl.cumsum(counts, 0)
    expert = tl.sum((totals <= number).to(tl.int32), 0)
    exists = expert < num_experts
    expert = tl.minimum(expert, num_experts - 1)
    before = tl.max(tl.where(totals <= number, totals, 0), 0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    first = start + (number - before) * BLOCK
    end = tl.minimum(first + BLOCK, tl.load(ends + expert))
    return expert, first, tl.where(exists, end, first)


@triton.jit
def _kernel(
    output,
    low_rank,
    factor,
    mask,
    ends,
    scale,
    width,
    num_experts,
    output_stride,
    low_rank_stride,
    expert_stride,
    rank_stride,
    column_stride,
    HAS_MASK: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    num_column_blocks = tl.cdiv(width, BLOCK_COLUMNS)
    number = tl.program_id(0) // num_column_blocks
    expert, first, end = find_rows(ends, num_experts, number, BLOCK_ROWS, BLOCK_EXPERTS)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(0) % num_column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row, is_column = (rows < end)[:, None], (columns < width)[None, :]
    rows = rows.to(tl.int64)[:, None]
    places = output + rows * output_stride + columns[None, :]
    # Asked for first, since it is what takes long.
    total = tl.load(places, mask=is_row & is_column, other=0.0).to(tl.float32)
    delta = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    factor += expert.to(tl.int64) * expert_stride + columns[None, :] * column_stride
    for begin in tl.static_range(0, RANK, BLOCK_RANK):
        ranks = begin + tl.arange(0, BLOCK_RANK)
        left = tl.load(
            low_rank + rows * low_rank_stride + ranks[None, :],
            mask=is_row & (ranks < RANK)[None, :],
            other=0.0,
        )
        is_rank = (ranks < RANK)[:, None]
        right = tl.load(factor + ranks[:, None] * rank_stride, mask=is_rank & is_column, other=0.0)
        delta = tl.dot(left, right, delta)
    delta *= scale
    if HAS_MASK:
        kept = tl.load(mask + rows * width + columns[None, :], mask=is_row & is_column, other=0)
        delta = tl.where(kept != 0, delta, 0.0)
    tl.store(places, total + delta, mask=is_row & is_column)
