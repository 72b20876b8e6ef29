"""SiLU of the gate times the other half, and the probability of a row, in one kernel each way.

The one thing to know: it is bound by memory. Forward reads and writes once; backward reads input
and gradient, and writes the gradient of both halves into one tensor, without joining them. Who did
not keep the output gets it from there once more, for one more write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["swiglu", "swiglu_backward"]

_BLOCK = 1024


def swiglu(hidden: torch.Tensor, probs: torch.Tensor | None = None) -> torch.Tensor:
    """Gated SiLU on a GPU, computed in float32.

    Args:
        hidden: [..., 2 * inner], gates first.
        probs: [...], what each row is multiplied with; None for 1.

    Returns:
        [..., inner] in the dtype of `hidden`.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    output = _SwiGLU.apply(rows, None if probs is None else probs.reshape(-1))
    return output.view(*hidden.shape[:-1], output.shape[-1])


def swiglu_backward(
    hidden: torch.Tensor,
    grad: torch.Tensor,
    probs: torch.Tensor | None = None,
    *,
    wants_output: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The backward pass of `swiglu`.

    Args:
        hidden: [..., 2 * inner], what it was given.
        grad: [..., inner], the gradient of its output.
        probs: [...], what it was given.
        wants_output: Whether its output is wanted once more; it has the bits that it had.

    Returns:
        The gradients of `hidden` and `probs`, and the output; None for what there is not.
    """
    hidden, grad = hidden.contiguous(), grad.contiguous()
    hidden_grad = torch.empty_like(hidden)
    probs_grad = None if probs is None else torch.empty_like(probs)
    output = torch.empty_like(grad, dtype=hidden.dtype) if wants_output else None
    if hidden.numel() > 0:
        inner = grad.shape[-1]
        _backward_kernel[(grad.numel() // inner,)](
            *(hidden, hidden if probs is None else probs, grad, hidden_grad),
            hidden if probs_grad is None else probs_grad,
            hidden if output is None else output,
            inner,
            HAS_PROBS=probs is not None,
            WRITES_OUTPUT=wants_output,
            BLOCK=_BLOCK,
        )
    return hidden_grad, probs_grad, output


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: torch.Tensor, probs: torch.Tensor | None) -> torch.Tensor:
        rows = rows.contiguous()
        num_rows, width = rows.shape
        output = rows.new_empty(num_rows, width // 2)
        if num_rows > 0:
            _forward_kernel[(num_rows,)](
                *(rows, rows if probs is None else probs, output, width // 2),
                HAS_PROBS=probs is not None,
                BLOCK=_BLOCK,
            )
        ctx.save_for_backward(rows, probs)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, probs = ctx.saved_tensors
        grad_rows, grad_probs, _ = swiglu_backward(rows, grad, probs)
        return grad_rows, grad_probs


@triton.jit
def _forward_kernel(rows, probs, output, inner, HAS_PROBS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs + row).to(tl.float32) if HAS_PROBS else 1.0
    for start in range(0, inner, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < inner
        gate = tl.load(rows + row * 2 * inner + columns, mask=mask).to(tl.float32)
        up = tl.load(rows + row * 2 * inner + inner + columns, mask=mask).to(tl.float32)
        tl.store(output + row * inner + columns, gate * tl.sigmoid(gate) * up * prob, mask=mask)


@triton.jit
def _backward_kernel(
    rows,
    probs,
    grad,
    grad_rows,
    grad_probs,
    output,
    inner,
    HAS_PROBS: tl.constexpr,
    WRITES_OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs + row).to(tl.float32) if HAS_PROBS else 1.0
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, inner, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < inner
        first = row * 2 * inner + columns
        gate = tl.load(rows + first, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(rows + first + inner, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(grad + row * inner + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if WRITES_OUTPUT:
            tl.store(output + row * inner + columns, silu * up * prob, mask=mask)
        if HAS_PROBS:
            total += upstream * silu * up
            upstream *= prob
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(grad_rows + first, upstream * up * slope, mask=mask)
        tl.store(grad_rows + first + inner, upstream * silu, mask=mask)
    if HAS_PROBS:
        tl.store(grad_probs + row, tl.sum(total, 0))
