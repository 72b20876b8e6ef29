"""A frozen linear and its adapter as one function, where nothing is communicated inside.

Beside the frozen linear there are the two low-rank products forward and four backward, and nothing
else that grows with the tokens: what belongs to the linear's output, or to the gradient of its
input, is accumulated by the products. Autograd would add the gradients of the two that read the
input in a kernel of its own, and an addition out of place copies first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from mtrain.lora.layers.products import Scales, collected, scaled_product, spread_out

__all__ = ["Dropped", "frozen_linear"]


class Dropped(NamedTuple):
    """An input after dropout; `values` is `input * mask * scale`.

    Attributes:
        values: What is left, shaped like the input. Has no gradient.
        mask: bool, what was kept.
        scale: 1 / (1 - probability).
    """

    values: torch.Tensor
    mask: torch.Tensor
    scale: float


def frozen_linear(
    input_: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scales: Scales,
    dropped: Dropped | None,
) -> torch.Tensor:
    """`input @ weight.t() + bias` plus the adapter.

    Args:
        input_: [..., in], of the dtype of the weight.
        weight: [out, in]; gets no gradient.
        bias: [out]; gets no gradient.
        lora_a: [num_adapted * rank, in]; of any dtype, as `lora_b`.
        lora_b: [out, rank].
        scales: See `Scales`.
        dropped: What A is applied to, if not to the input.

    Returns:
        [..., out].
    """
    return _FrozenLinear.apply(input_, lora_a, lora_b, weight, bias, scales, dropped)


class _FrozenLinear(torch.autograd.Function):
    """See `frozen_linear`. The scale enters where something gets the rank's width."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        input_: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scales: Scales,
        dropped: Dropped | None,
    ) -> torch.Tensor:
        rows = input_.flatten(0, -2)
        seen = rows if dropped is None else dropped.values.flatten(0, -2)
        a = lora_a.to(rows.dtype)
        wide_b, scale = spread_out(lora_b, scales, rows.dtype)
        low_rank = scaled_product(seen, a.t(), scale)
        # Of the right shape at once: views that leave a function cannot be changed in place.
        output = rows.new_empty(*input_.shape[:-1], weight.shape[0])
        _write_sum(
            output.view(-1, weight.shape[0]),
            frozen=(rows, weight.t()),
            low_rank=(low_rank, wide_b.t()),
        )
        if bias is not None:
            output += bias
        mask = None if dropped is None else dropped.mask
        ctx.save_for_backward(seen, low_rank, a, wide_b, weight, mask)
        ctx.scales, ctx.scale = scales, scale
        ctx.dropout_scale = 1.0 if dropped is None else dropped.scale
        ctx.dtypes = lora_a.dtype, lora_b.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, low_rank, a, wide_b, weight, mask = ctx.saved_tensors
        needs_input, needs_a, needs_b, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        a_dtype, b_dtype = ctx.dtypes
        input_grad = a_grad = b_grad = None
        if needs_b:
            b_grad = collected(torch.mm(rows.t(), low_rank), ctx.scales, b_dtype)
        if needs_a or needs_input:
            low_grad = scaled_product(rows, wide_b, ctx.scale)
        if needs_a:
            a_grad = torch.mm(low_grad.t(), seen).to(a_dtype)
        if needs_input:
            input_grad = rows.new_empty(*grad.shape[:-1], weight.shape[1])
            _write_sum(
                input_grad.view(-1, weight.shape[1]),
                frozen=(rows, weight),
                low_rank=(low_grad, a),
                mask=None if mask is None else mask.flatten(0, -2),
                scale=ctx.dropout_scale,
            )
        return input_grad, a_grad, b_grad, None, None, None, None


Pair = tuple[torch.Tensor, torch.Tensor]


def _write_sum(
    total: torch.Tensor,
    *,
    frozen: Pair,
    low_rank: Pair,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Writes a product plus another one, which may be masked and scaled.

    The small one is written first: the large one reads what it adds to while it multiplies, which
    costs less than a small product that reads and writes what is there. With factors of zero the
    result has the bits of the large one alone.

    Args:
        total: [rows, columns], written to.
        frozen: Factors of the large product.
        low_rank: Factors of the one with few columns between.
        mask: bool [rows, columns], where the low-rank product counts.
        scale: Factor of the low-rank product.
    """
    total.addmm_(*low_rank, beta=0, alpha=scale)
    if mask is not None:
        total.mul_(mask)
    total.addmm_(*frozen)
