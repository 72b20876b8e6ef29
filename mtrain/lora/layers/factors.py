"""The two factors of an adapted linear as a child module, and what is computed with them.

The child is called `adapter` and holds `lora_a` and `lora_b`; the weight of the linear keeps its
name. How the factors lie is said in `mtrain.lora.plan`. Weights of an adapter keep their own dtype,
but products are computed in that of the activations, as under torch's autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from mtrain.lora.plan import AdaptedLinear


class LoraFactors(torch.nn.Module):
    """A and B of all adapted projections of one linear on one rank.

    Args:
        linear: What is adapted.
        a_shape: Local shape of `lora_a`: [(experts,) num_adapted * rank, in].
        b_shape: Local shape of `lora_b`: [(experts,) out, rank].
        scales: float32 [out, num_adapted], the scale of each projection at the rows that belong to
            it and 0 elsewhere; one number where all rows belong to one projection.
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
        """The factors as the linear applies them.

        Always call the module for them: data parallelism may still be gathering what the last step
        changed, and waits for it before a module is called.

        Returns:
            A [..., num_adapted * rank, in], and scaled B [..., out, num_adapted * rank].
        """
        return self.lora_a, self._scaled_b(self.lora_b)

    def _scaled_b(self, lora_b: torch.Tensor) -> torch.Tensor:
        """B with a column for every row of A, times its scale.

        A row of the result has the numbers of `lora_b` in the columns of its own projection and
        zeros elsewhere, so that one product with A serves all projections.
        """
        if self.scale is not None:
            return lora_b * self.scale
        return (lora_b.unsqueeze(-2) * self.scales.unsqueeze(-1)).flatten(-2)

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
        dropped = self.drop(activations, is_split=is_split)
        return F.linear(dropped, lora_a.to(activations.dtype))

    def drop(self, activations: torch.Tensor, *, is_split: bool) -> torch.Tensor:
        """Dropout on what A is applied to."""
        if not (self.dropout and self.training):
            return activations
        if is_split and self.group.size() > 1:
            with get_cuda_rng_tracker().fork():
                return F.dropout(activations, self.dropout)
        return F.dropout(activations, self.dropout)

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
        delta = self._scaled_b(lora_b) @ lora_a
        if self.kind == "embedding":
            delta = delta.t()
        return (weight.float() + delta).to(weight.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        """Moves, but keeps dtypes: half-precision wrappers cast whole models."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)


def add_up(output: torch.Tensor, low_rank: torch.Tensor, scaled_b: torch.Tensor) -> torch.Tensor:
    """Applies B and adds the result, in one product that reads and writes the output once.

    Args:
        output: [..., out], of the linear itself.
        low_rank: [..., num_adapted * rank], from `LoraFactors.down`.
        scaled_b: [out, num_adapted * rank].

    Returns:
        [..., out].
    """
    scaled_b = scaled_b.to(low_rank.dtype)
    if output.dtype != low_rank.dtype:
        return output + F.linear(low_rank, scaled_b).to(output.dtype)
    rows = torch.addmm(output.flatten(0, -2), low_rank.flatten(0, -2), scaled_b.t())
    return rows.view_as(output)
