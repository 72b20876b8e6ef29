"""Norms.

Megatron-Core's own torch norms refuse sequence parallelism: under it every tensor-parallel rank
sees another part of the sequence, so gradients of weight and bias have to be summed over those
ranks. These carry the mark that Megatron-Core's gradient reduction looks for.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.jit import jit_fuser
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.cpu_passes import RootMeanSquareNorm
from mtrain.platform.device import has_triton

# Below it launching takes longer than the work, and torch's norm is quicker to launch.
_SMALLEST_FOR_KERNEL = 2048


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last axis.

    With `layernorm_zero_centered_gamma` the factor is 1 + weight, and everything up to the product
    with it is in float32.

    Args:
        config: Gives the dtype of the weight, what it is, and whether sequence parallelism is on.
        hidden_size: Length of the last axis.
        eps: Added to the mean square.

    Source: transformers' `Gemma3RMSNorm` and `Qwen3NextRMSNorm` are zero-centered.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor | None) -> torch.Tensor:
        """[..., hidden_size] -> [..., hidden_size]; None: the weight, for who norms on its own."""
        if hidden is None:
            return self.weight
        source = NormInput(
            hidden=hidden, weight=self.weight, eps=self.eps, is_zero_centered=self.is_zero_centered
        )
        output = source.normed()
        if source.is_for_kernel and torch.is_grad_enabled():
            # A linear then keeps no output for backward: the input is kept anyway.
            output.norm_input = source
        return output


@dataclass(frozen=True, slots=True, kw_only=True)
class NormInput:
    """What the output of a root-mean-square norm can be made of again.

    Attributes:
        hidden: [..., hidden_size].
        weight: [hidden_size].
        eps: Added to the mean square.
        is_zero_centered: Whether the factor is 1 + weight.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    eps: float
    is_zero_centered: bool

    @property
    def is_for_kernel(self) -> bool:
        """Whether our kernel norms it."""
        is_wide = len(self.weight) >= _SMALLEST_FOR_KERNEL
        return is_wide and self.hidden.is_cuda and has_triton()

    def normed(self) -> torch.Tensor:
        """[..., hidden_size], the same bits each time."""
        hidden, weight = self.hidden, self.weight
        if self.is_for_kernel:
            from mtrain.model.kernels.rms_norm import rms_norm

            return rms_norm(hidden, weight, self.eps, is_zero_centered=self.is_zero_centered)
        if self.is_zero_centered:
            return _zero_centered_norm(hidden, weight, self.eps)
        if not hidden.is_cuda and hidden.dtype == weight.dtype == torch.float32:
            return RootMeanSquareNorm.apply(hidden, weight, self.eps)
        return F.rms_norm(hidden, weight.shape, weight, self.eps)


@jit_fuser
def _zero_centered_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    scale = 1.0 + weight.float()
    return F.rms_norm(hidden.float(), weight.shape, scale, eps).to(hidden.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """Norm over the last axis with mean and bias, as GPT-2 has it.

    Args:
        config: Gives the dtype of weight and bias and whether sequence parallelism is on.
        hidden_size: Length of the last axis.
        eps: Added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        assert not config.layernorm_zero_centered_gamma
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel


def norm_class(config: TransformerConfig) -> type[RMSNorm] | type[LayerNorm]:
    """The norm that `normalization` of the config names.

    Transformer Engine's takes four times as long to launch (0.55 against 0.14 ms forward and
    backward): with two a layer for queries and keys, small models wait for that.
    """
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization]
