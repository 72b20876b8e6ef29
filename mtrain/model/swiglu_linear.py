"""SwiGLU and the linear behind it as one function, which keeps no activation for backward.

The one thing to know: of an MLP the activation is a third of what is as wide as its inner size, and
it follows from the other two thirds, which backward reads anyway: the kernel that makes their
gradients writes it as well, just before the product for the weight's gradient wants it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from mtrain.model.activation import swiglu, swiglu_backward
from mtrain.platform.weight_gradients import add_to_main_grad

__all__ = ["swiglu_linear"]


def swiglu_linear(
    hidden: torch.Tensor, weight: torch.Tensor, *, fuses_weight_gradient: bool
) -> torch.Tensor:
    """`swiglu(hidden) @ weight.t()`; for backward it keeps its two arguments and nothing else.

    Args:
        hidden: [..., 2 * inner], gates first, of the dtype of the weight.
        weight: [out, inner], trained or frozen.
        fuses_weight_gradient: Whether to add the gradient of the weight to `weight.main_grad`,
            where there is one.

    Returns:
        [..., out].
    """
    adds_to_main_grad = fuses_weight_gradient and hasattr(weight, "main_grad")
    return _SwiGLULinear.apply(hidden, weight, adds_to_main_grad)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, adds_to_main_grad: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.adds_to_main_grad = adds_to_main_grad
        return F.linear(swiglu(hidden), weight)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        rows, hidden_rows = grad.flatten(0, -2), hidden.flatten(0, -2)
        hidden_grad = weight_grad = None
        if needs_hidden:
            hidden_grad, activation = swiglu_backward(
                hidden_rows, torch.mm(rows, weight), wants_output=needs_weight
            )
            hidden_grad = hidden_grad.view(hidden.shape)
        elif needs_weight:
            activation = swiglu(hidden_rows)
        if needs_weight and ctx.adds_to_main_grad:
            weight_grad = add_to_main_grad(weight, rows, activation)
        elif needs_weight:
            weight_grad = torch.mm(rows.t(), activation)
        return hidden_grad, weight_grad, None
