"""Queries, keys and values from the product of their linear, in one kernel each way.

The one thing to know: between the product and attention, memory is read and written once: heads are
taken apart, queries and keys normed and rotated, in float32 and rounded where the separate steps
round. One by one these steps move the same numbers five times. Backward starts again from the
product, the only large tensor that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from mtrain.model.kernels.heads import (
    inverse_norm,
    load_angles,
    load_head,
    load_weight,
    norm_gradient,
    store_head,
    store_total,
)

__all__ = ["HeadLayout", "split_norm_rotate"]

_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayout:
    """What the last axis of the product holds, and the norm of queries and keys.

    Attributes:
        num_groups: Groups of heads on this rank: some query heads, one key head, one value head.
        queries_per_group: Query heads of a group.
        head_dim: Channels of a head.
        eps: Added to the mean square.
        is_zero_centered: Whether the factor of the norm is 1 + weight.
    """

    num_groups: int
    queries_per_group: int
    head_dim: int
    eps: float = 0.0
    is_zero_centered: bool = False


def split_norm_rotate(
    mixed: torch.Tensor,
    cosines_and_sines: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    **layout: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes heads apart; norms and rotates queries and keys.

    Args:
        mixed: [seq, batch, groups * (queries_per_group + 2) * head_dim], or the last axis split by
            groups; queries, key and value of a group lie one after the other.
        cosines_and_sines: float32 [2, seq, 1 or batch, 1, dim] of `RotaryEmbedding`, not
            interleaved; the leading `dim` channels turn. None: no rotation.
        query_weight: [head_dim] of the root-mean-square norm of queries; None: no norms.
        key_weight: Likewise.
        **layout: Fields of `HeadLayout`.

    Returns:
        Queries [seq, batch, heads, head_dim], keys and values [seq, batch, groups, head_dim].
    """
    return _SplitNormRotate.apply(
        mixed, cosines_and_sines, query_weight, key_weight, HeadLayout(**layout)
    )


class _SplitNormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        mixed: torch.Tensor,
        cosines_and_sines: torch.Tensor | None,
        query_weight: torch.Tensor | None,
        key_weight: torch.Tensor | None,
        layout: HeadLayout,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mixed = mixed.contiguous()
        seq, batch = mixed.shape[:2]
        shape = (seq, batch, layout.num_groups, layout.head_dim)
        query = mixed.new_empty(
            seq, batch, layout.num_groups * layout.queries_per_group, layout.head_dim
        )
        key, value = mixed.new_empty(shape), mixed.new_empty(shape)
        _forward_kernel[_grid(seq * batch, layout)](
            *(mixed, *_rotation(cosines_and_sines, mixed)),
            *(_weight(query_weight, mixed), _weight(key_weight, mixed)),
            *(query, key, value, seq * batch, batch, layout.eps),
            **_constants(cosines_and_sines, query_weight, layout, batch),
        )
        ctx.save_for_backward(mixed, cosines_and_sines, query_weight, key_weight)
        ctx.layout = layout
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor | None, torch.Tensor | None, None]:
        mixed, cosines_and_sines, query_weight, key_weight = ctx.saved_tensors
        layout = ctx.layout
        seq, batch = mixed.shape[:2]
        grid = _grid(seq * batch, layout)
        grad_mixed = torch.empty_like(mixed)
        wants_weights = any(ctx.needs_input_grad[2:4])
        # Of every head a row of each program, which are added up in a fixed order.
        partial = None
        if wants_weights:
            shape = (layout.queries_per_group + 1, grid[0] * grid[1], layout.head_dim)
            partial = torch.empty(shape, dtype=torch.float32, device=mixed.device)
        _backward_kernel[grid](
            *(mixed, *_rotation(cosines_and_sines, mixed)),
            *(_weight(query_weight, mixed), _weight(key_weight, mixed)),
            *(grad.contiguous() for grad in grads),
            *(grad_mixed, mixed if partial is None else partial),
            *(seq * batch, batch, layout.eps),
            WANTS_WEIGHTS=wants_weights,
            **_constants(cosines_and_sines, query_weight, layout, batch),
        )
        grad_weights = (None, None)
        if partial is not None:
            of_heads = partial.sum(dim=1)
            totals = (of_heads[:-1].sum(dim=0), of_heads[-1])
            grad_weights = [total.to(query_weight.dtype) for total in totals]
        return grad_mixed, None, *grad_weights, None


def _grid(num_tokens: int, layout: HeadLayout) -> tuple[int, int]:
    return -(-num_tokens // _BLOCK_TOKENS), layout.num_groups


def _rotation(
    cosines_and_sines: torch.Tensor | None, unused: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if cosines_and_sines is None:
        return unused, unused
    cosines_and_sines = cosines_and_sines.contiguous()
    return cosines_and_sines[0], cosines_and_sines[1]


def _weight(weight: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    return unused if weight is None else weight


def _constants(
    cosines_and_sines: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    layout: HeadLayout,
    batch: int,
) -> dict[str, int | bool]:
    """What kernels are compiled for."""
    head_dim = layout.head_dim
    dim = head_dim if cosines_and_sines is None else cosines_and_sines.shape[-1]
    rest = head_dim - dim
    return {
        "GROUPS": layout.num_groups,
        "QUERIES": layout.queries_per_group,
        "HEAD_DIM": head_dim,
        "HALF": dim // 2,
        "BLOCK_TOKENS": _BLOCK_TOKENS,
        "BLOCK_HALF": triton.next_power_of_2(dim // 2),
        # Triton has no empty blocks.
        "BLOCK_REST": triton.next_power_of_2(max(1, rest)),
        "HAS_REST": rest > 0,
        "HAS_NORM": query_weight is not None,
        "IS_ZERO_CENTERED": layout.is_zero_centered,
        "HAS_ROPE": cosines_and_sines is not None,
        # One document a row: positions are those of the sequence in every row.
        "SHARES_ANGLES": cosines_and_sines is not None and cosines_and_sines.shape[2] != batch,
        "num_warps": 4,
    }


# fmt: off
@triton.jit
def _forward_kernel(
    mixed, cosines, sines, query_weight, key_weight, query, key, value, num_tokens, batch, eps,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    HAS_REST: tl.constexpr, HAS_NORM: tl.constexpr, IS_ZERO_CENTERED: tl.constexpr,
    HAS_ROPE: tl.constexpr, SHARES_ANGLES: tl.constexpr,
):
    """The heads of one group of a few tokens."""
    group = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = rows < num_tokens
    if HAS_ROPE:
        cosine, sine = load_angles(
            cosines, sines, rows, is_token, batch, HALF, BLOCK_HALF, SHARES_ANGLES)
    mixed += group * (QUERIES + 2) * HEAD_DIM
    stride = GROUPS * (QUERIES + 2) * HEAD_DIM
    for head in tl.static_range(QUERIES + 2):
        first, second, rest = load_head(
            mixed + head * HEAD_DIM, rows, is_token, stride,
            HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, HAS_REST)
        if HAS_NORM and head <= QUERIES:
            first_weight, second_weight, rest_weight = load_weight(
                query_weight if head < QUERIES else key_weight,
                HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, IS_ZERO_CENTERED)
            inverse = inverse_norm(first, second, rest, eps, HEAD_DIM)
            # Rounded, as the norm by itself rounds what the rotation reads.
            first = (first * inverse * first_weight).to(query.dtype.element_ty).to(tl.float32)
            second = (second * inverse * second_weight).to(query.dtype.element_ty).to(tl.float32)
            rest = rest * inverse * rest_weight
        if HAS_ROPE and head <= QUERIES:
            turned = first * cosine - second * sine
            second = second * cosine + first * sine
            first = turned
        if head < QUERIES:
            output = query + (group * QUERIES + head) * HEAD_DIM
            width = GROUPS * QUERIES * HEAD_DIM
        else:
            output = (key if head == QUERIES else value) + group * HEAD_DIM
            width = GROUPS * HEAD_DIM
        store_head(
            output, rows, is_token, width, first, second, rest,
            HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, HAS_REST)


@triton.jit
def _backward_kernel(
    mixed, cosines, sines, query_weight, key_weight, grad_query, grad_key, grad_value, grad_mixed,
    grad_weights, num_tokens, batch, eps,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    HAS_REST: tl.constexpr, HAS_NORM: tl.constexpr, IS_ZERO_CENTERED: tl.constexpr,
    HAS_ROPE: tl.constexpr, SHARES_ANGLES: tl.constexpr, WANTS_WEIGHTS: tl.constexpr,
):
    """Gradients of the heads of one group of a few tokens."""
    group = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = rows < num_tokens
    if HAS_ROPE:
        cosine, sine = load_angles(
            cosines, sines, rows, is_token, batch, HALF, BLOCK_HALF, SHARES_ANGLES)
    first_of_group = group * (QUERIES + 2) * HEAD_DIM
    stride = GROUPS * (QUERIES + 2) * HEAD_DIM
    # Of every head a row of each program.
    total = grad_weights + (tl.program_id(0) * GROUPS + group) * HEAD_DIM
    rows_of_head = tl.num_programs(0) * GROUPS * HEAD_DIM
    for head in tl.static_range(QUERIES + 2):
        if head < QUERIES:
            grad = grad_query + (group * QUERIES + head) * HEAD_DIM
            width = GROUPS * QUERIES * HEAD_DIM
        else:
            grad = (grad_key if head == QUERIES else grad_value) + group * HEAD_DIM
            width = GROUPS * HEAD_DIM
        first, second, rest = load_head(
            grad, rows, is_token, width, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, HAS_REST)
        if HAS_ROPE and head <= QUERIES:
            turned = first * cosine + second * sine
            second = second * cosine - first * sine
            first = turned
        if HAS_NORM and head <= QUERIES:
            inputs = load_head(
                mixed + first_of_group + head * HEAD_DIM, rows, is_token, stride,
                HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, HAS_REST)
            weights = load_weight(
                query_weight if head < QUERIES else key_weight,
                HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, IS_ZERO_CENTERED)
            inverse = inverse_norm(inputs[0], inputs[1], inputs[2], eps, HEAD_DIM)
            if WANTS_WEIGHTS:
                store_total(
                    total + head * rows_of_head, first * inputs[0] * inverse,
                    second * inputs[1] * inverse, rest * inputs[2] * inverse,
                    HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, HAS_REST)
            first, second, rest = norm_gradient(
                first * weights[0], second * weights[1], rest * weights[2],
                inputs[0] * inverse, inputs[1] * inverse, inputs[2] * inverse, inverse, HEAD_DIM)
        store_head(
            grad_mixed + first_of_group + head * HEAD_DIM, rows, is_token, stride,
            first, second, rest, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, HAS_REST)
