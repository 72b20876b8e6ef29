"""Which program of an attention kernel works on which tokens of which document.

The one thing to know: the place of a block in the order of work follows from the lengths alone, by
counting blocks with more to do, so one small kernel makes a map without sorting and without asking
the device how many blocks there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["SPACE", "block_map"]

SPACE = 4


def block_map(
    ends: torch.Tensor, num_tokens: int, block_tokens: int, *, of_keys: bool = False
) -> torch.Tensor:
    """Blocks of tokens of the same document, the longest work first.

    Args:
        ends: int32 [num_documents + 1], where documents begin; they cover all tokens.
        num_tokens: Of the pack.
        block_tokens: Tokens of a program.
        of_keys: Whether the work is that with all tokens behind instead of before.

    Returns:
        int32 [programs, 4], zeros for programs that have nothing to do: where the document begins,
        its length, the program's first token counted within the document, and where the document
        begins if all begin at multiples of `SPACE`.
    """
    num_documents = ends.numel() - 1
    # Of each document at most one block more than those that it fills.
    num_programs = num_tokens // block_tokens + num_documents
    blocks = torch.empty(num_programs, 4, dtype=torch.int32, device=ends.device)
    _block_map_kernel[(num_programs,)](
        ends,
        blocks,
        num_documents,
        BLOCK_TOKENS=block_tokens,
        OF_KEYS=of_keys,
        SPACE=SPACE,
        DOCUMENTS=triton.next_power_of_2(num_documents),
        num_warps=1,
    )
    return blocks


@triton.jit(do_not_specialize=["num_documents"])
def _block_map_kernel(
    ends,
    blocks,
    num_documents,
    BLOCK_TOKENS: tl.constexpr,
    OF_KEYS: tl.constexpr,
    SPACE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """One block: finds it in the order of tokens, and its place in that of work."""
    number = tl.program_id(0)
    documents = tl.arange(0, DOCUMENTS)
    is_document = documents < num_documents
    starts = tl.load(ends + documents, mask=is_document, other=0)
    lengths = tl.load(ends + documents + 1, mask=is_document, other=0) - starts
    counts = (lengths + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    last = tl.cumsum(counts, 0)
    document = tl.sum(((last <= number) & is_document).to(tl.int32), 0)
    is_mine = documents == document
    start = tl.sum(tl.where(is_mine, starts, 0), 0)
    length = tl.sum(tl.where(is_mine, lengths, 0), 0)
    index = number - tl.sum(tl.where(is_mine, last - counts, 0), 0)
    first = index * BLOCK_TOKENS
    # Of every document the blocks with more to do than this one, and whether one has as much.
    if OF_KEYS:
        surplus = lengths - (length - first)
        more = tl.maximum((surplus + BLOCK_TOKENS - 1) // BLOCK_TOKENS, 0)
        is_level = (surplus >= 0) & (surplus % BLOCK_TOKENS == 0) & (surplus < lengths)
    else:
        more = tl.maximum(counts - index - 1, 0)
        is_level = counts > index
    place = tl.sum(more, 0) + tl.sum((is_level & (documents < document)).to(tl.int32), 0)
    spaced = start // SPACE * SPACE + document * SPACE
    is_block = document < num_documents
    row = blocks + 4 * tl.where(is_block, place, number)
    tl.store(row, tl.where(is_block, start, 0))
    tl.store(row + 1, tl.where(is_block, length, 0))
    tl.store(row + 2, tl.where(is_block, first, 0))
    tl.store(row + 3, tl.where(is_block, spaced, 0))
