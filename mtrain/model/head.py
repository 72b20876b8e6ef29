"""The output layer and its loss, chunk by chunk: logits of the whole sequence never exist.

The one thing to know: gradients are computed in the forward pass, while a chunk's logits are there.
Saving softmax statistics and making the logits again in backward would cost a fourth product beside
the three (logits, gradient of the hidden states, gradient of the weight): a third more work for the
head, which is a quarter of all weights in a 0.6B model. The price is that the gradient of the
weight, a sum over tokens, must know the gradient of the losses beforehand. The training step knows
it (`LossTargets.loss_gradient`), so the sum is added where it belongs at once and needs no memory
of its own. Backward compares what comes with what was promised, on the device: where they differ,
the gradient is NaN, and the step stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch.autograd.function import FunctionCtx, once_differentiable

from mtrain.model.loss import (
    IGNORED,
    LocalLabels,
    SoftmaxStatistics,
    local_labels,
    losses_and_accuracy,
    softmax_statistics,
    statistics_and_gradient,
)
from mtrain.platform.weight_gradients import add_product, stand_in_gradient

__all__ = ["LossTargets", "OutputLayer", "linear_cross_entropy"]

# Bytes of logits that exist at a time; their gradient is as large.
CHUNK_BYTES = 256 * 2**20
# Products of these many rows fill a GPU evenly, and there are few sizes: for a new one cuBLAS may
# have to load a kernel, which takes 4 ms.
_ROW_MULTIPLE = 128
_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTargets:
    """What the output layer needs to return losses instead of logits.

    Attributes:
        labels: int64 [batch, seq], -100 for no loss.
        label_positions: int64 [num_labels], the positions in the flattened `labels` that go through
            the head, ascending; all other labels are -100. None: all positions go.
        vocab_size: Words without padding.
        loss_gradient: float32 scalar on the device: what the gradient of every token's loss will
            be, if that is known. A weight with a float32 `main_grad` then gets its gradient there,
            in the forward pass: backward must follow before `main_grad` is read.
        has_other_gradient: Whether autograd gets a gradient of this weight from elsewhere in the
            same backward pass: it is the embedding's too, or the layer is applied several times.
    """

    labels: torch.Tensor
    label_positions: torch.Tensor | None
    vocab_size: int
    loss_gradient: torch.Tensor | None
    has_other_gradient: bool


class OutputLayer(ColumnParallelLinear):
    """Megatron-Core's output layer, which can return losses instead of logits.

    A subclass, because only the call of a module waits for parameters that data parallelism is
    still gathering. An adapter's subclass knows nothing of targets: do not give it any.
    """

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        targets: LossTargets | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Applies the layer.

        Args:
            input_: Hidden states [seq (/ tp_size), batch, hidden].
            weight: [padded_vocab / tp_size, hidden], if it is not the layer's own.
            runtime_gather_output: See Megatron-Core.
            targets: If given, the result are losses.

        Returns:
            Logits [seq, batch, padded_vocab / tp_size] and None, as Megatron-Core has it; or losses
            float32 [batch, seq] and correct bool [batch, seq], as of `vocab_parallel_loss`.
        """
        if targets is None:
            return super().forward(input_, weight, runtime_gather_output)
        assert self.bias is None, "the loss has no bias"
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=True, group=self.tp_group
            )
        positions = _positions(targets, multiple=_row_multiple(input_.device))
        rows, labels = _labelled_rows(input_, targets, positions)
        if self.allreduce_dgrad:
            rows = copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        losses, correct = linear_cross_entropy(
            rows,
            self.weight if weight is None else weight,
            labels,
            vocab_size=targets.vocab_size,
            tp_group=self.tp_group,
            loss_gradient=targets.loss_gradient,
            has_other_gradient=targets.has_other_gradient,
        )
        if positions is not None:
            # Added, because some positions may be there twice, the second time with a loss of zero.
            nothing = losses.new_zeros(targets.labels.numel())
            losses = nothing.index_add(0, positions, losses)
            correct = nothing.index_add(0, positions, correct.to(nothing.dtype)) > 0
        return losses.view_as(targets.labels), correct.view_as(targets.labels)


def _row_multiple(device: torch.device) -> int:
    return _ROW_MULTIPLE if device.type == "cuda" else 1


def _positions(targets: LossTargets, *, multiple: int) -> torch.Tensor | None:
    """The positions that go through the head, filled up to a multiple with the first one."""
    positions = targets.label_positions
    if positions is None:
        return None
    missing = -len(positions) % multiple
    return F.pad(positions, (0, missing)) if missing else positions


def _labelled_rows(
    hidden: torch.Tensor, targets: LossTargets, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [rows, hidden] and labels [rows]; none behind `label_positions`."""
    seq, batch, hidden_size = hidden.shape
    labels = targets.labels.reshape(-1)
    if positions is None:
        return hidden.transpose(0, 1).reshape(batch * seq, hidden_size), labels
    # Labels lie row by row, hidden states position by position.
    rows = positions if batch == 1 else positions % seq * batch + positions // seq
    labels = labels[positions]
    labels[len(targets.label_positions) :] = IGNORED
    return hidden.reshape(seq * batch, hidden_size).index_select(0, rows), labels


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    loss_gradient: torch.Tensor | None = None,
    has_other_gradient: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `hidden @ weight.t()`.

    Losses may get any gradients as long as the weight is frozen. A trained weight wants the same
    one for all of them, as `losses.sum()` gives it; if they differ, its gradient is NaN.

    Args:
        hidden: [tokens, hidden]; its gradient is this rank's share, which the caller adds up.
        weight: [padded_vocab / tp_size, hidden], this rank's words.
        labels: int64 [tokens]; -100 where there is no loss.
        vocab_size: Words without padding.
        tp_group: Ranks that share the vocabulary.
        loss_gradient: See `LossTargets`.
        has_other_gradient: See `LossTargets`.
        chunk_bytes: Bytes of logits that exist at a time; one token is the least.

    Returns:
        losses: float32 [tokens], 0 where the label is -100.
        correct: bool [tokens], False where the label is -100.
    """
    head = _Head(
        labels=local_labels(
            labels, local_size=weight.shape[0], vocab_size=vocab_size, tp_group=tp_group
        ),
        chunk_size=_chunk_size(hidden, weight, chunk_bytes),
        # Inside of a function autograd is always off.
        is_training=torch.is_grad_enabled(),
        adds_to_main_grad=loss_gradient is not None and _has_float32_main_grad(weight),
        has_other_gradient=has_other_gradient,
    )
    if loss_gradient is None:
        loss_gradient = torch.ones((), device=hidden.device)
    return _LinearCrossEntropy.apply(hidden, weight, loss_gradient, head)


def _has_float32_main_grad(weight: torch.Tensor) -> bool:
    """Whether Megatron-Core's data parallelism accumulates its gradient, without rounding."""
    return hasattr(weight, "main_grad") and weight.main_grad.dtype == torch.float32


def _chunk_size(hidden: torch.Tensor, weight: torch.Tensor, chunk_bytes: int) -> int:
    """Tokens of a chunk: chunks are of about the same size."""
    num_tokens = max(1, hidden.shape[0])
    most = max(1, chunk_bytes // (weight.shape[0] * hidden.element_size()))
    if most >= _ROW_MULTIPLE:
        most -= most % _ROW_MULTIPLE
    size = -(-num_tokens // -(-num_tokens // most))
    return min(most, -(-size // _ROW_MULTIPLE) * _ROW_MULTIPLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """What `_LinearCrossEntropy` knows beside its tensors.

    Attributes:
        labels: Of all tokens.
        chunk_size: Tokens.
        is_training: Whether gradients are wanted at all.
        adds_to_main_grad: Whether the weight's gradient goes to `weight.main_grad`.
        has_other_gradient: See `LossTargets`.
    """

    labels: LocalLabels
    chunk_size: int
    is_training: bool
    adds_to_main_grad: bool
    has_other_gradient: bool


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients for `loss_gradient`; backward rescales and hands them out."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        loss_gradient: torch.Tensor,
        head: _Head,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        trains_hidden = head.is_training and ctx.needs_input_grad[0]
        trains_weight = head.is_training and ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden) if trains_hidden else None
        weight_grad = _weight_grad(weight, head) if trains_weight else None
        grad_losses = torch.where(head.labels.has_label, loss_gradient, 0.0)
        statistics = [
            _one_chunk(
                hidden[chunk],
                weight,
                head.labels.chunk(chunk),
                grad_losses[chunk],
                hidden_grad=hidden_grad[chunk] if trains_hidden else None,
                weight_grad=weight_grad,
            )
            for chunk in _chunks(len(hidden), head.chunk_size)
        ]
        losses, correct = losses_and_accuracy(_joined(statistics, hidden.device), head.labels)
        ctx.head, ctx.weight = head, weight
        ctx.save_for_backward(
            loss_gradient, hidden_grad, None if head.adds_to_main_grad else weight_grad
        )
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_losses: torch.Tensor, _grad_correct: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        loss_gradient, hidden_grad, weight_grad = ctx.saved_tensors
        ratio = grad_losses / loss_gradient
        if hidden_grad is not None:
            hidden_grad = (hidden_grad * ratio[:, None]).to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * _the_one(ratio)).to(ctx.weight.dtype)
        elif ctx.needs_input_grad[1]:
            weight_grad = _settle_main_grad(ctx.weight, ratio, ctx.head)
        return hidden_grad, weight_grad, None, None


def _weight_grad(weight: torch.Tensor, head: _Head) -> torch.Tensor:
    """What the products of all chunks are added to, float32 [local_vocab, hidden]."""
    if head.adds_to_main_grad:
        return weight.main_grad
    return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)


def _chunks(num_tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, num_tokens, size):
        yield slice(start, min(num_tokens, start + size))


def _one_chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: LocalLabels,
    grad_losses: torch.Tensor,
    *,
    hidden_grad: torch.Tensor | None,
    weight_grad: torch.Tensor | None,
) -> SoftmaxStatistics:
    """Statistics of some tokens; writes `hidden_grad`, adds to `weight_grad`.

    A function, so that the logits are gone before the next chunk's are made.
    """
    logits = hidden @ weight.t()
    if hidden_grad is None and weight_grad is None:
        return softmax_statistics(logits, labels)
    statistics, grad = statistics_and_gradient(logits, labels, grad_losses)
    del logits
    if hidden_grad is not None:
        torch.mm(grad, weight, out=hidden_grad)
    if weight_grad is not None:
        add_product(weight_grad, grad.t(), hidden)
    return statistics


def _joined(chunks: list[SoftmaxStatistics], device: torch.device) -> SoftmaxStatistics:
    """The statistics of all tokens."""
    nothing = torch.empty(0, device=device)
    return SoftmaxStatistics(
        highest=torch.cat([nothing, *(chunk.highest for chunk in chunks)]),
        denominator=torch.cat([nothing, *(chunk.denominator for chunk in chunks)]),
        label_scores=torch.cat([nothing, *(chunk.label_scores for chunk in chunks)]),
    )


def _the_one(ratio: torch.Tensor) -> torch.Tensor:
    """The value that all have, a scalar on the device; NaN if there are several."""
    if ratio.numel() == 0:
        return ratio.new_ones(())
    lowest, highest = ratio.aminmax()
    return torch.where(lowest == highest, lowest, torch.nan)


def _settle_main_grad(
    weight: torch.Tensor, ratio: torch.Tensor, head: _Head
) -> torch.Tensor | None:
    """Checks what forward added to the main gradient; returns what autograd gets instead."""
    main_grad = weight.main_grad
    is_as_promised = ((ratio - 1).abs() <= _TOLERANCE).all()
    main_grad.view(-1)[:1] += torch.where(is_as_promised, 0.0, torch.nan)
    if head.has_other_gradient:
        return None
    weight.grad_added_to_main_grad = True
    return stand_in_gradient(weight)
