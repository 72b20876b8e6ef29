"""Expert-balancing losses as Megatron-Core's routers noted them down.

The one thing to know: routers add to a tracker of the process on every forward, so reading it also
empties it. What a rank holds is a part; `BalanceSums` are made to be added up over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

__all__ = ["BALANCE_LOSSES", "count_routers", "take_balance_sums"]

BALANCE_LOSSES = (
    "load_balancing_loss",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "z_loss",
)


def count_routers(chunks: Sequence[DistributedDataParallel]) -> int:
    """Expert layers on this rank."""
    return sum(isinstance(module, TopKRouter) for chunk in chunks for module in chunk.modules())


def take_balance_sums(device: torch.device) -> torch.Tensor:
    """Reads and empties the tracker.

    Returns:
        float64 [len(BALANCE_LOSSES)]. Summed over all ranks and divided by the number of (router,
        micro-batch) pairs of all ranks, it is the mean loss of a layer without its coefficient;
        0 where a loss is not used.
    """
    tracker = get_moe_layer_wise_logging_tracker()
    sums = torch.zeros(len(BALANCE_LOSSES), dtype=torch.float64, device=device)
    for index, name in enumerate(BALANCE_LOSSES):
        if name in tracker:
            # Ranks of the reduce group hold summands of one loss; others hold whole losses.
            group = tracker[name]["reduce_group"]
            num_parts = group.size() if group is not None else 1
            sums[index] = tracker[name]["values"].sum() * num_parts
    clear_aux_losses_tracker()
    return sums
