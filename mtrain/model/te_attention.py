"""Transformer Engine's attention, with kernels of ours for packs of short documents."""

import math
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.attention import attention_window
from mtrain.model.documents import PackedDocuments
from mtrain.model.flash import TORCH_KERNELS, FlashArguments, FlashKernels, flash_attention

__all__ = ["TransformerEngineAttention"]

# On an H200 cuDNN is 6 % faster with documents of 4,096 tokens, and slower with shorter ones or
# where one of 2,200 tokens is among many.
_LONGEST_FOR_OURS = 4096
# Wider heads had wrong gradients in packs, too large by 1e5, with 256 channels on an H200
# (Transformer Engine 2.11, cuDNN 9.14). torch's kernel is right.
_WIDEST_FOR_CUDNN = 192


class TransformerEngineAttention(TEDotProductAttention):
    """Grouped-query attention in which documents of a pack never see each other.

    Args:
        config: Model shape.
        layer_number: Number of the layer, from 1.
        *args: Of Megatron-Core's class.
        softmax_scale: Factor on the scores; 1/sqrt(k_channels) by default.
        k_channels: Size of a head of queries and keys; `kv_channels` of the config by default.
        **kwargs: As `args`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs |= {"softmax_scale": softmax_scale, "k_channels": k_channels}
        super().__init__(config, layer_number, *args, **kwargs)
        self.scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.window = attention_window(config, layer_number)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Packed: [tokens, heads or groups, channels] -> [tokens, heads * channels].

        Rows: see Megatron-Core's class.
        """
        if isinstance(packed_seq_params, PackedDocuments):
            arguments = FlashArguments(
                scale=self.scale, window=self.window, longest=packed_seq_params.max_seqlen_q
            )
            kernels = self._kernels(query, key, value, packed_seq_params, arguments)
            if kernels is not None:
                ends = packed_seq_params.cu_seqlens_q
                output = flash_attention(query, key, value, ends, None, arguments, kernels=kernels)
                return output.flatten(1)
        return super().forward(
            query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs
        )

    def _kernels(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedDocuments,
        arguments: FlashArguments,
    ) -> FlashKernels | None:
        """What attends in place of Transformer Engine, if anything does."""
        kernels = None
        if packed.is_replayed or packed.max_seqlen_q <= _LONGEST_FOR_OURS:
            kernels = packed.kernels(query, key, value, arguments)
        is_free = self.config.attention_backend is AttnBackend.auto
        if kernels is None and is_free and query.shape[-1] > _WIDEST_FOR_CUDNN:
            return TORCH_KERNELS
        return kernels
