"""A stand-in for apex's kernel that adds weight gradients to the main gradient.

Megatron-Core's own linears ask for apex's `fused_weight_gradient_mlp_cuda`, an extension that is
compiled from source. Torch's products can do the same: accumulate into float32 from half-precision
factors. Without it every weight gradient is written in bfloat16, rounded, read again and added.
"""

from types import SimpleNamespace

import torch

__all__ = [
    "add_gradient",
    "add_product",
    "add_to_main_grad",
    "install_weight_gradients",
    "stand_in_gradient",
    "zero_if_old",
]


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, overwrites: bool = False
) -> None:
    """Adds `left @ right` to a total without rounding the product to the dtype of its factors.

    Args:
        total: [rows, columns], written to.
        left: [rows, inner].
        right: [inner, columns].
        overwrites: Whether to ignore what is in the total, even NaN.
    """
    beta = 0 if overwrites else 1
    if total.is_cuda and total.dtype == torch.float32 and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
        return
    if left.dtype != total.dtype:
        left, right = left.to(total.dtype), right.to(total.dtype)
    total.addmm_(left, right, beta=beta)


def add_to_main_grad(
    weight: torch.Tensor, output_grad: torch.Tensor, input_: torch.Tensor
) -> torch.Tensor:
    """Adds the gradient of a linear's weight to `weight.main_grad`.

    The first of a step is written over what the step before left, where
    `mtrain.training.data_parallel` asks for it.

    Args:
        weight: [out, in].
        output_grad: [rows, out].
        input_: [rows, in].

    Returns:
        What a function's backward pass returns for the weight, see `stand_in_gradient`.
    """
    overwrites = getattr(weight, "overwrites_main_grad", False)
    add_product(weight.main_grad, output_grad.t(), input_, overwrites=overwrites)
    weight.overwrites_main_grad = False
    weight.grad_added_to_main_grad = True
    return stand_in_gradient(weight)


def stand_in_gradient(weight: torch.Tensor) -> torch.Tensor:
    """What autograd gets where the gradient is in `main_grad` already; nobody reads it.

    Memory of the right size is there already.

    Source: Megatron-Core's data parallelism adds `grad` to `main_grad` in a hook of the parameter
    unless `grad_added_to_main_grad`. The hook must run in the device's thread of autograd, in one
    order on all ranks, which only a gradient that is a tensor ensures.
    """
    return weight.main_grad.view(-1).view(weight.dtype)[: weight.numel()].view(weight.shape)


def add_gradient(weight: torch.Tensor, grad: torch.Tensor) -> None:
    """Adds a gradient that comes from autograd, unless its function has done so.

    Args:
        weight: Any shape, with `main_grad`.
        grad: As the weight.
    """
    if weight.grad_added_to_main_grad:
        return
    zero_if_old(weight)
    weight.main_grad.add_(grad)


def zero_if_old(weight: torch.Tensor) -> None:
    """Empties a main gradient that is still that of the step before."""
    if getattr(weight, "overwrites_main_grad", False):
        weight.main_grad.zero_()
        weight.overwrites_main_grad = False


def _accumulate(
    total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor
) -> None:
    add_product(main_grad, grad_output.t(), total_input)


def install_weight_gradients() -> None:
    """Gives Megatron-Core's linears the kernel, where apex is not installed."""
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=_accumulate, wgrad_gemm_accum_fp16=_accumulate
        )
        layers._grad_accum_fusion_available = True
