"""What the training step needs to know of a micro-batch, and what it counts on the host.

The one thing to know: `MicroBatch` is the shape of `mtrain.data`'s `PackedBatch`, written down here
because training does not import the data package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

import torch

__all__ = ["BatchCounts", "MicroBatch", "count_batches", "to_device"]


class MicroBatch(Protocol):
    """The frozen dataclass that a data loader yields.

    Attributes:
        input_ids: int64 [batch, seq].
        labels: int64 [batch, seq]; the word after each position, -100 for no loss.
        label_positions: int64 [num_labels], ascending: all positions of the flattened labels that
            are not -100.
        position_ids: int64 [batch, seq], from 0 in every document.
        cu_seqlens: int32 [num_documents + 1], where the documents of a pack begin (batch 1); None
            for one document a row.
        max_seqlen: Tokens of the longest document.
        num_tokens: Tokens that are not padding.
        sample_ids: The samples in it, for error messages.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    label_positions: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    num_tokens: int
    sample_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCounts:
    """What some micro-batches of one rank hold.

    Attributes:
        num_micro_batches: How many.
        num_samples: Samples (documents).
        num_tokens: Tokens without padding.
        num_padded_tokens: Tokens with padding, which is what is computed.
        num_attention_pairs: (query, key) pairs of causal attention inside documents.
    """

    num_micro_batches: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0
    num_attention_pairs: int = 0

    def __add__(self, other: BatchCounts) -> Self:
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return type(self)(**{name: ours[name] + theirs[name] for name in ours})


def count_batches(batches: Iterable[MicroBatch]) -> BatchCounts:
    """Counts micro-batches that are still in host memory."""
    total = BatchCounts()
    for batch in batches:
        total += BatchCounts(
            num_micro_batches=1,
            num_samples=len(batch.sample_ids),
            num_tokens=batch.num_tokens,
            num_padded_tokens=batch.input_ids.numel(),
            num_attention_pairs=_attention_pairs(batch),
        )
    return total


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on a device; from pinned memory without waiting."""
    moved = {
        name: getattr(batch, name).to(device, non_blocking=True)
        for name in ("input_ids", "labels", "label_positions", "position_ids", "cu_seqlens")
        if getattr(batch, name) is not None
    }
    return dataclasses.replace(batch, **moved)


def _attention_pairs(batch: MicroBatch) -> int:
    if batch.cu_seqlens is None:
        # Row lengths are not kept; equal ones are the fewest pairs that fit.
        rows = batch.input_ids.shape[0]
        length = batch.num_tokens / rows
        return round(rows * length * (length + 1) / 2)
    # What lies behind the real tokens is padding, a document of its own.
    starts = batch.cu_seqlens.long().clamp(max=batch.num_tokens)
    lengths = starts.diff()
    return int((lengths * (lengths + 1)).sum()) // 2
