"""From prepared samples to the batches of one data-parallel rank.

The one thing to know: `BatchPlan` is index arithmetic that every rank computes alike, so a position
in the data is only (seed, epoch, units consumed), and which samples a step trains on does not
depend on the number of ranks.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mtrain.data.packing import Units, plan_packs, plan_singles
from mtrain.data.prefetch import map_ahead
from mtrain.data.storage import IGNORED, Sample, TokenizedDataset

__all__ = ["BatchLayout", "BatchPlan", "PackedBatch", "Position", "collate", "load_steps"]


class Position(NamedTuple):
    """How far training is in the data: `unit` counts from the start of the epoch."""

    epoch: int
    unit: int


class BatchPlan:
    """Which samples each step, rank and micro-batch trains on.

    Units (packs, or single samples) of all epochs form one stream; step s takes the units
    [s * global_batch_size, (s + 1) * global_batch_size), or as many behind the unit that a resumed
    run begins with. Every sample occurs once an epoch, nothing is dropped: behind the end of the
    last epoch come empty units.

    Several threads may ask at once. Packs of an epoch are planned when they are first asked for, by
    whoever asks.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        num_epochs: int | None,
        shuffle: bool,
        seed: int,
        packing_length: int | None = None,
        packing_strategy: str = "binpack",
        first_step: int = 0,
        first_unit: int = 0,
    ) -> None:
        """Plan the first epoch.

        Args:
            lengths: Tokens of every sample, int [num_samples].
            micro_batch_size: Units of a micro-batch.
            global_batch_size: Units of a step, over all ranks.
            num_epochs: None: the stream does not end.
            shuffle: Another order, and with packing other packs, every epoch.
            seed: Decides all orders.
            packing_length: Tokens of a pack; None: a unit is a sample.
            packing_strategy: See `plan_packs`.
            first_step: Steps that were made before this plan.
            first_unit: Units of the stream that they took.

        Raises:
            ValueError: There is no sample, or one is longer than a pack.
        """
        if len(lengths) == 0:
            raise ValueError("the dataset has no samples")
        self._lengths = lengths
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._num_epochs = num_epochs
        self._shuffle = shuffle
        self._seed = seed
        self._packing_length = packing_length
        self._packing_strategy = packing_strategy
        self._first_step = first_step
        self._first_stream_unit = first_unit
        self._lock = threading.RLock()
        self._planned: dict[int, Units] = {}
        # First unit of epoch 0, 1, ... in the stream; grows when a step asks for more.
        self._first_units = [0, len(self.units(0))]

    def units(self, epoch: int) -> Units:
        """The units of an epoch, in order; the last two epochs asked for are kept."""
        # Who asks for what is there does not wait while another epoch is planned.
        if (units := self._planned.get(epoch)) is not None:
            return units
        with self._lock:
            if epoch not in self._planned:
                units = self._plan(epoch)
                if len(self._planned) == 2:
                    del self._planned[min(self._planned)]
                self._planned[epoch] = units
            return self._planned[epoch]

    def _plan(self, epoch: int) -> Units:
        if self._packing_length is None:
            return plan_singles(
                len(self._lengths), shuffle=self._shuffle, seed=self._seed, epoch=epoch
            )
        return plan_packs(
            self._lengths,
            packing_length=self._packing_length,
            strategy=self._packing_strategy,
            shuffle=self._shuffle,
            seed=self._seed,
            epoch=epoch,
        )

    @property
    def total_steps(self) -> int:
        """Steps until every epoch is over.

        Raises:
            ValueError: The number of epochs was not given.
        """
        if self._num_epochs is None:
            raise ValueError("the number of steps needs --num_train_epochs or --train_iters")
        missing = max(0, self._first_unit(self._num_epochs) - self._first_stream_unit)
        return self._first_step - (-missing // self._global_batch_size)

    def consumed_units(self, step: int) -> int:
        """Units of the stream that were taken before a step; behind its end, all there are."""
        taken = self._stream_unit(step)
        if self._num_epochs is None:
            return taken
        return min(taken, max(self._first_stream_unit, self._first_unit(self._num_epochs)))

    def _stream_unit(self, step: int) -> int:
        """Where in the stream a step begins, as if it did not end."""
        return self._first_stream_unit + (step - self._first_step) * self._global_batch_size

    def position(self, step: int) -> Position:
        """Where the data stands before a step."""
        stream_unit = self._stream_unit(step)
        epoch = 0
        while self._has_epoch(epoch) and self._first_unit(epoch + 1) <= stream_unit:
            epoch += 1
        if not self._has_epoch(epoch):
            return Position(epoch, 0)
        return Position(epoch, stream_unit - self._first_unit(epoch))

    def epochs_consumed(self, step: int) -> float:
        """Epochs before a step, with the fraction of the running one."""
        epoch, unit = self.position(step)
        return epoch + (unit / len(self.units(epoch)) if unit else 0.0)

    def step_units(self, step: int) -> list[np.ndarray]:
        """Sample ids of every unit of a step; empty arrays behind the end of the last epoch."""
        epoch, unit = self.position(step)
        result: list[np.ndarray] = []
        while len(result) < self._global_batch_size and self._has_epoch(epoch):
            units = self.units(epoch)
            last = min(len(units), unit + self._global_batch_size - len(result))
            result.extend(units[index] for index in range(unit, last))
            epoch, unit = epoch + 1, 0
        missing = self._global_batch_size - len(result)
        return result + [np.empty(0, dtype=np.int64)] * missing

    def micro_batches(self, step: int, *, dp_rank: int, dp_size: int) -> list[list[np.ndarray]]:
        """The units of a step that one rank trains on: [num_microbatches][micro_batch_size].

        Micro-batches are dealt to the ranks in turn, so each has the same contents at any dp_size.

        Raises:
            ValueError: The global batch does not divide into micro-batches of all ranks.
        """
        size = self._micro_batch_size
        if self._global_batch_size % (size * dp_size):
            raise ValueError(
                f"--global_batch_size {self._global_batch_size} is not a multiple of "
                f"--micro_batch_size {size} x {dp_size} data-parallel ranks"
            )
        units = self.step_units(step)
        firsts = range(dp_rank * size, self._global_batch_size, dp_size * size)
        return [units[first : first + size] for first in firsts]

    def _has_epoch(self, epoch: int) -> bool:
        return self._num_epochs is None or epoch < self._num_epochs

    def _first_unit(self, epoch: int) -> int:
        if epoch < len(self._first_units):
            return self._first_units[epoch]
        with self._lock:
            while len(self._first_units) <= epoch:
                # Only the sequential strategy on a shuffled order gives epochs of different sizes.
                varies = self._packing_length is not None and self._packing_strategy == "sequential"
                last = len(self._first_units) - 1
                size = len(self.units(last)) if varies else self._first_units[1]
                self._first_units.append(self._first_units[-1] + size)
            return self._first_units[epoch]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLayout:
    """How the units of a micro-batch become tensors.

    With `packing_length` every micro-batch has micro_batch_size * packing_length positions. With
    `padding_free` alone documents are concatenated. With neither, each document is a row. Lengths
    are rounded up to `pad_to_multiple` (a multiple of the tensor-parallel size under sequence
    parallelism, and of 8 for fast kernels).
    """

    micro_batch_size: int
    packing_length: int | None = None
    padding_free: bool = True
    pad_to_multiple: int = 8
    pad_token_id: int = 0

    def round_up(self, length: int) -> int:
        """The next allowed length, at least one multiple."""
        return max(1, -(-length // self.pad_to_multiple)) * self.pad_to_multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch.

    Attributes:
        input_ids: int64 [batch, seq].
        labels: int64 [batch, seq]; labels[t] is the token that position t predicts, -100 where
            there is no loss, never across documents.
        label_positions: int64 [num_labels], where the flattened labels are not -100: known here
            without asking a device.
        position_ids: int64 [batch, seq], from 0 in every document.
        cu_seqlens: int32 [num_documents + 1], bounds of the documents of the single row, padding
            being documents too; None when each document is a row of its own.
        max_seqlen: Tokens of the longest document or row.
        num_tokens: Positions that are not padding.
        sample_ids: Samples in the order of their documents.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    label_positions: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    num_tokens: int
    sample_ids: tuple[int, ...]


def collate(
    dataset: TokenizedDataset, units: Sequence[np.ndarray], layout: BatchLayout
) -> PackedBatch:
    """Build the tensors of one micro-batch from the sample ids of its units."""
    ids = np.concatenate(units)
    samples = dataset.samples(ids)
    sample_ids = tuple(ids.tolist())
    if layout.packing_length is None and not layout.padding_free:
        return _collate_rows(samples, sample_ids, layout)
    return _collate_documents(samples, sample_ids, layout)


def _collate_documents(
    samples: Sequence[Sample], sample_ids: tuple[int, ...], layout: BatchLayout
) -> PackedBatch:
    lengths = [len(sample.input_ids) for sample in samples]
    num_tokens = sum(lengths)
    if layout.packing_length is None:
        total = layout.round_up(num_tokens)
        longest_padding = total
    else:
        total = layout.round_up(layout.micro_batch_size * layout.packing_length)
        longest_padding = layout.packing_length
    padding = total - num_tokens
    assert padding >= 0, f"{num_tokens} tokens do not fit {total} positions"
    # Positions of padding stay in the range that real documents use.
    pieces = [min(longest_padding, padding - at) for at in range(0, padding, longest_padding)]
    bounds = np.cumsum([0, *lengths, *pieces], dtype=np.int32)
    input_ids = np.full((1, total), layout.pad_token_id, dtype=np.int64)
    labels = np.full((1, total), IGNORED, dtype=np.int64)
    if samples:
        np.concatenate([sample.input_ids for sample in samples], out=input_ids[0, :num_tokens])
        np.concatenate([sample.labels for sample in samples], out=labels[0, :num_tokens])
    document_sizes = np.diff(bounds)
    position_ids = np.arange(total) - np.repeat(bounds[:-1], document_sizes)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        label_positions=_label_positions(labels),
        position_ids=torch.from_numpy(position_ids[None]),
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=int(document_sizes.max()),
        num_tokens=num_tokens,
        sample_ids=sample_ids,
    )


def _collate_rows(
    samples: Sequence[Sample], sample_ids: tuple[int, ...], layout: BatchLayout
) -> PackedBatch:
    lengths = [len(sample.input_ids) for sample in samples]
    shape = (layout.micro_batch_size, layout.round_up(max(lengths, default=0)))
    input_ids = np.full(shape, layout.pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, sample in enumerate(samples):
        input_ids[row, : lengths[row]] = sample.input_ids
        labels[row, : lengths[row]] = sample.labels
    position_ids = np.broadcast_to(np.arange(shape[1]), shape).copy()
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        label_positions=_label_positions(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=None,
        max_seqlen=shape[1],
        num_tokens=sum(lengths),
        sample_ids=sample_ids,
    )


def _label_positions(labels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(labels != IGNORED).astype(np.int64, copy=False))


def load_steps(
    dataset: TokenizedDataset,
    plan: BatchPlan,
    layout: BatchLayout,
    steps: range,
    *,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
    prefetch_factor: int = 2,
) -> Iterator[list[PackedBatch]]:
    """Yield the micro-batches of one rank, step by step.

    The time spent in `next` is the time that training waits for data.

    Args:
        dataset: What `plan` was made for.
        plan: Which samples.
        layout: Which tensors.
        steps: Which steps; those before it were trained on already.
        dp_rank: This rank among the data-parallel ones.
        dp_size: Number of data-parallel ranks.
        num_workers: Threads that build batches ahead (copying releases the interpreter); 0: none.
        prefetch_factor: Steps each thread is ahead.
    """

    def build(step: int) -> list[PackedBatch]:
        micro_batches = plan.micro_batches(step, dp_rank=dp_rank, dp_size=dp_size)
        return [collate(dataset, units, layout) for units in micro_batches]

    if num_workers == 0:
        yield from map(build, steps)
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="mtrain-data") as executor:
        yield from map_ahead(executor, build, steps, ahead=num_workers * prefetch_factor)
