"""Causal attention in packs of short documents, forward and backward without autograd.

The one thing to know: programs are dealt out by a map of blocks, which the device makes once for
all layers of a micro-batch (`block_map.py`). The host knows only how many there can be, so nothing
waits, and documents of a few tokens cost a program each instead of those of the longest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from mtrain.model.flash import FlashArguments, FlashKernels
from mtrain.model.kernels.block_map import SPACE, block_map
from mtrain.model.kernels.packed_attention_kernels import (
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)

__all__ = ["AttentionBlocks", "attention_blocks", "has_kernels", "packed_kernels", "supports"]

_HEAD_DIMS = (64, 128)
_ALIGNMENT = 16
_GROUP_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelShape:
    """What a kernel is compiled for.

    Attributes:
        rows: Tokens times query heads of a group that a program takes at once.
        keys: Keys that it takes at once.
        num_warps: Of a program.
        num_stages: Blocks that are loaded ahead.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def constants(self, query: torch.Tensor, key: torch.Tensor) -> dict[str, Any]:
        """Arguments of a kernel."""
        return {
            "QUERIES": query.shape[1] // key.shape[1],
            "HEAD_DIM": query.shape[2],
            "BLOCK_ROWS": self.rows,
            "BLOCK_KEYS": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By registers and shared memory two programs of each fit a processor of an H200 at 128 channels.
FORWARD = KernelShape(rows=64, keys=32, num_warps=4, num_stages=3)
QUERY_GRADIENT = KernelShape(rows=64, keys=64, num_warps=4, num_stages=2)
KEY_GRADIENT = KernelShape(rows=64, keys=64, num_warps=4, num_stages=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBlocks:
    """Maps of a micro-batch, from `block_map`.

    Attributes:
        of_queries: For outputs and gradients of queries.
        of_keys: For gradients of keys and values.
        group_size: Query heads of a key head.
    """

    of_queries: torch.Tensor
    of_keys: torch.Tensor
    group_size: int

    def copy_(self, other: AttentionBlocks) -> None:
        """Takes over maps of the same sizes."""
        self.of_queries.copy_(other.of_queries)
        self.of_keys.copy_(other.of_keys)


def has_kernels(group_size: int, head_dim: int) -> bool:
    """Whether there are kernels for so many query heads of a key head, of that size."""
    return group_size in _GROUP_SIZES and head_dim in _HEAD_DIMS


def supports(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: FlashArguments
) -> bool:
    """Whether the kernels can take these; shapes as for `flash_attention`."""
    heads, groups = query.shape[1], key.shape[1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and heads % groups == 0
        and has_kernels(heads // groups, query.shape[-1])
        and all(_is_aligned(tensor) for tensor in (query, key, value))
        and arguments.window is None
        # The highest product must be the highest score.
        and arguments.scale > 0
    )


def _is_aligned(tensor: torch.Tensor) -> bool:
    """As descriptors ask for, with channels of a head next to each other."""
    size = tensor.element_size()
    strides = tensor.stride()
    is_even = all(stride * size % _ALIGNMENT == 0 for stride in strides[:2])
    return strides[2] == 1 and is_even and tensor.data_ptr() % _ALIGNMENT == 0


def attention_blocks(ends: torch.Tensor, num_tokens: int, group_size: int) -> AttentionBlocks:
    """Maps for all layers of a micro-batch, without waiting for the device.

    Args:
        ends: int32 [num_documents + 1], where documents begin; they cover all tokens.
        num_tokens: Of the pack.
        group_size: Query heads of a key head.
    """
    assert FORWARD.rows == QUERY_GRADIENT.rows, "they share a map"
    return AttentionBlocks(
        of_queries=block_map(ends, num_tokens, FORWARD.rows // group_size),
        of_keys=block_map(ends, num_tokens, KEY_GRADIENT.keys, of_keys=True),
        group_size=group_size,
    )


def packed_kernels(blocks: AttentionBlocks) -> FlashKernels:
    """For `flash_attention`, where `supports` says so; group sizes are those of the maps."""

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        arguments: FlashArguments,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        output, logarithms = attend(query, key, value, blocks.of_queries, arguments.scale)
        return output, logarithms, (blocks.of_queries, blocks.of_keys)

    return FlashKernels(forward=forward, backward=_backward)


def _backward(
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
    of_queries, of_keys = state
    if not _is_aligned(grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
    tensors = (grad, query, key, value)
    grad_query, statistics = query_gradient(
        *tensors, output.contiguous(), logarithms.contiguous(), of_queries, arguments.scale
    )
    return grad_query, *key_gradient(*tensors, statistics, of_keys, arguments.scale)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output like the queries and the logarithms of denominators, float32 [heads, tokens]."""
    num_tokens, num_heads = query.shape[:2]
    output = query.new_empty(query.shape)
    logarithms = query.new_empty(num_heads, num_tokens, dtype=torch.float32)
    forward_kernel[(len(blocks) * key.shape[1],)](
        *(query, _streamed(key, FORWARD.keys), _streamed(value, FORWARD.keys), output, logarithms),
        *(blocks, num_tokens, key.shape[1], *query.stride()[:2], scale * math.log2(math.e)),
        **FORWARD.constants(query, key),
    )
    return output, logarithms


def query_gradient(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logarithms: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of queries, and statistics float32 [2 * groups, width] for that of keys."""
    assert output.is_contiguous()
    assert logarithms.is_contiguous()
    grad_query = query.new_empty(query.shape)
    num_groups = key.shape[1]
    # There are at least as many blocks as documents.
    width = (len(query) + SPACE * len(blocks)) // SPACE * SPACE * query.shape[1] // num_groups
    statistics = logarithms.new_empty(2 * num_groups, width)
    query_gradient_kernel[(len(blocks) * num_groups,)](
        *(
            grad,
            query,
            _streamed(key, QUERY_GRADIENT.keys),
            _streamed(value, QUERY_GRADIENT.keys),
            output,
        ),
        *(logarithms, statistics, grad_query, blocks, len(query), num_groups, width),
        *(*grad.stride()[:2], *query.stride()[:2], scale),
        **QUERY_GRADIENT.constants(query, key),
    )
    return grad_query, statistics


def key_gradient(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    statistics: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of keys and values, each summed over the query heads of its group."""
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    group_size = query.shape[1] // key.shape[1]
    tokens = KEY_GRADIENT.rows // group_size
    numbers = TensorDescriptor.from_tensor(statistics, [1, KEY_GRADIENT.rows])
    key_gradient_kernel[(len(blocks) * key.shape[1],)](
        *(_streamed(grad, tokens, group_size), _streamed(query, tokens, group_size), key, value),
        *(numbers, grad_key, grad_value, blocks, key.shape[1]),
        *(*key.stride()[:2], *value.stride()[:2], scale),
        **KEY_GRADIENT.constants(query, key),
    )
    return grad_key, grad_value


def _streamed(tensor: torch.Tensor, tokens: int, heads: int = 1) -> TensorDescriptor:
    """Of which a kernel loads blocks of so many tokens and heads."""
    block = [tokens, heads, tensor.shape[2]]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
