"""Causal attention over packed documents: that of `torch`, and of `te` where heads have sinks.

The one thing to know: the layout stays `[seq, batch, heads, head_dim]` also when documents are
packed (`qkv_format == "sbhd"` with `cu_seqlens_q` set). Cosines and sines are picked for every
token by its position once, before the layers run, so no layer has to cut the sequence into
documents for them. Both backends rotate that way.
"""

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import scaled_dot_product_attention

from mtrain.model.cpu_passes import swap_rows
from mtrain.model.documents import PackedDocuments
from mtrain.model.flash import FlashArguments, flash_attention
from mtrain.model.norm import RMSNorm
from mtrain.model.rope import rotate
from mtrain.platform.device import has_triton


class RotarySelfAttention(SelfAttention):
    """Self-attention whose rotary embedding needs no document bounds.

    The step from the product of `linear_qkv` to queries, keys and values is one function where
    `fuses_rope` asks for it: heads are taken apart, normed and rotated, on a GPU in one kernel, on
    a CPU in float32. Elsewhere, and for interleaved ropes and gated attention, Megatron-Core does
    the former and a compiled function rotates.

    Instead of angles it takes `rotary_pos_emb` from `RotaryEmbedding`, or None for no rotation:
    cosines and sines of every token, float32 [2, seq, 1, 1, dim]. For a model with two ropes it is
    the pair of layers without and with a sliding window: a tuple or, where layers are recomputed
    (Megatron-Core saves tensors and no tuples), one tensor [2, 2, seq, 1, 1, dim].

    Args:
        *args: Of Megatron-Core's self-attention.
        fuses_rope: Whether to use that function where it can be used.
        **kwargs: As `args`.
    """

    def __init__(self, *args: Any, fuses_rope: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.fuses_rope = (
            fuses_rope
            and not config.rotary_interleaved
            and not config.attention_output_gate
            # Megatron-Core gathers heads that ranks share.
            and config.num_query_groups >= self.world_size
        )
        self.is_recomputed_or_gated = self.checkpoint_core_attention or config.attention_output_gate

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Megatron-Core's, with queries and keys rotated as soon as they are there."""
        self._cosines_and_sines = self._choose(rotary_pos_emb)
        if self.is_recomputed_or_gated:
            output = super().forward(
                hidden_states, attention_mask, packed_seq_params=packed_seq_params, **unused
            )
        else:
            output = self._attend(hidden_states, attention_mask, packed_seq_params)
        self._cosines_and_sines = None
        return output

    def _attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed: PackedSeqParams | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Without what Megatron-Core does for inference and offloading; see `DecoderLayer`."""
        heads = self.get_query_key_value_tensors(hidden_states)
        is_flat = packed is not None and packed.qkv_format == "thd"
        if is_flat:
            heads = [tensor.squeeze(1) for tensor in heads]
        output = self.core_attention(
            *heads,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed,
        )
        return self.linear_proj(output.reshape(len(output), 1, -1) if is_flat else output)

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """Queries and keys rotated; values, and the gate if there is one, as they are.

        Each [seq, batch, heads, head_dim].
        """
        if self.fuses_rope and self._can_fuse(hidden_states):
            return self._fused(hidden_states)
        query, key, *others = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        if self._cosines_and_sines is not None:
            query, key = rotate(query, key, self._cosines_and_sines, self.config.rotary_interleaved)
        return query, key, *others

    def _can_fuse(self, hidden_states: torch.Tensor) -> bool:
        if hidden_states.is_cuda:
            return has_triton()
        has_other_norm = isinstance(self.q_layernorm, RMSNorm) and self.q_layernorm.is_zero_centered
        return hidden_states.dtype == torch.float32 and not has_other_norm

    def _fused(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mixed, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        norm = self.q_layernorm
        has_norm = isinstance(norm, RMSNorm)
        groups = self.num_query_groups_per_partition
        options = {
            "num_groups": groups,
            "queries_per_group": self.num_attention_heads_per_partition // groups,
            "head_dim": self.hidden_size_per_attention_head,
        }
        if has_norm:
            options["eps"] = norm.eps
        if hidden_states.is_cuda:
            from mtrain.model.kernels.query_key_value import split_norm_rotate

            options["is_zero_centered"] = has_norm and norm.is_zero_centered
        else:
            from mtrain.model.cpu_passes import split_norm_rotate
        # Called, because data parallelism may still be gathering what the last step changed.
        norms = (self.q_layernorm, self.k_layernorm)
        weights = [norm(None) if has_norm else None for norm in norms]
        return split_norm_rotate(mixed, self._cosines_and_sines, *weights, **options)

    def _choose(
        self, rotary: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor | None:
        """What this layer rotates with."""
        config = self.config
        if config.no_rope_freq and config.no_rope_freq[self.layer_number - 1]:
            return None
        if isinstance(rotary, tuple) or (rotary is not None and rotary.dim() == 6):
            return rotary[1 if attention_window(config, self.layer_number) is not None else 0]
        return rotary


def attention_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens before itself that a token of this layer sees; None for all of them."""
    if not is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    ):
        return None
    before, after = config.window_size
    assert after == 0, "attention is causal"
    return before


class PackedAttention(MegatronModule):
    """Grouped-query attention in which documents of a pack never see each other.

    On CUDA in half precision it is a kernel of ours for packs of short documents, torch's
    variable-length flash attention for others; elsewhere `scaled_dot_product_attention`, one
    document after the other. With learnable sinks
    (`softmax_type` "learnable") every head has one more score, the parameter `softmax_offset`
    [heads on this rank], which takes its share of the softmax and gives nothing.

    Args:
        config: Model shape.
        layer_number: Number of the layer, from 1: says whether it has a sliding window.
        attn_mask_type: Must be causal.
        attention_type: Must be "self".
        cp_comm_type: Unused; context parallelism is not built.
        softmax_scale: Factor on the scores; 1/sqrt(k_channels) by default.
        k_channels: Size of a head of queries and keys; `kv_channels` of the config by default.
        v_channels: Size of a head of values, at most `k_channels`; as large by default.
        pg_collection: Unused; heads are local.

    Source: the sinks are those of transformers' `GptOssAttention`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal
        assert attention_type == "self"
        assert config.attention_dropout == 0.0
        assert config.softmax_type in ("vanilla", "learnable")
        head_dim = k_channels or config.kv_channels
        assert (v_channels or head_dim) <= head_dim
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(head_dim)
        self.window = attention_window(config, layer_number)
        self.register_parameter("softmax_offset", None)
        if config.softmax_type == "learnable":
            num_heads = config.num_attention_heads // config.tensor_model_parallel_size
            device = torch.cuda.current_device()
            offset = torch.empty(num_heads, dtype=config.params_dtype, device=device)
            self.softmax_offset = torch.nn.Parameter(offset)
            set_tensor_model_parallel_attributes(
                self.softmax_offset, is_parallel=True, dim=0, stride=1
            )

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
            query: [seq, batch, heads, k_channels].
            key: [seq, batch, groups, k_channels].
            value: [seq, batch, groups, v_channels].
            attention_mask: Must be None: causality, window and documents say it all.
            attn_mask_type: Unused, the constructor's counts.
            attention_bias: Must be None.
            packed_seq_params: Document boundaries of a pack (batch 1), or None for rows that are
                right-padded, which a causal mask already keeps apart from their padding.

        Returns:
            [seq, batch, heads * v_channels].
        """
        assert attention_mask is None
        assert attention_bias is None
        is_plain = self.window is None and self.softmax_offset is None
        can_flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        if can_flash and not (packed_seq_params is None and is_plain):
            output = self._flash(query, key, value, packed_seq_params)
        elif packed_seq_params is None:
            output = self._rows(query, key, value)
        else:
            output = self._documents(query, key, value, packed_seq_params)
        return output.reshape(query.shape[0], query.shape[1], -1)

    def _rows(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention of every batch row on its own."""
        heads_second = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        if self.softmax_offset is not None:
            mask = causal_mask(len(query), self.window, query.device)
            output = attention_with_sinks(
                *heads_second, self.softmax_offset, mask=mask, scale=self.softmax_scale
            )
            return output.permute(2, 0, 1, 3)
        is_wide = self.window is None or self.window >= len(query) - 1
        output = scaled_dot_product_attention(
            *heads_second,
            attn_mask=None if is_wide else causal_mask(len(query), self.window, query.device),
            is_causal=is_wide,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        tokens_second = output.permute(0, 2, 1, 3)
        return tokens_second.transpose(0, 1) if output.is_cuda else swap_rows(tokens_second)

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

    def _flash(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams | None,
    ) -> torch.Tensor:
        """The variable-length kernel on a pack, or on rows as documents of one length."""
        longest, batch = query.shape[:2]
        if packed is None:
            ends = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * longest
        else:
            ends, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        arguments = FlashArguments(scale=self.softmax_scale, window=self.window, longest=longest)
        tokens = [tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value)]
        kernels = None
        if isinstance(packed, PackedDocuments):
            kernels = packed.kernels(*tokens, arguments)
        output = flash_attention(*tokens, ends, self.softmax_offset, arguments, kernels=kernels)
        return output.unflatten(0, (batch, -1)).transpose(0, 1)


def causal_mask(seq: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Who sees whom in one document: bool [seq, seq], True where a query (row) sees a key.

    Args:
        seq: Tokens of the document.
        window: Tokens before itself that a token sees; None for all of them.
        device: Where the mask is wanted.
    """
    past = torch.ones(seq, seq, dtype=torch.bool, device=device).tril()
    return past if window is None else past.triu(-window)


def attention_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    *,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention written out, with a score more for each head that no value answers.

    Args:
        query: [batch, heads, seq, k_channels].
        key: [batch, groups, seq, k_channels].
        value: [batch, groups, seq, v_channels].
        sinks: [heads].
        mask: bool [seq, seq], True where a query sees a key.
        scale: Factor on the scores; the sinks are not scaled.

    Returns:
        [batch, heads, seq, v_channels].
    """
    group_size = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group_size, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    sink_scores = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sink_scores], dim=-1).softmax(dim=-1)
    return weights[..., :-1].to(value.dtype) @ value
