"""What ranks must agree on between two steps: whether to stop, and whether a save is written.

The one thing to know: every rank asks at the start of a step and knows the answer of all at its
end, because the step waits for the device once anyway. So agreeing costs no waiting, and a request
takes effect after the step that follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from mtrain.parallel import World

__all__ = ["Answer", "PendingSaves", "RankRequests", "Stop"]


class Stop(Protocol):
    """Whether this rank was asked to stop."""

    @property
    def requested(self) -> int:
        """Number of the signal; 0 for no request."""
        ...


class PendingSaves(Protocol):
    """A checkpoint that is written while training goes on."""

    @property
    def is_pending(self) -> bool:
        """Whether there is one; the same on every rank."""
        ...

    @property
    def is_working(self) -> bool:
        """Whether this rank still writes it."""
        ...

    def advance(self) -> None:
        """Goes on with it when no rank writes any more; every rank must call this."""
        ...

    def wait(self) -> None:
        """Waits until it is complete; every rank must call this."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What all ranks together say.

    Attributes:
        stop: The largest number of a signal that a rank got; 0 for none.
        is_writing: Whether a rank still writes.
    """

    stop: int
    is_writing: bool


class RankRequests:
    """Asks all ranks without waiting for them.

    Args:
        world: This rank.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        is_gpu = world.device.type == "cuda"
        self._host = torch.zeros(2, dtype=torch.int32, pin_memory=is_gpu)

    def ask(self, stop: int, *, is_writing: bool) -> None:
        """Sends what this rank says; all ranks call it.

        Args:
            stop: Number of the signal that this rank got.
            is_writing: Whether it still writes a checkpoint.
        """
        ours = torch.tensor([stop, is_writing], dtype=torch.int32).to(self._world.device)
        dist.all_reduce(ours, op=dist.ReduceOp.MAX, group=self._world.group)
        self._host.copy_(ours, non_blocking=True)

    def answer(self) -> Answer:
        """What was asked last; only after the device has been waited for."""
        stop, is_writing = self._host.tolist()
        return Answer(stop=stop, is_writing=bool(is_writing))
