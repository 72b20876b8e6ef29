"""Megatron-Core's linears without what only matters to several ranks, where there is one.

The one thing to know: the maths and the weights are Megatron-Core's. On one tensor-parallel rank
its forward pass still goes through functions for ranks that are not there; each costs the host as
much as a kernel, and small models wait for the host.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.autograd.function import FunctionCtx, once_differentiable

from mtrain.platform.weight_gradients import add_product

__all__ = ["ColumnLinear", "RowLinear"]


class ColumnLinear(ColumnParallelLinear):
    """A column-parallel linear."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[seq (/ tp_size), batch, in] -> [seq, batch, out / tp_size], and a bias not yet added."""
        if weight is not None or self.tp_group.size() > 1:
            return super().forward(input_, weight, runtime_gather_output)
        return _apply(self, input_)


class RowLinear(RowParallelLinear):
    """A row-parallel linear."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[seq, batch, in / tp_size] -> [seq (/ tp_size), batch, out], and a bias likewise."""
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return _apply(self, input_)


def _apply(
    linear: ColumnLinear | RowLinear, input_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = linear.weight, linear.bias
    is_fused = linear.gradient_accumulation_fusion and weight.requires_grad
    if is_fused and hasattr(weight, "main_grad"):
        output = _AccumulatingLinear.apply(input_, weight)
    else:
        output = F.linear(input_, weight)
    if linear.skip_bias_add or bias is None:
        return output, bias
    return output + bias, None


class _AccumulatingLinear(torch.autograd.Function):
    """`input @ weight.t()` that adds the gradient of its weight to `weight.main_grad`."""

    @staticmethod
    def forward(ctx: FunctionCtx, input_: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input_, weight)
        return F.linear(input_, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, Any]:
        input_, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        input_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = torch.mm(rows, weight).view(input_.shape)
        add_product(weight.main_grad, rows.t(), input_.reshape(-1, input_.shape[-1]))
        # See `mtrain.model.head` on why there is a gradient that nobody reads.
        weight.grad_added_to_main_grad = True
        return input_grad, torch.empty_like(weight)
