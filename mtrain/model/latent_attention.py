"""Multi-head latent attention for both backends.

The one thing to know: Megatron-Core's own class needs Transformer Engine to be built at all, and
cuts packed sequences into documents on the host to rotate them. Here cosines and sines of every
token come ready made, and every tensor-parallel rank holds the down-projections whole.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig

from mtrain.model.replicated import ReplicatedLinear
from mtrain.model.rope import rotate

# The Hugging Face classes do not take the epsilon of the model for these norms.
_LATENT_EPSILON = 1e-6


class LatentSelfAttention(Attention):
    """Self-attention whose keys, values and maybe queries pass through few dimensions.

    Args:
        config: Model shape. `kv_channels` is the size of a head of values.
        submodules: `linear_q_proj`, or `q_layernorm` and `linear_q_up_proj`; `kv_layernorm` and
            `linear_kv_up_proj`; `core_attention` and `linear_proj`.
        layer_number: Number of the layer, from 1.
        attn_mask_type: Must be causal.
        cp_comm_type: Unused; context parallelism is not built.
        pg_collection: Process groups.
        is_interleaved: Whether neighbouring dimensions turn together; see `Rope`.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        is_interleaved: bool,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        # Megatron-Core's forward pass asks for both.
        self.q_layernorm = self.k_layernorm = None
        self.is_interleaved = is_interleaved
        self.q_head_dim = config.qk_head_dim + config.qk_pos_emb_head_dim
        query_size = config.num_attention_heads * self.q_head_dim
        if config.q_lora_rank is None:
            self.linear_q_proj = self._up(submodules.linear_q_proj, config.hidden_size, query_size)
        else:
            self.linear_q_down_proj = ReplicatedLinear(
                config.hidden_size, config.q_lora_rank, config=config
            )
            self.q_layernorm = self._norm(submodules.q_layernorm, config.q_lora_rank)
            self.linear_q_up_proj = self._up(
                submodules.linear_q_up_proj, config.q_lora_rank, query_size
            )
        self.linear_kv_down_proj = ReplicatedLinear(
            config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim, config=config
        )
        self.kv_layernorm = self._norm(submodules.kv_layernorm, config.kv_lora_rank)
        self.linear_kv_up_proj = self._up(
            submodules.linear_kv_up_proj,
            config.kv_lora_rank,
            config.num_attention_heads * (config.qk_head_dim + config.v_head_dim),
        )

    def _up(self, linear: type, in_size: int, out_size: int) -> torch.nn.Module:
        return build_module(
            linear,
            in_size,
            out_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )

    def _norm(self, norm: type, size: int) -> torch.nn.Module:
        return build_module(norm, hidden_size=size, config=self.config, eps=_LATENT_EPSILON)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Megatron-Core's, which wants to know nothing of cosines and sines.

        Args:
            hidden_states: [seq (/ tp_size), batch, hidden].
            attention_mask: Must be None.
            *args: As for Megatron-Core's class.
            rotary_pos_emb: float32 [2, seq, 1, 1, rotary_dim], cosines and sines of every token.
            **kwargs: As for Megatron-Core's class.
        """
        self._cosines_and_sines = rotary_pos_emb
        output = super().forward(hidden_states, attention_mask, *args, **kwargs)
        self._cosines_and_sines = None
        return output

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of this rank's heads, rotated.

        Queries and keys are [seq, batch, heads, head_dim + rotary_dim], values [seq, batch, heads,
        value_dim].
        """
        assert split_qkv
        assert not output_gate
        query_latent = hidden_states
        if self.config.q_lora_rank is not None:
            query_latent, _ = self.linear_q_down_proj(hidden_states)
        compressed, _ = self.linear_kv_down_proj(hidden_states)
        latent, key_rotary = compressed.split(
            [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1
        )
        # Every rank needs it for its own heads, so their gradients are added up.
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            key_rotary = gather_from_sequence_parallel_region(
                key_rotary, tensor_parallel_output_grad=True, group=group
            )
        elif group.size() > 1:
            key_rotary = copy_to_tensor_model_parallel_region(key_rotary, group=group)
        return self._expand(query_latent, latent, key_rotary)

    def _expand(
        self,
        query_latent: torch.Tensor,
        latent: torch.Tensor,
        key_rotary: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.config
        if config.q_lora_rank is None:
            query, _ = self.linear_q_proj(query_latent)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(query_latent))
        expanded, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        heads = (*query.shape[:2], self.num_attention_heads_per_partition)
        query, query_rotary = query.view(*heads, self.q_head_dim).split(
            [config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1
        )
        key, value = expanded.view(*heads, config.qk_head_dim + config.v_head_dim).split(
            [config.qk_head_dim, config.v_head_dim], dim=-1
        )
        query_rotary, key_rotary = rotate(
            query_rotary,
            key_rotary.unsqueeze(2),
            self._cosines_and_sines,
            is_interleaved=self.is_interleaved,
        )
        query = torch.cat([query, query_rotary], dim=-1)
        key = torch.cat([key, key_rotary.expand(*heads, -1)], dim=-1)
        # Transformer Engine wants values that are no view.
        return query, key, value.contiguous()
