"""Transformer Engine's row-parallel linear, which can apply SwiGLU to its input first.

The one thing to know: what Transformer Engine does beside the product of two tensors (8-bit floats,
ranks, offloading, delayed gradients) stays its own, and then the activation is kept as before.

A function makes the class, because without Transformer Engine there is none to take it from.
"""

from __future__ import annotations

from functools import cache

import torch
from megatron.core.tensor_parallel import random as megatron_random

from mtrain.model.swiglu_linear import swiglu_linear

__all__ = ["row_linear_with_swiglu"]


@cache
def row_linear_with_swiglu(base: type) -> type:
    """A subclass of `TERowParallelLinear` with what `mtrain.model.linear.RowLinear` has."""

    class SwiGLURowLinear(base):
        def fuses_swiglu(self, hidden: torch.Tensor) -> bool:
            """Whether to leave SwiGLU of this tensor to the linear; an adapter's subclass says no.

            An 8-bit weight is no plain parameter.
            """
            config = self.config
            return (
                hidden.is_cuda
                and hidden.dtype == self.weight.dtype
                and type(self.weight) is torch.nn.Parameter
                and not (self.use_bias or self.tp_size > 1)
                and not (config.delay_wgrad_compute or config.cpu_offloading)
                # Without Transformer Engine it is a stand-in; see `mtrain.platform.cpu`.
                and not self.will_execute_quantized(
                    megatron_random.FP8GlobalStateManager.is_fp8_enabled()
                )
            )

        def forward(
            self, x: torch.Tensor, *, applies_swiglu: bool = False
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            """[seq, batch, in], twice as wide in front of SwiGLU -> [seq, batch, out], no bias."""
            if not applies_swiglu:
                return super().forward(x)
            # Said of the first one, its weight gradient would replace what is in the main gradient.
            self.is_first_microbatch = False
            fuses = self.fuse_wgrad_accumulation
            return swiglu_linear(x, self.weight, fuses_weight_gradient=fuses), None

    return SwiGLURowLinear
