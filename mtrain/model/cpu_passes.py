"""Norm and rotation on a CPU in few passes over memory, with gradients written out.

The one thing to know: on a CPU nothing is compiled, so what autograd derives from a formula costs a
pass for every operation in it, and a buffer. Results differ from the formulas' by rounding alone.
"""

import torch
from torch.autograd.function import FunctionCtx, once_differentiable


class RootMeanSquareNorm(torch.autograd.Function):
    """`hidden / sqrt(mean(hidden^2) + eps) * weight` over the last axis, all in one dtype."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """[..., size], [size] -> [..., size]."""
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """The gradients of hidden states and, if it is trained, weight."""
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden * scale
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * normed).flatten(0, -2).sum(dim=0)
        hidden_grad = grad * weight
        along = (hidden_grad * normed).sum(dim=-1, keepdim=True).div_(-hidden.shape[-1])
        return hidden_grad.addcmul_(normed, along).mul_(scale), weight_grad, None


class Rotation(torch.autograd.Function):
    """Turns the pairs (i, i + dim / 2) of heads, whose gradient is turned back."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        """Heads [..., dim], cosines and sines that broadcast to them."""
        ctx.save_for_backward(cosines, sines)
        return _turned(heads, cosines, sines, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the heads."""
        return _turned(grad, *ctx.saved_tensors, -1), None, None


def _turned(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, direction: int
) -> torch.Tensor:
    result = heads * cosines
    first, second = heads.chunk(2, dim=-1)
    result_first, result_second = result.chunk(2, dim=-1)
    sines_first, sines_second = sines.chunk(2, dim=-1)
    # Not `addcmul_`, which rounds once: transformers rounds twice.
    result_first.sub_(second * sines_first, alpha=direction)
    result_second.add_(first * sines_second, alpha=direction)
    return result
