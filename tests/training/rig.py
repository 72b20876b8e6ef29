"""What the tests of training share: documents, micro-batches of them, and a tiny model to train."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mtrain.config.moe import MoEConfig
from mtrain.config.optimizer import OptimizerConfig
from mtrain.config.parallel import ParallelConfig
from mtrain.config.training import TrainingConfig
from mtrain.config.tuner import TunerConfig
from mtrain.parallel import ParallelState
from mtrain.training.freeze import freeze_parameters, global_parameter_names
from mtrain.training.optimizer import build_optimizer, build_scheduler
from mtrain.training.step import StepResult, train_step
from mtrain.training.wrap import gather_parameters, unwrap, wrap_chunks
from tests.megatron import load_model

VOCAB_SIZE = 131


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A micro-batch, as `mtrain.data` makes them."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    label_positions: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    num_tokens: int
    sample_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids and labels of one sample."""

    number: int
    input_ids: torch.Tensor
    labels: torch.Tensor


def documents(count: int = 8, *, shortest: int = 5, seed: int = 0) -> list[Document]:
    """Documents of different length, of which different shares have labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = shortest + 3 * number
        ids = torch.randint(0, VOCAB_SIZE, (length + 1,), generator=generator)
        labels = ids[1:].clone()
        labels[: (number * 2) % length] = -100
        made.append(Document(number, ids[:-1], labels))
    return made


def rows(group: Sequence[Document], *, length: int | None = None) -> Batch:
    """One document a row, padded on the right."""
    width = length or max(len(document.input_ids) for document in group)
    ids = torch.zeros(len(group), width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, document in enumerate(group):
        ids[row, : len(document.input_ids)] = document.input_ids
        labels[row, : len(document.labels)] = document.labels
    return Batch(
        input_ids=ids,
        labels=labels,
        label_positions=positions_of(labels),
        position_ids=torch.arange(width).repeat(len(group), 1),
        cu_seqlens=None,
        max_seqlen=width,
        num_tokens=sum(len(document.input_ids) for document in group),
        sample_ids=tuple(document.number for document in group),
    )


def positions_of(labels: torch.Tensor) -> torch.Tensor:
    """Where there is a label."""
    return (labels.flatten() != -100).nonzero().squeeze(1)


def packed(group: Sequence[Document], *, length: int | None = None) -> Batch:
    """All documents in one row; what is left of `length` is one more document without labels."""
    lengths = [len(document.input_ids) for document in group]
    num_tokens = sum(lengths)
    padding = (length or num_tokens) - num_tokens
    ids = [document.input_ids for document in group]
    labels = [document.labels for document in group]
    if padding:
        lengths.append(padding)
        ids.append(torch.zeros(padding, dtype=torch.int64))
        labels.append(torch.full((padding,), -100))
    return Batch(
        input_ids=torch.cat(ids)[None],
        labels=torch.cat(labels)[None],
        label_positions=positions_of(torch.cat(labels)),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        max_seqlen=max(lengths),
        num_tokens=num_tokens,
        sample_ids=tuple(document.number for document in group),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """A model with its optimizer."""

    state: ParallelState
    chunks: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler

    def step(self, batches: Sequence[Batch], number: int = 1) -> StepResult:
        """One optimizer step on this rank's micro-batches."""
        return train_step(
            self.chunks, self.optimizer, self.scheduler, batches, state=self.state, step=number
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's weights under their names in the whole model."""
        gather_parameters(self.chunks)
        return {
            name: parameter.detach().clone()
            for chunk in self.chunks
            for name, parameter in global_parameter_names(unwrap(chunk))
        }


CONSTANT = OptimizerConfig(lr=1e-3, lr_decay_style="constant")


def make_rig(
    state: ParallelState,
    folder: Path,
    *,
    optimizer: OptimizerConfig = CONSTANT,
    parallel: ParallelConfig | None = None,
    training: TrainingConfig | None = None,
    tuner: TunerConfig | None = None,
    moe: MoEConfig | None = None,
    dtype: torch.dtype = torch.float32,
    total_steps: int = 10,
    num_next_tokens: int = 0,
) -> Rig:
    """Loads, freezes, wraps: what a run does before its first step."""
    chunks = load_model(
        state, folder, dtype=dtype, training=training, moe=moe, num_next_tokens=num_next_tokens
    )
    freeze_parameters(chunks, tuner=tuner or TunerConfig(), state=state)
    wrapped = wrap_chunks(chunks, parallel=parallel or ParallelConfig(), grad_reduce_in_fp32=True)
    made = build_optimizer(wrapped, optimizer)
    return Rig(
        state=state,
        chunks=wrapped,
        optimizer=made,
        scheduler=build_scheduler(made, optimizer, total_steps=total_steps),
    )


def mean_loss(results: Sequence[StepResult]) -> float:
    """Loss of one step from the results of all ranks (each tensor rank counts once)."""
    loss, _, num_labels = torch.stack([result.sums for result in results]).sum(dim=0).tolist()
    return loss / num_labels
