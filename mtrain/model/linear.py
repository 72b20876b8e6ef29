"""Megatron-Core's linears without what only matters to several ranks, where there is one.

The one thing to know: the maths and the weights are Megatron-Core's. On one tensor-parallel rank
its forward pass still goes through functions for ranks that are not there; each costs the host as
much as a kernel, and small models wait for the host.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch.autograd.function import FunctionCtx, once_differentiable

from mtrain.model.norm import NormInput
from mtrain.model.swiglu_linear import swiglu_linear
from mtrain.platform.weight_gradients import add_to_main_grad

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
    """A row-parallel linear, which can apply SwiGLU to its input first.

    It is an argument of the call, because only the call of a module waits for parameters that data
    parallelism is still gathering.
    """

    def fuses_swiglu(self, hidden: torch.Tensor) -> bool:
        """Whether to leave SwiGLU of this tensor to the linear; an adapter's subclass says no.

        On a CPU keeping the activation takes less time than making it again.
        """
        return hidden.is_cuda and self.bias is None

    def forward(
        self, input_: torch.Tensor, *, applies_swiglu: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Applies the linear.

        Args:
            input_: [seq, batch, in / tp_size]; twice as wide in front of SwiGLU.
            applies_swiglu: Whether to multiply `swiglu(input_)`, which is then not kept for
                backward. There must be no bias.

        Returns:
            [seq (/ tp_size), batch, out], and a bias not yet added.
        """
        if applies_swiglu:
            assert self.bias is None, "see `fuses_swiglu`"
            return self._apply_to_swiglu(input_), None
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return _apply(self, input_)

    def _apply_to_swiglu(self, hidden: torch.Tensor) -> torch.Tensor:
        fuses = self.gradient_accumulation_fusion
        output = swiglu_linear(hidden, self.weight, fuses_weight_gradient=fuses)
        if self.tp_group.size() == 1:
            return output
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group)


def _apply(
    linear: ColumnLinear | RowLinear, input_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = linear.weight, linear.bias
    is_fused = linear.gradient_accumulation_fusion and weight.requires_grad
    if is_fused and hasattr(weight, "main_grad"):
        output = _AccumulatingLinear.apply(input_, weight, getattr(input_, "norm_input", None))
    else:
        output = F.linear(input_, weight)
    if linear.skip_bias_add or bias is None:
        return output, bias
    return output + bias, None


class _AccumulatingLinear(torch.autograd.Function):
    """`input @ weight.t()` that adds the gradient of its weight to `weight.main_grad`.

    An input that comes out of a norm is not kept, but made again of what went into it.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, input_: torch.Tensor, weight: torch.Tensor, norm_input: NormInput | None
    ) -> torch.Tensor:
        kept, ctx.options = (input_,), None
        if norm_input is not None:
            kept = (norm_input.hidden.detach(), norm_input.weight)
            ctx.options = {
                "eps": norm_input.eps,
                "is_zero_centered": norm_input.is_zero_centered,
            }
        ctx.save_for_backward(weight, *kept)
        return F.linear(input_, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, Any, None]:
        weight, input_, *norm_weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        input_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = torch.mm(rows, weight).view(input_.shape)
        if ctx.options is not None:
            input_ = NormInput(hidden=input_, weight=norm_weight[0], **ctx.options).normed()
        input_rows = input_.reshape(-1, input_.shape[-1])
        return input_grad, add_to_main_grad(weight, rows, input_rows), None
