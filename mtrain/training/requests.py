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
        # Pinned: a copy from other memory to the GPU, or back, waits for all that is queued there.
        self._ours = torch.zeros(2, dtype=torch.int32, pin_memory=is_gpu)
        self._everyone = torch.zeros(2, dtype=torch.int32, pin_memory=is_gpu)

    def ask(self, stop: int, *, is_writing: bool) -> None:
        """Sends what this rank says; all ranks call it, once the answer before is known.

        Args:
            stop: Number of the signal that this rank got.
            is_writing: Whether it still writes a checkpoint.
        """
        self._ours[0], self._ours[1] = stop, is_writing
        on_device = self._ours.to(self._world.device, non_blocking=True, copy=True)
        dist.all_reduce(on_device, op=dist.ReduceOp.MAX, group=self._world.group)
        self._everyone.copy_(on_device, non_blocking=True)

    def answer(self) -> Answer:
        """What was asked last; only after the device has been waited for."""
        stop, is_writing = self._everyone.tolist()
        return Answer(stop=stop, is_writing=bool(is_writing))
