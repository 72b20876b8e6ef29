"""Rotary frequencies of checkpoints that scale them.

Megatron-Core hard-codes three of llama3's four numbers, so the frequencies are computed here.
"""

import math

import torch

from mtrain.bridge.family import Llama3Rope


def llama3_frequencies(rope: Llama3Rope, *, base: float, head_dim: int) -> torch.Tensor:
    """Inverse frequencies of the "llama3" scaling.

    Waves longer than the original context are slowed down by `factor`, short ones stay, and those
    between are blended.

    Args:
        rope: Parameters of the scaling.
        base: Theta of the rotary embedding.
        head_dim: Size of an attention head.

    Returns:
        float32 [head_dim / 2].

    Source: transformers' `modeling_rope_utils`, in the same order of operations (bit-equal).
    """
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    context = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    is_long = wavelengths > context / rope.low_freq_factor
    is_short = wavelengths < context / rope.high_freq_factor
    scaled = torch.where(is_long, frequencies / rope.factor, frequencies)
    blend = (context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    return torch.where(is_long | is_short, scaled, blended)
