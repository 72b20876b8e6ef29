"""Megatron-Core's data parallelism without zeros that a product writes over.

A step begins with main gradients of zero, to which every micro-batch adds. A linear that adds the
gradient of its weight itself can as well write its first one. That saves writing and reading four
bytes a weight, which takes 1 % of a step of two micro-batches.

The one thing to know: from the start of a step to its first gradient such a weight has
`overwrites_main_grad`, and its main gradient is what the step before left. So before anybody else
adds to it, or reads it, zeros are made up for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from mtrain.platform.weight_gradients import zero_if_old

__all__ = ["DataParallel"]


class DataParallel(DistributedDataParallel):
    """A model chunk whose gradients are gathered in buffers and reduced over ranks.

    Weights with the mark `can_overwrite_main_grad` (see `mtrain.model.build`) are not zeroed.

    Args:
        *args: Of Megatron-Core's class.
        **kwargs: Likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._overwritten = [p for p in self.params_with_grad if _can_overwrite(p)]
        for parameter in self._overwritten:
            parameter.overwrites_main_grad = False
        self._zeroed = [part for part in self._parts_to_zero() if part.numel() > 0]

    def _parts_to_zero(self) -> Iterator[torch.Tensor]:
        """What lies in the buffers between main gradients that are overwritten."""
        for buffer in self.buffers + self.expert_parallel_buffers:
            start = 0
            places = ((p, *place) for p, place in buffer.param_index_map.items())
            for parameter, first, end, _ in sorted(places, key=lambda place: place[1]):
                if _can_overwrite(parameter):
                    yield buffer.grad_data[start:first]
                    start = end
            yield buffer.grad_data[start:]

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced while backward goes on."""
        return self.ddp_config.overlap_grad_reduce

    def leave(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """No longer watches for gradients of these: who adds them to main gradients says so."""
        left = {id(parameter) for parameter in parameters}
        self.grad_accs = [node for node in self.grad_accs if id(node.variable) not in left]

    def gradients_are_added(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Reduces what is complete, if that overlaps with backward.

        Args:
            parameters: Of those that were left, in the order of the model; each once a micro-batch.
        """
        if self.overlaps:
            for parameter in reversed(parameters):
                group = self.param_to_bucket_group[parameter]
                group.register_grad_ready(parameter, self.force_all_reduce)

    def wait_for_parameters(self, modules: Iterable[torch.nn.Module]) -> None:
        """Waits for those of modules that are not called as such, if they are still gathered."""
        if self.ddp_config.overlap_param_gather:
            wait = self._make_forward_pre_hook()
            for module in modules:
                wait(module)

    def zero_grad_buffer(self) -> None:
        """Begins a step."""
        for parameter in self.params_with_grad:
            parameter.grad_added_to_main_grad = False
        for parameter in self._overwritten:
            parameter.overwrites_main_grad = True
        # A stage may have nothing to train.
        if self._zeroed:
            torch._foreach_zero_(self._zeroed)
        for group in self.bucket_groups + self.expert_parallel_bucket_groups:
            group.reset()

    def start_grad_sync(self, *unused: Any) -> None:
        """Megatron-Core's; main gradients are read from here on."""
        self._zero_untouched()
        super().start_grad_sync(*unused)

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        """Megatron-Core's, which starts what nobody started."""
        self._zero_untouched()
        super().finish_grad_sync(*args, **kwargs)

    def _zero_untouched(self) -> None:
        """Gives weights that no micro-batch used the gradient that they should have."""
        for parameter in self._overwritten:
            zero_if_old(parameter)

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        """Megatron-Core's, which adds a gradient that comes from autograd."""
        hook = super()._make_backward_post_hook(param)
        if not _can_overwrite(param):
            return hook

        def hook_on_numbers(*unused: Any) -> None:
            zero_if_old(param)
            hook(*unused)

        return hook_on_numbers


def _can_overwrite(parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, "can_overwrite_main_grad", False)
