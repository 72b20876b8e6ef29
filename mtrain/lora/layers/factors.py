"""The two factors of an adapted linear as a child module, and what is computed with them.

The child is called `adapter` and holds `lora_a` and `lora_b`; the weight of the linear keeps its
name. How the factors lie is said in `mtrain.lora.plan`. Weights of an adapter keep their own dtype,
but products are computed in that of the activations, as under torch's autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from mtrain.lora.layers.fused import Dropped
from mtrain.lora.layers.products import Scales, spread_out
from mtrain.lora.plan import AdaptedLinear


class LoraFactors(torch.nn.Module):
    """A and B of all adapted projections of one linear on one rank.

    Args:
        linear: What is adapted.
        a_shape: Local shape of `lora_a`: [(experts,) num_adapted * rank, in].
        b_shape: Local shape of `lora_b`: [(experts,) out, rank].
        scales: See `Scales`; one number where all rows belong to one projection.
        dtype: Dtype of the factors.
        device: Where they are.
        dropout: Probability that an input of A is dropped in training.
        group: Process group that splits the linear.
        is_sequence_parallel: Whether activations outside of the linear are split along the
            sequence over that group.
        is_local: Whether that group communicates outside of the linear, which gets all tokens and
            gives partial sums: shared experts that overlap with the token exchange.
    """

    def __init__(
        self,
        linear: AdaptedLinear,
        *,
        a_shape: tuple[int, ...],
        b_shape: tuple[int, ...],
        scales: torch.Tensor | float,
        dtype: torch.dtype,
        device: torch.device,
        dropout: float,
        group: dist.ProcessGroup,
        is_sequence_parallel: bool,
        is_local: bool,
    ) -> None:
        super().__init__()
        self.lora_a = torch.nn.Parameter(torch.empty(a_shape, dtype=dtype, device=device))
        self.lora_b = torch.nn.Parameter(torch.empty(b_shape, dtype=dtype, device=device))
        self.kind = linear.kind
        self.dropout = dropout
        self.group = group
        self.is_sequence_parallel = is_sequence_parallel
        self.is_local = is_local
        self.scale = scales if isinstance(scales, float) else None
        self.register_buffer(
            "scales", None if isinstance(scales, float) else scales.to(device), persistent=False
        )

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [..., num_adapted * rank, in] and B [..., out, rank] as they are stored.

        Always call the module for them: data parallelism may still be gathering what the last step
        changed, and waits for it before a module is called.
        """
        return self.lora_a, self.lora_b

    @property
    def scaling(self) -> Scales:
        """What B is multiplied with."""
        return self.scales if self.scale is None else self.scale

    @property
    def sends_nothing(self) -> bool:
        """Whether no rank of the group needs activations of another for this adapter."""
        return self.is_local or self.group.size() == 1

    def down(
        self, activations: torch.Tensor, lora_a: torch.Tensor, *, is_split: bool
    ) -> torch.Tensor:
        """Applies A: [..., in] -> [..., num_adapted * rank].

        Args:
            activations: [..., in].
            lora_a: A.
            is_split: Whether ranks of the group have different activations, and therefore need
                different random numbers for dropout.
        """
        if self.dropout and self.training:
            with self._random_numbers(is_split=is_split):
                activations = F.dropout(activations, self.dropout)
        return F.linear(activations, lora_a.to(activations.dtype))

    @torch.no_grad()
    def dropped(self, activations: torch.Tensor, *, is_split: bool) -> Dropped | None:
        """What dropout leaves of the input of A, for a function with a backward of its own.

        The random numbers are those that `down` draws.

        Args:
            activations: [..., in].
            is_split: See `down`.

        Returns:
            None where nothing is dropped.
        """
        if not (self.dropout and self.training):
            return None
        with self._random_numbers(is_split=is_split):
            values, mask = torch.native_dropout(activations, self.dropout, True)
        return Dropped(values=values, mask=mask, scale=1 / (1 - self.dropout))

    def _random_numbers(self, *, is_split: bool) -> AbstractContextManager:
        if is_split and self.group.size() > 1:
            return get_cuda_rng_tracker().fork()
        return nullcontext()

    @torch.no_grad()
    def merged(self, weight: torch.Tensor, expert: int | None) -> torch.Tensor:
        """The weight plus the product of the factors: a new tensor, rounded once.

        Args:
            weight: Local weight of the linear, [out, in].
            expert: Which of the stacked experts it is.
        """
        lora_a, lora_b = self.lora_a.float(), self.lora_b.float()
        if expert is not None:
            lora_a, lora_b = lora_a[expert], lora_b[expert]
        wide_b, scale = spread_out(lora_b, self.scaling, torch.float32)
        delta = wide_b * scale @ lora_a
        if self.kind == "embedding":
            delta = delta.t()
        return (weight.float() + delta).to(weight.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        """Moves, but keeps dtypes: half-precision wrappers cast whole models."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)
