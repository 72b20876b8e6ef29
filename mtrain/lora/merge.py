"""Weights with adapters merged, computed when they are asked for; live weights never change."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from mtrain.bridge.gather import TensorLookup
from mtrain.bridge.save import lookup_in
from mtrain.bridge.slices import tensors_by_name
from mtrain.lora.layers.factors import LoraFactors
from mtrain.lora.plan import ADAPTER_CHILD

# Blocks of one weight are asked for one after the other, those of a few files in turn.
_NUM_KEPT = 4


def merged_lookup(chunks: Sequence[torch.nn.Module]) -> TensorLookup:
    """Finds merged weights for `save_weights`, with the table of the model.

    Each is computed in float32 and rounded once. All that a merge reads is on this rank: rows of B
    are split like rows of the weight, columns of A like its columns.

    Args:
        chunks: Bare chunks with adapters attached.
    """
    plain = lookup_in(tensors_by_name(chunks))
    adapters = [_adapters_by_weight(chunk) for chunk in chunks]

    @lru_cache(maxsize=_NUM_KEPT)
    def merged(chunk: int, name: str, expert: int | None) -> torch.Tensor:
        return adapters[chunk][name].merged(plain(chunk, name, expert), expert)

    def lookup(chunk: int, name: str, expert: int | None) -> torch.Tensor:
        find = merged if name in adapters[chunk] else plain
        return find(chunk, name, expert)

    return lookup


def _adapters_by_weight(chunk: torch.nn.Module) -> dict[str, LoraFactors]:
    return {
        f"{name.removesuffix(ADAPTER_CHILD)}weight": module
        for name, module in chunk.named_modules()
        if isinstance(module, LoraFactors)
    }
