"""A decoder layer whose forward pass is the sum that it computes.

The one thing to know: Megatron-Core's layer also serves inference, cross-attention, offloading and
CUDA graphs. Passing by all of these costs the host as much as four kernels a layer, and small
models wait for the host. Where parts of a layer are recomputed, the pass is Megatron-Core's.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer

from mtrain.model.residual import NormedResidual, OutputWithBias

__all__ = ["DecoderLayer"]


class DecoderLayer(TransformerLayer):
    """Attention and an MLP or experts, each behind a norm and added to its input."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.hidden_dropout == 0.0
        self.is_recomputed_in_part = (
            self.recompute_input_layernorm or self.recompute_pre_mlp_layernorm or self.recompute_mlp
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None = None,
        *,
        rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: torch.Tensor | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """Runs the layer.

        Args:
            hidden_states: [seq (/ tp_size), batch, hidden].
            attention_mask: Always None; attention is causal.
            rotary_pos_emb: Cosines and sines of every token, see `RotarySelfAttention`.
            packed_seq_params: Document boundaries of a pack.
            padding_mask: bool [batch, seq], see `LanguageModel`.
            **unused: Of Megatron-Core's class, for inference and cross-attention: all None.

        Returns:
            Hidden states likewise, and no context.
        """
        of_attention = {"rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params}
        if self.is_recomputed_in_part:
            return super().forward(
                hidden_states, attention_mask, padding_mask=padding_mask, **of_attention, **unused
            )
        attended = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask, **of_attention
        )
        hidden_states = _add(self.self_attn_bda, attended, hidden_states)
        output = self.mlp(self.pre_mlp_layernorm(hidden_states), padding_mask=padding_mask)
        return _add(self.mlp_bda, output, hidden_states), None


def _add(addition: Any, output: OutputWithBias, residual: torch.Tensor) -> torch.Tensor:
    if isinstance(addition, NormedResidual):
        return addition(training=True, fused=False)(output, residual, 0.0)
    values, bias = output
    return residual + (values if bias is None else values + bias)
