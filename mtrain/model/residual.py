"""Adding a sublayer's output to the residual stream, for models that normalise it before.

The one thing to know: it takes the place of Megatron-Core's `get_bias_dropout_add`, which is a
function that chooses a function. This one has a weight, so it is a module that does.
"""

from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.norm import norm_class

OutputWithBias = tuple[torch.Tensor, torch.Tensor | None]


class NormedResidual(MegatronModule):
    """residual + norm(output + bias), for the slots `self_attn_bda` and `mlp_bda` of a layer.

    Build it with `ModuleSpec(module=NormedResidual, params={"config": config})`.

    Args:
        config: Model shape and kind of norm.

    Source: `Gemma3DecoderLayer` and `Glm4DecoderLayer` of transformers.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        norm = norm_class(config)
        self.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(
        self, training: bool, fused: bool
    ) -> Callable[[OutputWithBias, torch.Tensor, float], torch.Tensor]:
        """The function that adds, whether it is for training or fused or not."""
        return self._add

    def _add(
        self, output_with_bias: OutputWithBias, residual: torch.Tensor, dropout_prob: float
    ) -> torch.Tensor:
        """[seq, batch, hidden]."""
        assert dropout_prob == 0.0
        output, bias = output_with_bias
        return residual + self.norm(output if bias is None else output + bias)
