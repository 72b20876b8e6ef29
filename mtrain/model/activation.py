"""Activations of MLPs and experts.

The one thing to know: Megatron-Core recognises activations by identity, so these are its functions
and torch's. Its fused kernels take `F.gelu` for the tanh approximation, which is another function:
with gelu, leave `bias_activation_fusion` off.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl
from megatron.core.jit import jit_fuser
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.cpu_passes import SwiGLU
from mtrain.platform.cpu_speed import swiglu_gradient
from mtrain.platform.device import has_triton

Activation = Callable[[torch.Tensor], torch.Tensor]


def gelu_tanh(hidden: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(hidden, approximate="tanh")


_ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


def activation_function(name: str) -> Activation:
    """What `activation_func` of a `TransformerConfig` is for an activation's name.

    Raises:
        ValueError: There is no such activation.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not built; there are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def gated(
    hidden: torch.Tensor, config: TransformerConfig, probs: torch.Tensor | None = None
) -> torch.Tensor:
    """Activation of the gate times the other half, in one kernel.

    With `activation_func_clamp_value` the gate is cut off above it, and the other half on both
    sides; `glu_linear_offset` is added to the other half.

    Args:
        hidden: [..., 2 * inner], gates first.
        config: Gives activation, clamp and offset.
        probs: [...], what each row is multiplied with; None for 1.

    Returns:
        [..., inner] in the dtype of `hidden`.

    Source: transformers' `GptOssExperts`, whose gates are interleaved.
    """
    return _gated(
        hidden,
        probs,
        config.activation_func,
        config.activation_func_clamp_value,
        config.glu_linear_offset,
    )


def is_swiglu(config: TransformerConfig) -> bool:
    """Whether the gated activation of a model is what `swiglu` computes."""
    return (
        config.gated_linear_unit
        and config.activation_func is F.silu
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0.0
    )


def swiglu(hidden: torch.Tensor, probs: torch.Tensor | None = None) -> torch.Tensor:
    """SiLU of the gate times the other half, in one kernel.

    Args:
        hidden: [..., 2 * inner], gates first.
        probs: [...], what each row is multiplied with; None for 1.

    Returns:
        [..., inner] in the dtype of `hidden`.
    """
    if hidden.is_cuda and has_triton():
        from mtrain.model.kernels import swiglu as kernels

        return kernels.swiglu(hidden, probs)
    if probs is None:
        return bias_swiglu_impl(hidden, None) if hidden.is_cuda else SwiGLU.apply(hidden)
    return weighted_bias_swiglu_impl(hidden, None, probs.unsqueeze(-1))


def swiglu_backward(
    hidden: torch.Tensor, grad: torch.Tensor, *, wants_output: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The backward pass of `swiglu` without probabilities, in one kernel.

    Args:
        hidden: [..., 2 * inner], what it was given.
        grad: [..., inner], the gradient of its output.
        wants_output: Whether its output is wanted once more.

    Returns:
        The gradient of `hidden`, and the output or None.
    """
    if hidden.is_cuda and has_triton():
        from mtrain.model.kernels import swiglu as kernels

        hidden_grad, _, output = kernels.swiglu_backward(hidden, grad, wants_output=wants_output)
        return hidden_grad, output
    return swiglu_gradient(grad, hidden), swiglu(hidden) if wants_output else None


@jit_fuser
def _gated(
    hidden: torch.Tensor,
    probs: torch.Tensor | None,
    activation: Activation,
    clamp: float | None,
    offset: float,
) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(min=-clamp, max=clamp)
    output = activation(gate) * (up + offset)
    if probs is not None:
        output = output * probs.unsqueeze(-1)
    return output.to(hidden.dtype)
