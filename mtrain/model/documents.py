"""Documents of a pack as layers are told of them, and whether kernels of ours attend.

The one thing to know: the kernels of torch and cuDNN are made for long sequences. On short
documents most of what they compute is masked, and ours are faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.flash import FlashArguments, FlashKernels
from mtrain.platform.device import has_triton

if TYPE_CHECKING:
    from mtrain.model.kernels.packed_attention import AttentionBlocks

__all__ = ["PackedDocuments", "has_blocks_everywhere", "pack_documents", "power_of_two_above"]

_OLDEST_GPU = (9, 0)  # Hopper


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron-Core's description of a pack, and how kernels of ours share its tokens out.

    Attributes:
        blocks: None where they are not used.
        is_replayed: Whether layers are recorded: kernels of others are planned by the host, so ours
            are taken, if they are there, even where those would be faster.
    """

    blocks: AttentionBlocks | None = None
    is_replayed: bool = False

    def kernels(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arguments: FlashArguments,
    ) -> FlashKernels | None:
        """Ours, if they can take these tensors; as for `flash_attention`."""
        if self.blocks is None:
            return None
        from mtrain.model.kernels.packed_attention import packed_kernels, supports

        if query.shape[1] != self.blocks.group_size * key.shape[1]:
            return None
        return packed_kernels(self.blocks) if supports(query, key, value, arguments) else None


def pack_documents(
    cu_seqlens: torch.Tensor,
    *,
    longest: int,
    num_tokens: int,
    packed_format: str,
    config: TransformerConfig,
) -> PackedDocuments:
    """What attention layers get of a pack.

    Args:
        cu_seqlens: int32 [num_documents + 1], where documents begin.
        longest: Tokens of the longest document.
        num_tokens: Of the pack.
        packed_format: See `LanguageModel`.
        config: Model shape and attention kernel.
    """
    bound = power_of_two_above(longest)
    documents = PackedDocuments(
        qkv_format=packed_format,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=bound,
        max_seqlen_kv=bound,
    )
    if cu_seqlens.is_cuda and _has_kernels(config):
        from mtrain.model.kernels.packed_attention import attention_blocks

        documents.blocks = attention_blocks(cu_seqlens, num_tokens, _group_size(config))
    return documents


def has_blocks_everywhere(config: TransformerConfig) -> bool:
    """Whether kernels of ours attend in every layer, unless tensors are laid out in a strange way.

    Args:
        config: Model shape and attention kernel.
    """
    is_plain = config.window_size is None and config.softmax_type == "vanilla"
    return is_plain and _has_kernels(config)


def _has_kernels(config: TransformerConfig) -> bool:
    """Whether kernels of ours are there, nobody asks for others, and heads may be theirs."""
    is_half = config.params_dtype in (torch.bfloat16, torch.float16)
    is_free = config.attention_backend is AttnBackend.auto
    if not (has_triton() and is_half and is_free) or config.multi_latent_attention:
        return False
    from mtrain.model.kernels.packed_attention import has_kernels

    # The GPU copies blocks of tensors by itself, which the kernels ask of it.
    is_recent = torch.cuda.get_device_capability() >= _OLDEST_GPU
    return is_recent and has_kernels(_group_size(config), config.kv_channels)


def _group_size(config: TransformerConfig) -> int:
    return config.num_attention_heads // config.num_query_groups


def power_of_two_above(length: int) -> int:
    """A bound that few packs differ in: attention kernels are planned anew for every other one."""
    return 1 << max(0, length - 1).bit_length()
