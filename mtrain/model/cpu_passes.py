"""Norm, SwiGLU and rotation on a CPU in few passes over memory, with gradients written out.

The one thing to know: on a CPU nothing is compiled, so what autograd derives from a formula costs a
pass for every operation in it, and a buffer. Results differ from the formulas' by rounding alone.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from mtrain.platform.cpu_speed import swiglu_gradient


class RootMeanSquareNorm(torch.autograd.Function):
    """`hidden / sqrt(mean(hidden^2) + eps) * weight` over the last axis, all in one dtype."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """[..., size], [size] -> [..., size]."""
        scale = _inverse_root_mean_square(hidden, eps)
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """The gradients of hidden states and, if it is trained, weight."""
        hidden, weight, scale = ctx.saved_tensors
        size = hidden.shape[-1]
        products = grad * hidden
        product_rows, scale_rows = products.flatten(0, -2), scale.flatten()
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = torch.mv(product_rows.t(), scale_rows)
        along = torch.mv(product_rows, weight).mul_(scale_rows).mul_(scale_rows).div_(-size)
        # Their memory is in the cache, which a new tensor's is not.
        hidden_grad = torch.mul(grad, weight, out=products)
        hidden_grad.addcmul_(hidden, along.view_as(scale)).mul_(scale)
        return hidden_grad, weight_grad, None


class SwiGLU(torch.autograd.Function):
    """`silu(gate) * up`, which keeps the first factor for backward.

    Exponentials take as long as a pass over memory for each of several multiplications.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: torch.Tensor) -> torch.Tensor:
        """[..., 2 * inner], gates first -> [..., inner]."""
        gate, up = hidden.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(hidden, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of hidden states."""
        hidden, activated = ctx.saved_tensors
        return swiglu_gradient(grad, hidden, activated)


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


def split_norm_rotate(
    mixed: torch.Tensor,
    cosines_and_sines: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    *,
    num_groups: int,
    queries_per_group: int,
    head_dim: int,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes heads apart; norms and rotates queries and keys, all heads in the same operations.

    Args:
        mixed: [seq, batch, groups * (queries_per_group + 2) * head_dim], or the last axis split by
            groups; queries, key and value of a group lie one after the other.
        cosines_and_sines: float32 [2, seq, 1 or batch, 1, dim] of `RotaryEmbedding`, not
            interleaved; the leading `dim` channels turn. None: no rotation.
        query_weight: [head_dim] of the root-mean-square norm of queries; None: no norms.
        key_weight: Likewise.
        num_groups: Groups of heads.
        queries_per_group: Query heads of a group.
        head_dim: Channels of a head.
        eps: Added to the mean square.

    Returns:
        Queries [seq, batch, heads, head_dim], keys and values [seq, batch, groups, head_dim]; in
        memory row after row, see `swap_rows`.
    """
    heads = mixed.reshape(*mixed.shape[:2], num_groups, queries_per_group + 2, head_dim)
    weights = None
    if query_weight is not None:
        weights = torch.cat([query_weight.expand(queries_per_group, -1), key_weight[None]])
    return _SplitNormRotate.apply(heads, cosines_and_sines, weights, eps)


class _SplitNormRotate(torch.autograd.Function):
    """Heads [seq, batch, groups, queries + 2, dim]; weights [queries + 1, dim] or None."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        heads: torch.Tensor,
        cosines_and_sines: torch.Tensor | None,
        weights: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        result, scale = heads[..., :-1, :], None
        if weights is not None:
            scale = _inverse_root_mean_square(result, eps)
            result = (result * scale).mul_(weights)
        if cosines_and_sines is not None:
            result = _turned_in_part(result, cosines_and_sines, 1)
        ctx.save_for_backward(heads, cosines_and_sines, weights, scale)
        parts = result[..., :-1, :], result[..., -1:, :], heads[..., -1:, :]
        return tuple(_rows_first(part).flatten(2, 3).transpose(0, 1) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor | None, None]:
        """From the gradients of what forward returned."""
        heads, cosines_and_sines, weights, scale = ctx.saved_tensors
        result = torch.empty_like(heads)
        result[..., :-2, :] = query.unflatten(2, (heads.shape[2], -1))
        result[..., -2, :] = key
        result[..., -1, :] = value
        turned = result[..., :-1, :]
        grad, weights_grad = turned, None
        if cosines_and_sines is not None:
            grad = _turned_in_part(turned, cosines_and_sines, -1)
        if weights is not None:
            normed = heads[..., :-1, :] * scale
            products = grad * normed
            weights_grad = products.sum(dim=(0, 1, 2)) if ctx.needs_input_grad[2] else None
            along = products.mul_(weights).sum(dim=-1, keepdim=True).div_(-heads.shape[-1])
            grad = torch.mul(grad, weights, out=products).addcmul_(normed, along).mul_(scale)
        turned.copy_(grad)
        return result, None, weights_grad, None


def swap_rows(output: torch.Tensor) -> torch.Tensor:
    """Swaps the first two axes, in memory as well, of a tensor and of its gradient.

    Torch's attention on a CPU takes a third longer where tokens of a row are not neighbours: from
    one to the next there is often a power of two of bytes, for which a cache has few places.
    """
    return _SwapRows.apply(output)


class _SwapRows(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: FunctionCtx, output: torch.Tensor) -> torch.Tensor:
        return _rows_first(output)

    @staticmethod
    @once_differentiable
    def backward(_ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        return _rows_first(grad)


def _rows_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, 1).contiguous()


def _inverse_root_mean_square(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., size] -> [..., 1]."""
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()


def _turned_in_part(
    heads: torch.Tensor, cosines_and_sines: torch.Tensor, direction: int
) -> torch.Tensor:
    """Heads [seq, batch, groups, ..., head_dim] of which the leading channels are turned."""
    cosines, sines = cosines_and_sines.unsqueeze(3).unbind()
    dim = cosines.shape[-1]
    result = _turned(heads[..., :dim], cosines, sines, direction)
    return result if dim == heads.shape[-1] else torch.cat([result, heads[..., dim:]], dim=-1)
