"""Collectives of tensor-parallel ranks on CPUs, in as few messages as can be.

The one thing to know: gloo gathers and reduces around a ring, in many messages that each wake two
threads on both sides, and for the tensors of a small model that is all the time it takes. When
every rank sends each other rank at once what that one needs, as many bytes travel in fewer
messages, and parts may differ in size, which gloo refuses and expert tensor parallelism needs.
"""

from typing import Any

import torch
import torch.distributed as dist

__all__ = ["exchange_directly"]


def exchange_directly() -> None:
    """Replaces gathering and reduce-scattering in Megatron-Core's tensor-parallel functions."""
    from megatron.core.tensor_parallel import layers, mappings

    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = reduce_scatter_parts
    layers.dist_all_gather_func = mappings.dist_all_gather_func = all_gather
    layers.dist_reduce_scatter_func = reduce_scatter


def gather_parts(
    part: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, *_rest: Any
) -> torch.Tensor:
    """The parts of all ranks, one behind the other.

    Args:
        part: [own size, ...].
        group: The ranks.
        output_split_sizes: The size of each rank's part; all as large as this one by default.

    Returns:
        [sum of sizes, ...].
    """
    if group.size() == 1:
        return part
    sizes = output_split_sizes
    num_rows = len(part) * group.size() if sizes is None else sum(sizes)
    whole = part.new_empty(num_rows, *part.shape[1:])
    all_gather(whole, part, group=group, sizes=sizes)
    return whole


def reduce_scatter_parts(
    whole: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, *_rest: Any
) -> torch.Tensor:
    """This rank's part of the sum over ranks.

    Args:
        whole: [sum of sizes, ...].
        group: The ranks.
        input_split_sizes: The size of each rank's part; all alike by default.

    Returns:
        [own size, ...].
    """
    if group.size() == 1:
        return whole
    sizes = input_split_sizes
    assert sizes is not None or len(whole) % group.size() == 0, (whole.shape, group.size())
    own_size = len(whole) // group.size() if sizes is None else sizes[group.rank()]
    part = whole.new_empty(own_size, *whole.shape[1:])
    reduce_scatter(part, whole, group=group, sizes=sizes)
    return part


def all_gather(
    whole: torch.Tensor,
    part: torch.Tensor,
    *,
    group: Any,
    async_op: bool = False,
    sizes: list[int] | None = None,
) -> Any:
    """As `torch.distributed.all_gather_into_tensor`, also for parts of different `sizes`."""
    copies = torch.cat([part] * group.size())
    return dist.all_to_all_single(
        whole, copies, output_split_sizes=sizes, group=group, async_op=async_op
    )


def reduce_scatter(
    part: torch.Tensor,
    whole: torch.Tensor,
    *,
    group: Any,
    async_op: bool = False,
    sizes: list[int] | None = None,
) -> Any:
    """As `torch.distributed.reduce_scatter_tensor`, also for parts of different `sizes`.

    Sums go from the first rank to the last.
    """
    parts = part.new_empty(group.size(), *part.shape)
    work = dist.all_to_all_single(
        parts.flatten(0, 1),
        whole.contiguous(),
        input_split_sizes=sizes,
        group=group,
        async_op=True,
    )
    result = _Sum(work, parts, part)
    if async_op:
        return result
    result.wait()
    return None


class _Sum:
    """What is left of a reduce-scatter when the parts are there."""

    def __init__(self, work: Any, parts: torch.Tensor, result: torch.Tensor) -> None:
        self._work, self._parts, self._result = work, parts, result

    def wait(self) -> None:
        """Until the result is there."""
        self._work.wait()
        torch.sum(self._parts, dim=0, dtype=self._result.dtype, out=self._result)
