"""Loss and token accuracy on validation data, on the same schedules as training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mtrain.parallel import ParallelState
from mtrain.training.batch import MicroBatch, to_device
from mtrain.training.step import run_schedule

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

__all__ = ["EvaluationResult", "evaluate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Means over all tokens with a label.

    Attributes:
        loss: Cross-entropy, in nats a token.
        token_accuracy: Share of tokens whose label was the likeliest word.
        num_tokens: Tokens with a label.
    """

    loss: float
    token_accuracy: float
    num_tokens: int


@torch.no_grad()
def evaluate(
    chunks: Sequence[DistributedDataParallel],
    steps: Iterable[Sequence[MicroBatch]],
    *,
    state: ParallelState,
) -> EvaluationResult:
    """Evaluates; weights and training mode are left as they were.

    Args:
        chunks: Wrapped model chunks of this rank.
        steps: Groups of micro-batches of this data-parallel rank, as many and as large on every
            rank (experts and pipeline stages talk to each other).
        state: This rank.

    Raises:
        ValueError: No token of the data has a label.
    """
    for chunk in chunks:
        chunk.eval()
    total = torch.zeros(3, dtype=torch.float64, device=state.device)
    scale = torch.ones((), device=state.device)
    for batches in steps:
        on_device = [to_device(batch, state.device) for batch in batches]
        for sums in run_schedule(chunks, on_device, scale=scale, forward_only=True):
            total += sums
    for chunk in chunks:
        chunk.train()
    if state.coordinates.tp_rank != 0:
        total.zero_()
    dist.all_reduce(total, group=state.world.group)
    loss, correct, num_tokens = total.tolist()
    if not num_tokens:
        raise ValueError("the validation data has no token to compute a loss on")
    return EvaluationResult(
        loss=loss / num_tokens, token_accuracy=correct / num_tokens, num_tokens=int(num_tokens)
    )
