"""Causal attention over packed documents for the `torch` backend.

The one thing to know: the layout stays `[seq, batch, heads, head_dim]` also when documents are
packed (`qkv_format == "sbhd"` with `cu_seqlens_q` set). Cosines and sines are picked for every
token by its position once, before the layers run, so no layer has to cut the sequence into
documents for them.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.jit import jit_fuser
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention


class RotarySelfAttention(SelfAttention):
    """Self-attention whose rotary embedding is one fused kernel and needs no document bounds.

    Instead of angles it takes `rotary_pos_emb` float32 [2, seq, 1, 1, head_dim]: cosines and sines
    of every token's position, from `rotary_cosines_and_sines`.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Megatron-Core's, with queries and keys rotated as soon as they are there."""
        self._cosines_and_sines = rotary_pos_emb
        output = super().forward(hidden_states, attention_mask, *args, **kwargs)
        self._cosines_and_sines = None
        return output

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Queries and keys rotated; values as they are. Each [seq, batch, heads, head_dim]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return *_rotate(query, key, self._cosines_and_sines), value


def rotary_cosines_and_sines(angles: torch.Tensor, positions: torch.Tensor | slice) -> torch.Tensor:
    """What `RotarySelfAttention` takes.

    Args:
        angles: float32 [longest, 1, 1, head_dim], of each position.
        positions: int64 [seq] of packed documents, or all positions in order.

    Returns:
        float32 [2, seq, 1, 1, head_dim].
    """
    return torch.stack([angles.cos(), angles.sin()])[:, positions]


@jit_fuser
def _rotate(
    query: torch.Tensor, key: torch.Tensor, cosines_and_sines: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cosines, sines = cosines_and_sines[0], cosines_and_sines[1]
    return _turn(query, cosines, sines), _turn(key, cosines, sines)


def _turn(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (heads * cosines + turned * sines).to(heads.dtype)


class PackedAttention(MegatronModule):
    """Grouped-query attention in which documents of a pack never see each other.

    On CUDA in half precision it is torch's variable-length flash attention; elsewhere
    `scaled_dot_product_attention`, one document after the other.

    Args:
        config: Model shape.
        layer_number: Number of the layer, from 1; unused, part of Megatron-Core's interface.
        attn_mask_type: Must be causal.
        attention_type: Must be "self".
        cp_comm_type: Unused; context parallelism is not built.
        softmax_scale: Factor on the scores; 1/sqrt(head_dim) by default.
        pg_collection: Unused; heads are local.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal
        assert attention_type == "self"
        assert config.attention_dropout == 0.0
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attention output.

        Args:
            query: [seq, batch, heads, head_dim].
            key: [seq, batch, groups, head_dim].
            value: [seq, batch, groups, head_dim].
            attention_mask: Must be None: causality and documents say it all.
            attn_mask_type: Unused, the constructor's counts.
            attention_bias: Must be None.
            packed_seq_params: Document boundaries of a pack (batch 1), or None for rows that are
                right-padded, which a causal mask already keeps apart from their padding.

        Returns:
            [seq, batch, heads * head_dim].
        """
        assert attention_mask is None
        assert attention_bias is None
        if packed_seq_params is None:
            output = self._rows(query, key, value)
        elif query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            output = self._varlen(query, key, value, packed_seq_params)
        else:
            output = self._documents(query, key, value, packed_seq_params)
        return output.reshape(query.shape[0], query.shape[1], -1)

    def _rows(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention of every batch row on its own."""
        heads_second = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = scaled_dot_product_attention(
            *heads_second, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return output.permute(2, 0, 1, 3)

    def _documents(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams,
    ) -> torch.Tensor:
        lengths = packed.cu_seqlens_q.diff().tolist()
        documents = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._rows(*document) for document in documents])

    def _varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams,
    ) -> torch.Tensor:
        attend, options = _variable_length_attention()
        return attend(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),
            **options,
        )


@functools.cache
def _variable_length_attention() -> tuple[Callable[..., torch.Tensor], dict[str, bool]]:
    """The kernel of torch, imported where it is used: it brings the compiler stack along."""
    from torch.nn.attention.varlen import varlen_attn

    # Older torch takes fewer key than query heads as they are, newer torch wants to be told.
    has_switch = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if has_switch else {}
