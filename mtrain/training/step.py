"""One optimizer step: forward and backward over the micro-batches, then the update.

The one thing to know: every token with a label counts the same, wherever it is. The labelled tokens
of the global batch are counted before forward, and each micro-batch's summed loss is divided by
that count, so the gradient does not depend on how the batch was split (nor does the weight of the
expert-balancing losses depend on how many tokens have labels). An update is made only from finite
numbers; otherwise training stops and names the samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mtrain.model.loss import IGNORED
from mtrain.parallel import ParallelState
from mtrain.training.adam import AdamW
from mtrain.training.batch import MicroBatch, to_device

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer import TransformerConfig

__all__ = ["NonFiniteError", "StepResult", "run_schedule", "train_step"]

_MAX_NAMED_SAMPLES = 64
_LOWEST_LOSS_SCALE = 1.0  # Megatron-Core's default for float16
_SMALLEST_NORM = 1e-6  # torch's `clip_grads_with_norm_` adds it too


class NonFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite; the weights were not touched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did.

    Attributes:
        sums: float64 [3] on the device: summed loss, tokens predicted right, tokens with a label,
            over this rank's micro-batches. Zeros on ranks without the loss.
        grad_norm: Global gradient norm before clipping; NaN when the step was skipped.
        learning_rate: The rate that this step used.
        is_skipped: float16 only: the loss scale was too high and the update was left out.
    """

    sums: torch.Tensor
    grad_norm: float
    learning_rate: float
    is_skipped: bool


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    batches: Sequence[MicroBatch],
    *,
    state: ParallelState,
    step: int,
) -> StepResult:
    """Trains on one global batch.

    Args:
        chunks: Wrapped model chunks of this rank.
        optimizer: From `build_optimizer`.
        scheduler: From `build_scheduler`.
        batches: This data-parallel rank's micro-batches of the step, in host memory; the same on
            all its tensor and pipeline ranks, and as many on every rank.
        state: This rank.
        step: Number of the step, for error messages.

    Raises:
        NonFiniteError: On all ranks, before the update.
    """
    on_device = [to_device(batch, state.device) for batch in batches]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    scale = _loss_scale(on_device, state)
    sums = run_schedule(chunks, on_device, scale=scale, forward_only=False)
    learning_rate = scheduler.get_lr({})
    overflowed = optimizer.prepare_grads()
    norm = _grad_norm(optimizer, state.device)
    _prepare_update(optimizer, norm)
    grad_norm = math.nan if overflowed else norm.item()
    if not math.isfinite(grad_norm):
        can_skip = overflowed and float(optimizer.get_loss_scale()) > _LOWEST_LOSS_SCALE
        _stop_or_skip(batches, sums, can_skip=can_skip, state=state, step=step)
    else:
        _update(optimizer, norm)
        scheduler.step(1)
    return StepResult(
        sums=_total(sums, state.device),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        is_skipped=overflowed,
    )


def run_schedule(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[MicroBatch],
    *,
    scale: torch.Tensor,
    forward_only: bool,
) -> list[torch.Tensor]:
    """Runs Megatron-Core's pipeline schedule over micro-batches on the device.

    Args:
        chunks: Wrapped model chunks of this rank.
        batches: Micro-batches of one data-parallel rank.
        scale: Scalar on the device that turns a micro-batch's summed loss into what is
            differentiated.
        forward_only: Evaluate instead of train.

    Returns:
        On the last stage float64 [3] a micro-batch, as in `StepResult.sums`; elsewhere nothing.
    """
    shapes = {batch.input_ids.shape for batch in batches}
    micro_batch_size, seq_length = max(shapes)
    # Stages exchange shapes only when they differ: it costs a message a micro-batch.
    chunks[0].config.variable_seq_lengths = len(shapes) > 1
    loss_gradient = None
    if not forward_only:
        loss_gradient = _loss_gradient(scale, len(batches), chunks[0].config)
    return get_forward_backward_func()(
        forward_step_func=functools.partial(_forward, scale, loss_gradient),
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def _loss_gradient(
    scale: torch.Tensor, num_microbatches: int, config: TransformerConfig
) -> torch.Tensor:
    """The gradient that the loss of every token will get, which the output layer wants to know.

    Source: `backward_step` and `forward_step_calc_loss` of Megatron-Core's schedules multiply by
    the loss scale of float16 and divide by the number of micro-batches; `_loss` does the rest.
    """
    one = torch.ones((), device=scale.device)
    if config.grad_scale_func is not None:
        one = config.grad_scale_func(one)
    # Half-precision wrappers round every argument that is float32.
    return (scale * (one / num_microbatches)).double().reshape(())


def _forward(
    scale: torch.Tensor,
    loss_gradient: torch.Tensor | None,
    batches: Iterator[MicroBatch],
    chunk: DistributedDataParallel,
) -> tuple[torch.Tensor, functools.partial]:
    batch = next(batches)
    output = chunk(
        batch.input_ids,
        batch.position_ids,
        labels=batch.labels,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        padding_mask=_padding_mask(batch) if chunk.config.num_moe_experts else None,
        label_positions=batch.label_positions,
        loss_gradient=loss_gradient,
    )
    return output, functools.partial(_loss, labels=batch.labels, scale=scale)


def _padding_mask(batch: MicroBatch) -> torch.Tensor | None:
    """Mask bool [batch, seq], True behind the real tokens, which experts need not balance.

    None without padding, and for rows, whose lengths are not kept.
    """
    has_known_end = batch.cu_seqlens is not None or batch.num_tokens == 0
    if not has_known_end or batch.num_tokens == batch.input_ids.numel():
        return None
    positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return (positions >= batch.num_tokens).expand(batch.input_ids.shape)


def _loss(
    output: tuple[torch.Tensor, torch.Tensor], *, labels: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scalar to differentiate, and what is reported."""
    losses, correct = output
    loss_sum = losses.sum()
    detached = loss_sum.detach()
    sums = torch.stack(
        [detached.double(), correct.sum().double(), (labels != IGNORED).sum().double()]
    )
    # An infinite loss can have finite gradients. Times 0 it is NaN, and so are the gradients then:
    # the gradient norm, which every rank looks at anyway, finds both.
    poison = 1 + 0 * detached
    return loss_sum * (scale * poison), sums


def _loss_scale(batches: Sequence[MicroBatch], state: ParallelState) -> torch.Tensor:
    """One over the labelled tokens of the global batch, undoing the means taken elsewhere.

    The schedule divides by the number of micro-batches, and gradient reduction by that of
    data-parallel ranks. The count stays on the device: nobody waits for it.
    """
    num_labels = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
    if state.layout.dp_size > 1:
        dist.all_reduce(num_labels, group=state.groups.dp)
    return len(batches) * state.layout.dp_size / num_labels.clamp(min=1)


def _grad_norm(optimizer: ChainedOptimizer, device: torch.device) -> torch.Tensor:
    """Global gradient norm, a scalar on the device.

    Each part of the optimizer (dense parameters, experts) knows the ranks that share its gradients.
    Megatron-Core's own function reads the norm of every tensor back to the host when neither
    Transformer Engine nor apex is there.
    """
    squares = torch.zeros((), device=device)
    for part in optimizer.chained_optimizers:
        square = get_total_norm(part.get_main_grads_for_grad_norm()).to(device).square()
        group = part.get_grad_stats_parallel_group()
        if group.size() > 1:
            dist.all_reduce(square, group=group)
        squares += square
    return squares.sqrt()


def _prepare_update(optimizer: ChainedOptimizer, grad_norm: torch.Tensor) -> None:
    """What the host can do for the update before it waits for the gradient norm."""
    for part in optimizer.chained_optimizers:
        limit, inner = part.config.clip_grad, part.optimizer
        if isinstance(inner, AdamW):
            inner.gradient_factor = None
            if limit > 0:
                inner.gradient_factor = (limit / (grad_norm + _SMALLEST_NORM)).clamp(max=1.0)
            inner.locate()


def _update(optimizer: ChainedOptimizer, grad_norm: torch.Tensor) -> None:
    """Clips gradients and steps; `ChainedOptimizer.step` would not let us look in between."""
    for part in optimizer.chained_optimizers:
        # `AdamW` clips while it reads them.
        if part.config.clip_grad > 0 and not isinstance(part.optimizer, AdamW):
            clip_grads_with_norm_(part.get_parameters(), part.config.clip_grad, grad_norm)
    optimizer.step_with_ready_grads()


def _total(sums: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    if sums:
        return torch.stack(list(sums)).sum(dim=0)
    return torch.zeros(3, dtype=torch.float64, device=device)


def _stop_or_skip(
    batches: Sequence[MicroBatch],
    sums: Sequence[torch.Tensor],
    *,
    can_skip: bool,
    state: ParallelState,
    step: int,
) -> None:
    """Raises, unless the loss itself is finite and a smaller loss scale can help (`can_skip`).

    This path is rare, so it may talk: all ranks come here together.
    """
    is_finite = [bool(torch.isfinite(micro_batch[0])) for micro_batch in sums]
    # Ranks without the loss have no sums and send nothing.
    ours = [(batch.sample_ids, ok) for batch, ok in zip(batches, is_finite, strict=False)]
    gathered: list[list[tuple[tuple[int, ...], bool]]] = [[]] * state.layout.world_size
    dist.all_gather_object(gathered, ours)
    entries = [entry for rank in gathered for entry in rank]
    culprits = {sample for ids, ok in entries if not ok for sample in ids}
    if can_skip and all(ok for _, ok in entries):
        return
    what = "loss" if culprits else "gradient norm"
    where = "samples of the micro-batches with it" if culprits else "samples of the step"
    samples = sorted(culprits or {sample for ids, _ in entries for sample in ids})
    names = ", ".join(str(sample) for sample in samples[:_MAX_NAMED_SAMPLES])
    more = len(samples) - _MAX_NAMED_SAMPLES
    raise NonFiniteError(
        f"step {step}: the {what} is not finite, no update was made; {where}: {names}"
        + (f" and {more} more" if more > 0 else "")
    )
