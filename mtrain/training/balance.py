"""Losses beside the main one, as Megatron-Core's modules noted them down.

The one thing to know: routers and layers of multi-token prediction add to trackers of the process
on every forward, so reading them also empties them. What a rank holds is a part, made to be added
up over all ranks.
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
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

__all__ = ["BALANCE_LOSSES", "SIDE_LOSSES", "count_routers", "take_side_losses"]

BALANCE_LOSSES = (
    "load_balancing_loss",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "z_loss",
)
SIDE_LOSSES = (*BALANCE_LOSSES, "mtp_loss")


def count_routers(chunks: Sequence[DistributedDataParallel]) -> int:
    """Expert layers on this rank."""
    return sum(isinstance(module, TopKRouter) for chunk in chunks for module in chunk.modules())


def take_side_losses(device: torch.device) -> torch.Tensor:
    """Reads and empties the trackers.

    Returns:
        float64 [len(SIDE_LOSSES)]. Summed over all ranks and divided by the number of (router,
        micro-batch) pairs of all ranks, a balance loss is the mean of a layer without its
        coefficient. The loss of multi-token prediction, a mean over its layers, is to be divided by
        the micro-batches of all ranks of the last stage. 0 where a loss is not used.
    """
    tracker = get_moe_layer_wise_logging_tracker()
    sums = torch.zeros(len(SIDE_LOSSES), dtype=torch.float64, device=device)
    for index, name in enumerate(BALANCE_LOSSES):
        if name in tracker:
            # Ranks of the reduce group hold summands of one loss; others hold whole losses.
            group = tracker[name]["reduce_group"]
            num_parts = group.size() if group is not None else 1
            sums[index] = tracker[name]["values"].sum() * num_parts
    clear_aux_losses_tracker()
    if "values" in MTPLossLoggingHelper.tracker:
        sums[-1] = MTPLossLoggingHelper.tracker["values"].mean()
        MTPLossLoggingHelper.clean_loss_in_tracker()
    return sums
