"""Frozen linears of all local experts and their adapters as one function of autograd.

As `mtrain.lora.layers.fused`, with torch's grouped product: rows are sorted by expert. It knows no
accumulation, so what an adapter adds is added by a kernel, in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import grouped_mm

from mtrain.lora.layers.fused import Dropped
from mtrain.lora.layers.products import Scales, collected, spread_out

# Grouped products on GPUs want rows of a multiple of 16 bytes; numbers have at least two.
_COLUMN_MULTIPLE = 8


def frozen_grouped_linear(
    tokens: torch.Tensor,
    ends: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scales: Scales,
    dropped: Dropped | None,
) -> torch.Tensor:
    """Each expert's linear and adapter on its rows.

    Args:
        tokens: [rows, in], sorted by expert, at least one; of the dtype of the weight.
        ends: int32 [experts], the row after the last of each expert.
        weight: [experts, out, in]; gets no gradient.
        lora_a: [experts, num_adapted * rank, in]; of any dtype, as `lora_b`.
        lora_b: [experts, out, rank].
        scales: See `Scales`; all experts have the same.
        dropped: What A is applied to, if not to the tokens.

    Returns:
        [rows, out].
    """
    return _FrozenGroupedLinear.apply(tokens, lora_a, lora_b, weight, ends, scales, dropped)


class _FrozenGroupedLinear(torch.autograd.Function):
    """See `frozen_grouped_linear`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tokens: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        weight: torch.Tensor,
        ends: torch.Tensor,
        scales: Scales,
        dropped: Dropped | None,
    ) -> torch.Tensor:
        seen = tokens if dropped is None else dropped.values
        wide_b, scale = spread_out(lora_b, scales, tokens.dtype)
        a, wide_b = _padded(lora_a.to(tokens.dtype), wide_b)
        low_rank = _scaled(grouped_mm(seen, a.transpose(1, 2), offs=ends), scale)
        output = grouped_mm(tokens, weight.transpose(1, 2), offs=ends)
        output += grouped_mm(low_rank, wide_b.transpose(1, 2), offs=ends)
        mask = None if dropped is None else dropped.mask
        ctx.save_for_backward(seen, low_rank, a, wide_b, weight, ends, mask)
        ctx.scales, ctx.scale, ctx.num_columns = scales, scale, lora_a.shape[1]
        ctx.dropout_scale = 1.0 if dropped is None else dropped.scale
        ctx.dtypes = lora_a.dtype, lora_b.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, low_rank, a, wide_b, weight, ends, mask = ctx.saved_tensors
        needs_tokens, needs_a, needs_b, *_ = ctx.needs_input_grad
        a_dtype, b_dtype = ctx.dtypes
        grad = grad.contiguous()
        tokens_grad = a_grad = b_grad = None
        if needs_b:
            wide_grad = grouped_mm(grad.t(), low_rank, offs=ends)[..., : ctx.num_columns]
            # Megatron-Core sums gradients over ranks in place, and in vain if there are gaps.
            b_grad = collected(wide_grad, ctx.scales, b_dtype).contiguous()
        if needs_a or needs_tokens:
            low_grad = _scaled(grouped_mm(grad, wide_b, offs=ends), ctx.scale)
        if needs_a:
            wide_grad = grouped_mm(low_grad.t(), seen, offs=ends)[:, : ctx.num_columns]
            a_grad = wide_grad.to(a_dtype).contiguous()
        if needs_tokens:
            tokens_grad = grouped_mm(grad, weight, offs=ends)
            delta = grouped_mm(low_grad, a, offs=ends)
            if mask is None:
                tokens_grad += delta
            else:
                tokens_grad.addcmul_(delta, mask, value=ctx.dropout_scale)
        return tokens_grad, a_grad, b_grad, None, None, None, None


def _padded(a: torch.Tensor, wide_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A with rows of zero behind and B with columns of zero, as many as grouped products want."""
    missing = -a.shape[1] % _COLUMN_MULTIPLE
    if not missing:
        return a, wide_b
    return F.pad(a, (0, 0, 0, missing)), F.pad(wide_b, (0, missing))


def _scaled(low_rank: torch.Tensor, scale: float) -> torch.Tensor:
    """In place."""
    return low_rank if scale == 1 else low_rank.mul_(scale)
