"""The gated MLP, whose activation is one kernel."""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP

from mtrain.model.activation import is_swiglu, swiglu


class GatedMLP(MLP):
    """Megatron-Core's MLP with `swiglu` where the activation is that of Llama.

    The linear behind it applies it where it can: then its output is not kept for backward.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.is_swiglu = (
            config.bias_activation_fusion and is_swiglu(config) and not config.add_bias_linear
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        per_token_scale: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[seq (/ tp_size), batch, hidden] -> alike, and no bias."""
        if not self.is_swiglu or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **kwargs)
        hidden, _ = self.linear_fc1(hidden_states)
        if self.linear_fc2.fuses_swiglu(hidden):
            return self.linear_fc2(hidden, applies_swiglu=True)
        return self.linear_fc2(swiglu(hidden))
