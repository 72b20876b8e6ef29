"""Products with the factors of an adapter, in few kernels.

The one thing to know: an adapter costs little beside the frozen linear if nothing of the linear's
width is written twice or copied. So what an adapter adds is added in place, as the accumulation of
a matrix product, and its scale is the factor of a product, not a kernel of its own. Autograd does
not see into these functions, so their gradients are written here too.
"""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

# Columns of a factor up to which kernels of ours multiply by it.
MOST_COLUMNS_FOR_KERNELS = 128
# One number, or float32 [out, num_adapted]: the scale of each projection at its rows, else 0.
Scales = torch.Tensor | float


def spread_out(
    lora_b: torch.Tensor, scales: Scales, dtype: torch.dtype
) -> tuple[torch.Tensor, float]:
    """B with a column for every row of A, so that one product with A serves all projections.

    A row of the result has the numbers of `lora_b` in the columns of its own projection, times
    its scale, and zeros elsewhere. Not for autograd: see `collected`.

    Args:
        lora_b: [..., out, rank].
        scales: See `Scales`.
        dtype: Of the result; it is rounded to once.

    Returns:
        [..., out, num_adapted * rank], and a number that it has yet to be multiplied with. If that
        is all there is to do and the dtype is right, it is `lora_b` itself.
    """
    if not isinstance(scales, torch.Tensor):
        return lora_b.to(dtype), scales
    *rows, rank = lora_b.shape
    wide = lora_b.new_empty(*rows, scales.shape[-1], rank, dtype=dtype)
    torch.mul(lora_b.unsqueeze(-2), scales.unsqueeze(-1), out=wide)
    return wide.flatten(-2), 1.0


def collected(wide_grad: torch.Tensor, scales: Scales, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of `lora_b`, [..., out, rank].

    Args:
        wide_grad: Gradient of what `spread_out` returned, times the number; written to.
        scales: As for `spread_out`.
        dtype: Of the result.
    """
    if isinstance(scales, torch.Tensor):
        parts = wide_grad.unflatten(-1, (scales.shape[-1], -1))
        # All but one of the summands are zero.
        wide_grad = parts.mul_(scales.unsqueeze(-1)).sum(-2)
    return wide_grad.to(dtype)


def scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * left @ right` in one kernel, [rows, columns]."""
    if scale == 1:
        return torch.mm(left, right)
    product = left.new_empty(left.shape[0], right.shape[1])
    return product.addmm_(left, right, beta=0, alpha=scale)


def add_up(
    output: torch.Tensor, low_rank: torch.Tensor, lora_b: torch.Tensor, scales: Scales
) -> torch.Tensor:
    """Applies B to what A gave and adds it, in place where dtypes and strides allow it.

    Args:
        output: [..., out], of the linear itself. Nobody else may need it.
        low_rank: [..., num_adapted * rank], from `LoraFactors.down`.
        lora_b: [out, rank].
        scales: See `Scales`.

    Returns:
        [..., out].
    """
    return _AddUp.apply(output, low_rank, lora_b, scales)


class _AddUp(torch.autograd.Function):
    """Adds a low-rank product to its first argument, which passes through.

    The argument is written to and returned, but not marked as dirty. Marked, it would have to be
    rewritten in the graph, which autograd refuses for views that come out of another function, as
    those of Megatron-Core's reductions are. Unmarked, the result is a view of it, and its version
    counts up, so a function that had saved it would raise an error instead of computing with
    changed numbers.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        output: torch.Tensor,
        low_rank: torch.Tensor,
        lora_b: torch.Tensor,
        scales: Scales,
    ) -> torch.Tensor:
        wide_b, scale = spread_out(lora_b, scales, low_rank.dtype)
        ctx.save_for_backward(low_rank, wide_b)
        ctx.scales, ctx.scale, ctx.dtype = scales, scale, lora_b.dtype
        low_rows = low_rank.flatten(0, -2)
        if output.dtype != low_rank.dtype or not output.is_contiguous():
            delta = scaled_product(low_rows, wide_b.t(), scale)
            return output + delta.view(output.shape).to(output.dtype)
        output.view(-1, output.shape[-1]).addmm_(low_rows, wide_b.t(), alpha=scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        low_rank, wide_b = ctx.saved_tensors
        _, needs_low_rank, needs_b, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1]).to(low_rank.dtype)
        low_grad = b_grad = None
        if needs_low_rank:
            low_grad = scaled_product(rows, wide_b, ctx.scale).view(low_rank.shape)
        if needs_b:
            wide_grad = scaled_product(rows.t(), low_rank.flatten(0, -2), ctx.scale)
            b_grad = collected(wide_grad, ctx.scales, ctx.dtype)
        return grad, low_grad, b_grad, None
