"""Root-mean-square norm in one kernel each way.

The one thing to know: it is bound by memory. Backward reads input and gradient once and writes the
gradient; each program sums the gradient of the weight over its rows in registers, in float32, and
what programs found is added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["rms_norm"]

_PROGRAMS_OF_PROCESSOR = 8


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, *, is_zero_centered: bool = False
) -> torch.Tensor:
    """The norm over the last axis on a GPU, computed in float32 and rounded once.

    Args:
        hidden: [..., hidden_size].
        weight: [hidden_size].
        eps: Added to the mean square.
        is_zero_centered: Whether the factor is 1 + weight.

    Returns:
        [..., hidden_size] in the dtype of `hidden`.
    """
    return _RMSNorm.apply(hidden, weight, eps, is_zero_centered)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        is_zero_centered: bool,
    ) -> torch.Tensor:
        hidden = hidden.contiguous()
        size = hidden.shape[-1]
        num_rows = hidden.numel() // size
        output = torch.empty_like(hidden)
        inverse = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
        if num_rows > 0:
            _forward_kernel[(num_rows,)](
                *(hidden, weight, output, inverse, size, eps),
                IS_ZERO_CENTERED=is_zero_centered,
                **_blocks(size),
            )
        ctx.save_for_backward(hidden, weight, inverse)
        ctx.is_zero_centered = is_zero_centered
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        hidden, weight, inverse = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[1]
        size, num_rows = hidden.shape[-1], inverse.numel()
        num_programs = min(num_rows, _PROGRAMS_OF_PROCESSOR * _num_processors(hidden.device))
        grad_hidden = torch.empty_like(hidden)
        # Of every program a row.
        partial = None
        if wants_weight:
            shape = (num_programs, size)
            partial = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        if num_rows > 0:
            _backward_kernel[(num_programs,)](
                *(hidden, weight, inverse, grad.contiguous(), grad_hidden),
                *(inverse if partial is None else partial, num_rows, size),
                IS_ZERO_CENTERED=ctx.is_zero_centered,
                WANTS_WEIGHT=wants_weight,
                **_blocks(size),
            )
        grad_weight = None if partial is None else partial.sum(dim=0).to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(size: int) -> dict[str, int]:
    """A program holds whole rows."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 1024))}


@triton.jit
def _forward_kernel(
    hidden, weight, output, inverse, size, eps, IS_ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    values = tl.load(hidden + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if IS_ZERO_CENTERED:
        factor += 1.0
    scale = tl.rsqrt(tl.sum(values * values, 0) / size + eps)
    tl.store(output + row * size + columns, values * scale * factor, mask=mask)
    tl.store(inverse + row, scale)


@triton.jit
def _backward_kernel(
    hidden,
    weight,
    inverse,
    grad,
    grad_hidden,
    grad_weight,
    num_rows,
    size,
    IS_ZERO_CENTERED: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if IS_ZERO_CENTERED:
        factor += 1.0
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    row = tl.program_id(0).to(tl.int64)
    while row < num_rows:
        places = row * size + columns
        scale = tl.load(inverse + row)
        normed = tl.load(hidden + places, mask=mask, other=0.0).to(tl.float32) * scale
        upstream = tl.load(grad + places, mask=mask, other=0.0).to(tl.float32)
        if WANTS_WEIGHT:
            total += upstream * normed
        upstream *= factor
        mean = tl.sum(upstream * normed, 0) / size
        tl.store(grad_hidden + places, scale * (upstream - normed * mean), mask=mask)
        row += tl.num_programs(0)
    if WANTS_WEIGHT:
        tl.store(grad_weight + tl.program_id(0) * size + columns, total, mask=mask)
