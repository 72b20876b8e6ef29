"""The batches of one rank: the settings of the user as a plan and a layout of `mtrain.data`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mtrain.config import SftConfig
from mtrain.data.loader import BatchLayout, BatchPlan, PackedBatch, load_steps
from mtrain.data.report import PreparationReport
from mtrain.data.storage import TokenizedDataset
from mtrain.parallel import ParallelState


class Batches:
    """The batches of this data-parallel rank from one prepared dataset."""

    def __init__(
        self,
        config: SftConfig,
        dataset: TokenizedDataset,
        report: PreparationReport,
        state: ParallelState,
        *,
        is_training: bool = True,
        first_step: int = 0,
        first_unit: int = 0,
    ) -> None:
        data, training = config.data, config.training
        packing_length = data.packing_length if data.packing else None
        self._dataset = dataset
        self._data = data
        self._state = state
        self.plan = BatchPlan(
            dataset.lengths,
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            num_epochs=training.num_train_epochs if is_training else 1,
            shuffle=data.train_dataloader_shuffle and is_training,
            seed=training.seed,
            packing_length=packing_length,
            packing_strategy=data.packing_strategy,
            first_step=first_step,
            first_unit=first_unit,
        )
        self._layout = BatchLayout(
            micro_batch_size=training.micro_batch_size,
            packing_length=packing_length,
            padding_free=data.padding_free,
            # Sequence parallelism cuts sequences into equal parts; kernels like multiples of 8.
            pad_to_multiple=math.lcm(8, state.layout.tp_size),
            pad_token_id=report.pad_token_id,
        )

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return len(self._dataset)

    def steps(self, num_steps: int, *, first: int = 0) -> Iterator[list[PackedBatch]]:
        """The micro-batches of each step, of those from `first` on."""
        return load_steps(
            self._dataset,
            self.plan,
            self._layout,
            range(first, num_steps),
            dp_rank=self._state.coordinates.dp_rank,
            dp_size=self._state.layout.dp_size,
            num_workers=self._data.dataloader_num_workers,
            prefetch_factor=self._data.dataloader_prefetch_factor,
        )
