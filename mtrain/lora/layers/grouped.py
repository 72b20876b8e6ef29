"""Frozen linears of all local experts and their adapters as one function of autograd.

As `mtrain.lora.layers.fused`, with torch's grouped product: rows are sorted by expert. It knows no
accumulation and is slow where one side has few columns, so on a GPU kernels of our own multiply by
factors and add, in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import grouped_mm

from mtrain.lora.layers.fused import Dropped
from mtrain.lora.layers.products import (
    MOST_COLUMNS_FOR_KERNELS,
    Scales,
    collected,
    spread_out,
)
from mtrain.platform.device import has_triton

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
        seen = (tokens if dropped is None else dropped.values).contiguous()
        wide_b, scale = spread_out(lora_b, scales, tokens.dtype)
        a, wide_b = _padded(lora_a.to(tokens.dtype), wide_b)
        low_rank = _narrow_product(seen, a.transpose(1, 2), ends, scale)
        output = grouped_mm(tokens, weight.transpose(1, 2), offs=ends)
        _add_low_rank(output, low_rank, wide_b.transpose(1, 2), ends)
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
        a_dtype, b_dtype = ctx.dtypes
        grad = grad.contiguous()
        low_grad, wide_grad = _narrow_product_and_gradient(grad, wide_b, low_rank, ends, ctx.scale)
        # Megatron-Core sums gradients over ranks in place, and in vain if there are gaps.
        wide_grad = wide_grad[..., : ctx.num_columns]
        b_grad = collected(wide_grad, ctx.scales, b_dtype).contiguous()
        a_grad = _factor_gradient(seen, low_grad, ends, a_dtype)
        a_grad = a_grad[:, : ctx.num_columns].contiguous()
        tokens_grad = None
        if ctx.needs_input_grad[0]:
            tokens_grad = grouped_mm(grad, weight, offs=ends)
            _add_low_rank(tokens_grad, low_grad, a, ends, mask=mask, scale=ctx.dropout_scale)
        return tokens_grad, a_grad, b_grad, None, None, None, None


def _has_kernels(wide: torch.Tensor, rank: int) -> bool:
    """Whether kernels of ours multiply with what has so few columns."""
    is_half = wide.is_cuda and wide.itemsize == 2
    return is_half and rank <= MOST_COLUMNS_FOR_KERNELS and has_triton()


def _narrow_product(
    wide: torch.Tensor, factor: torch.Tensor, ends: torch.Tensor, scale: float
) -> torch.Tensor:
    """`scale * wide @ factor` of each expert, [rows, rank].

    Args:
        wide: [rows, columns].
        factor: [experts, columns, rank].
        ends: int32 [experts].
        scale: Factor of the result.
    """
    if _has_kernels(wide, factor.shape[2]):
        from mtrain.lora.layers.narrow_products import narrow_product

        return narrow_product(wide, factor, ends, scale=scale)
    return _scaled(grouped_mm(wide, factor, offs=ends), scale)


def _factor_gradient(
    wide: torch.Tensor, narrow: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`narrow.t() @ wide` of each expert, [experts, rank, columns]."""
    if _has_kernels(wide, narrow.shape[1]):
        from mtrain.lora.layers.narrow_products import factor_gradient

        return factor_gradient(wide, narrow, ends, dtype=dtype)
    return grouped_mm(narrow.t(), wide, offs=ends).to(dtype)


def _narrow_product_and_gradient(
    wide: torch.Tensor, factor: torch.Tensor, narrow: torch.Tensor, ends: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_narrow_product`, and `wide.t() @ narrow` of each expert, [experts, columns, rank]."""
    if _has_kernels(wide, narrow.shape[1]):
        from mtrain.lora.layers.narrow_products import product_and_gradient

        return product_and_gradient(wide, factor, narrow, ends, scale=scale, dtype=wide.dtype)
    product = _narrow_product(wide, factor, ends, scale)
    return product, grouped_mm(wide.t(), narrow, offs=ends)


def _add_low_rank(
    output: torch.Tensor,
    low_rank: torch.Tensor,
    factor: torch.Tensor,
    ends: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """`output += scale * low_rank @ factor` of each expert, where the mask is.

    Args:
        output: [rows, columns], written to.
        low_rank: [rows, rank].
        factor: [experts, rank, columns].
        ends: int32 [experts].
        mask: bool [rows, columns].
        scale: Factor of what is added.
    """
    if _has_kernels(output, low_rank.shape[1]):
        from mtrain.lora.layers.low_rank_kernels import add_low_rank

        add_low_rank(output, low_rank, factor, ends, mask=mask, scale=scale)
        return
    delta = grouped_mm(low_rank, factor, offs=ends)
    if mask is None:
        output.add_(delta, alpha=scale)
    else:
        output.addcmul_(delta, mask, value=scale)


def _padded(a: torch.Tensor, wide_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A with rows of zero behind and B with columns of zero, as many as grouped products want."""
    missing = -a.shape[1] % _COLUMN_MULTIPLE
    if not missing:
        return a, wide_b
    return F.pad(a, (0, 0, 0, missing)), F.pad(wide_b, (0, missing))


def _scaled(low_rank: torch.Tensor, scale: float) -> torch.Tensor:
    """In place."""
    return low_rank if scale == 1 else low_rank.mul_(scale)
