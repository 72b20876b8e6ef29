"""A linear that every tensor-parallel rank holds whole and applies to its part of the sequence."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig


class ReplicatedLinear(torch.nn.Module):
    """`x @ weight.t()`, without a bias.

    Args:
        in_size: Width of the input.
        out_size: Width of the output.
        config: Gives the dtype of the weight and whether sequence parallelism is on, under which
            Megatron-Core sums the gradients of the ranks.
    """

    def __init__(self, in_size: int, out_size: int, *, config: TransformerConfig) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        weight = torch.empty(out_size, in_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[..., in] -> ([..., out], None), as Megatron-Core's linears."""
        # As rows: torch multiplies three axes in another way, with other last bits, where the
        # weight is frozen.
        rows = F.linear(input_.flatten(0, -2), self.weight)
        return rows.view(*input_.shape[:-1], -1), None
