"""RMSNorm for the `torch` backend.

Megatron-Core's own torch norm refuses sequence parallelism: under it every tensor-parallel rank
sees another part of the sequence, so the weight's gradient has to be summed over those ranks. This
one carries the mark that Megatron-Core's gradient reduction looks for.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last axis.

    Args:
        config: Gives the dtype of the weight and whether sequence parallelism is on.
        hidden_size: Length of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.weight.sequence_parallel = config.sequence_parallel
