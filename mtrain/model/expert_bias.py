"""Biases of experts that are stacked: every row gets that of its expert.

The one thing to know: gradients of biases are sums over the rows of an expert, taken by the grouped
matrix product that the weights use. It adds up in float32 whatever the dtype, in a fixed order, and
needs no copy of all rows.
"""

from typing import Any

import torch
from megatron.core.jit import jit_fuser
from torch.nn.functional import grouped_mm

# The kernels of GPUs want rows of a multiple of 16 bytes.
_ALIGNED = 8


def expert_of_rows(ends: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Which expert each row is of, without asking the device.

    Args:
        ends: int32 [experts], the row after the last of each expert.
        num_rows: Rows of all experts.

    Returns:
        int64 [num_rows].
    """
    rows = torch.arange(num_rows, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, rows, right=True)


def add_expert_bias(
    hidden: torch.Tensor,
    bias: torch.Tensor,
    ends: torch.Tensor,
    *,
    probs: torch.Tensor | None = None,
    share: float = 1.0,
) -> torch.Tensor:
    """Rows, each with the bias of its expert added: hidden + share * probs * bias.

    The gradient of the bias is that of the whole, not of the share: ranks that hold copies of a
    bias and add parts of it all have the gradient of what they add together.

    Args:
        hidden: [rows, width], sorted by expert.
        bias: [experts, width].
        ends: int32 [experts], the row after the last of each expert.
        probs: [rows], what each row's bias is multiplied with; None for 1.
        share: Part of the bias that this rank adds.

    Returns:
        [rows, width] in the dtype of `hidden`.
    """
    return _AddExpertBias.apply(hidden, bias, ends, probs, share)


class _AddExpertBias(torch.autograd.Function):
    """Keeps the bias and the probabilities for the backward pass, and nothing as large as rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        bias: torch.Tensor,
        ends: torch.Tensor,
        probs: torch.Tensor | None,
        share: float,
    ) -> torch.Tensor:
        experts = expert_of_rows(ends, hidden.shape[0])
        ctx.save_for_backward(bias, ends, experts, probs)
        ctx.share = share
        return _added(hidden, bias, experts, probs, share)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        bias, ends, experts, probs = ctx.saved_tensors
        grad_bias = _sum_by_expert(grad, ends, probs).to(bias.dtype)
        grad_probs = None
        if probs is not None:
            grad_probs = _products(grad, bias, experts, ctx.share).to(probs.dtype)
        return grad, grad_bias, None, grad_probs, None


@jit_fuser
def _added(
    hidden: torch.Tensor,
    bias: torch.Tensor,
    experts: torch.Tensor,
    probs: torch.Tensor | None,
    share: float,
) -> torch.Tensor:
    of_rows = bias[experts] * share
    if probs is not None:
        of_rows = of_rows * probs[:, None]
    return (hidden + of_rows).to(hidden.dtype)


@jit_fuser
def _products(
    grad: torch.Tensor, bias: torch.Tensor, experts: torch.Tensor, share: float
) -> torch.Tensor:
    return (grad.float() * bias[experts].float()).sum(dim=-1) * share


def _sum_by_expert(
    rows: torch.Tensor, ends: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Weighted sums [experts, width] of the rows of each expert; of none they are zero."""
    if rows.shape[0] == 0:
        return rows.new_zeros(len(ends), rows.shape[1])
    factors = rows.new_zeros(rows.shape[0], _ALIGNED)
    factors[:, 0] = 1.0 if weights is None else weights
    return grouped_mm(factors.t(), rows.contiguous(), offs=ends)[:, 0]
