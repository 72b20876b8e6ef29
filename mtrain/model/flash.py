"""Torch's variable-length flash attention, without the cost of its public function, with sinks.

The public function is a custom operator that is registered in Python, which the host has to go
through for every layer.

The one thing to know: a sink is a score more in the softmax of every query that no value answers.
The kernels need not know it. They give the output without sinks and the logarithm of its softmax's
denominator; with that of all scores in its place, the backward kernel's gradients of queries, keys
and values are those with sinks, since it rebuilds every weight as exp(score - denominator).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.jit import jit_fuser


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashArguments:
    """What the kernels are told besides tensors.

    Attributes:
        scale: Factor on the scores.
        window: Tokens before itself that a token sees; None for all of them.
        longest: At least the tokens of the longest document.
    """

    scale: float
    window: int | None
    longest: int

    @property
    def bounds(self) -> tuple[int, int]:
        """Tokens seen before and after; -1 for all."""
        return (-1 if self.window is None else self.window, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashKernels:
    """The two kernels, as functions that autograd does not look into.

    Attributes:
        forward: (query, key, value, ends, arguments) -> output, the logarithm of the denominators
            float32 [heads, tokens], and tensors for `backward`.
        backward: (gradient of the output, query, key, value, output, logarithm, ends, arguments,
            tensors of `forward`) -> gradients of query, key and value.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    sinks: torch.Tensor | None,
    arguments: FlashArguments,
    *,
    kernels: FlashKernels | None = None,
) -> torch.Tensor:
    """Causal attention of documents in half precision on CUDA.

    Args:
        query: [tokens, heads, k_channels].
        key: [tokens, groups, k_channels].
        value: [tokens, groups, v_channels]; not wider than keys.
        ends: int32 [num_documents + 1], where documents begin.
        sinks: [heads], a score more for each head, or None.
        arguments: Scale, window, and the longest document.
        kernels: What computes attention with sinks; torch's kernels by default.

    Returns:
        [tokens, heads, v_channels].
    """
    v_channels = value.shape[-1]
    if v_channels < key.shape[-1]:
        # The kernels know heads of one size. What is added gives zeros, which are cut off again.
        value = F.pad(value, (0, key.shape[-1] - v_channels))
    kernels = kernels or TORCH_KERNELS
    output = FlashAttention.apply(query, key, value, sinks, ends, arguments, kernels)
    return output[..., :v_channels]


class FlashAttention(torch.autograd.Function):
    """Attention, with sinks from kernels without them; arguments as for `flash_attention`.

    With lse the logarithm of a query's denominator, a sink s leaves sigmoid(lse - s) of its output
    and makes its logarithm log(exp(lse) + exp(s)). The sink's own weight is what is missing to 1;
    its value is zero, so its gradient is minus the weight times output . gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        ends: torch.Tensor,
        arguments: FlashArguments,
        kernels: FlashKernels,
    ) -> torch.Tensor:
        """[tokens, heads, v_channels]."""
        output, logarithms, state = kernels.forward(query, key, value, ends, arguments)
        assert logarithms.shape == (query.shape[1], query.shape[0])
        if sinks is not None:
            output, logarithms = _with_sinks(output, logarithms, sinks)
        ctx.save_for_backward(query, key, value, sinks, ends, output, logarithms, *state)
        ctx.arguments, ctx.kernels = arguments, kernels
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key, value and sinks."""
        query, key, value, sinks, ends, output, logarithms, *state = ctx.saved_tensors
        grads = ctx.kernels.backward(
            grad, query, key, value, output, logarithms, ends, ctx.arguments, tuple(state)
        )
        grad_sinks = None
        if sinks is not None:
            grad_sinks = _sink_gradient(grad, output, logarithms, sinks)
        return *grads, grad_sinks, None, None, None


@jit_fuser
def _with_sinks(
    output: torch.Tensor, logarithms: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [tokens, heads, head_dim] and logarithms [heads, tokens] of more scores."""
    scores = sinks.float()[:, None]
    share = torch.sigmoid(logarithms - scores).t().unsqueeze(-1)
    return (output * share).to(output.dtype), torch.logaddexp(logarithms, scores)


@jit_fuser
def _sink_gradient(
    grad: torch.Tensor, output: torch.Tensor, logarithms: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    """[heads]."""
    weights = torch.exp(sinks.float()[:, None] - logarithms)
    products = (grad.float() * output.float()).sum(dim=-1)
    return -(weights * products.t()).sum(dim=1).to(sinks.dtype)


def _forward_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    arguments: FlashArguments,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    before, after = arguments.bounds
    output, logarithms, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        ends,
        ends,
        arguments.longest,
        arguments.longest,
        0.0,
        arguments.window is None,
        return_debug_mask=False,
        scale=arguments.scale,
        window_size_left=before,
        window_size_right=after,
    )
    return output, logarithms, (rng_state, unused)


def _backward_kernel(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logarithms: torch.Tensor,
    ends: torch.Tensor,
    arguments: FlashArguments,
    state: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    before, after = arguments.bounds
    return torch.ops.aten._flash_attention_backward(
        grad,
        query,
        key,
        value,
        output,
        logarithms,
        ends,
        ends,
        arguments.longest,
        arguments.longest,
        0.0,
        arguments.window is None,
        *state,
        scale=arguments.scale,
        window_size_left=before,
        window_size_right=after,
    )


# As `torch.nn.attention.varlen` calls them, which throws the gradient of the logarithms away.
TORCH_KERNELS = FlashKernels(forward=_forward_kernel, backward=_backward_kernel)
