"""Rotary embeddings: frequencies of every scaling, cosines and sines of tokens, the rotation.

The one thing to know: frequencies have the bits that transformers gives them, so that the angles of
far positions are those the checkpoint was trained with. Megatron-Core's own differ: it hard-codes
three of llama3's four numbers and knows no longrope.
"""

import math

import torch
from megatron.core.jit import jit_fuser

from mtrain.bridge.family import LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from mtrain.model.cpu_passes import Rotation


def rotary_frequencies(rope: Rope, *, longest: int | None = None) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, and the factor on cosines and sines.

    Args:
        rope: The rotary embedding.
        longest: Tokens of the longest sequence; only longrope asks. None for a short one.

    Returns:
        float32 [dim / 2], on the CPU, and the attention factor: 1.0 where there is none.

    Source: transformers' `modeling_rope_utils`, in the same order of operations (bit-equal).
    """
    stretched = rope.base ** _exponents(rope.dim)
    scaling = rope.scaling
    if isinstance(scaling, LinearRope):
        return 1.0 / stretched / scaling.factor, 1.0
    if isinstance(scaling, Llama3Rope):
        return llama3_frequencies(scaling, base=rope.base, head_dim=rope.dim), 1.0
    if isinstance(scaling, YarnRope):
        return _yarn_frequencies(rope, scaling, stretched), scaling.attention_factor
    if isinstance(scaling, LongRope):
        is_long = longest is not None and longest > scaling.original_max_position_embeddings
        divisors = torch.tensor(
            scaling.long_factor if is_long else scaling.short_factor, dtype=torch.float32
        )
        return 1.0 / (divisors * stretched), scaling.attention_factor
    return 1.0 / stretched, 1.0


def _exponents(dim: int) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64).float() / dim


def _yarn_frequencies(rope: Rope, scaling: YarnRope, stretched: torch.Tensor) -> torch.Tensor:
    """Waves that turn often within the original context stay, rare ones are slowed down."""

    def dimension(num_turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.base))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.rounds:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    if last == first:
        last += 0.001
    places = torch.arange(rope.dim // 2, dtype=torch.float32)
    # The complement of a complement, as transformers has it: both round.
    kept = 1 - ((places - first) / (last - first)).clamp(0, 1)
    return 1.0 / (scaling.factor * stretched) * (1 - kept) + 1.0 / stretched * kept


def llama3_frequencies(rope: Llama3Rope, *, base: float, head_dim: int) -> torch.Tensor:
    """Inverse frequencies of the "llama3" scaling.

    Waves longer than the original context are slowed down by `factor`, short ones stay, and those
    between are blended.

    Args:
        rope: Parameters of the scaling.
        base: Theta of the rotary embedding.
        head_dim: Dimensions of a head that turn.

    Returns:
        float32 [head_dim / 2].

    Source: transformers' `modeling_rope_utils`, in the same order of operations (bit-equal).
    """
    frequencies = 1.0 / base ** _exponents(head_dim)
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


class RotaryEmbedding(torch.nn.Module):
    """Cosines and sines of tokens by their positions. It has no parameters and saves nothing.

    Args:
        rope: The rotary embedding.
        device: Where positions will be.
    """

    def __init__(self, rope: Rope, device: torch.device) -> None:
        super().__init__()
        self.rope = rope
        short, self._factor = rotary_frequencies(rope)
        # No buffers: a model that is cast to bfloat16 would cast them too.
        self._short = self._long = short.to(device)
        self._longest_short: int | None = None
        if isinstance(rope.scaling, LongRope):
            self._longest_short = rope.scaling.original_max_position_embeddings
            long, _ = rotary_frequencies(rope, longest=self._longest_short + 1)
            self._long = long.to(device)

    def forward(self, positions: torch.Tensor | slice, *, longest: int) -> torch.Tensor:
        """What attention layers rotate with.

        Args:
            positions: int64 [seq] of packed documents, [batch, seq] of rows, or a slice of the
                positions 0 to `longest`.
            longest: Tokens of the longest document, on the host: longrope chooses by it.

        Returns:
            Cosines and sines float32 [2, seq, 1, 1, dim], times the attention factor; with a batch
            of positions [2, seq, batch, 1, dim]. The two dimensions that turn together have equal
            numbers: 2i and 2i + 1 where the rope is interleaved, else i and i + dim / 2.
        """
        is_long = self._longest_short is not None and longest > self._longest_short
        frequencies = self._long if is_long else self._short
        if isinstance(positions, slice):
            positions = torch.arange(longest, device=frequencies.device)[positions]
        seq_first = positions.unsqueeze(1) if positions.dim() == 1 else positions.t()
        angles = seq_first[..., None, None].float() * frequencies
        halves = torch.stack([angles.cos(), angles.sin()]) * self._factor
        if self.rope.is_interleaved:
            return halves.repeat_interleave(2, dim=-1)
        return torch.cat([halves, halves], dim=-1)


@jit_fuser
def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cosines_and_sines: torch.Tensor,
    is_interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns queries and keys by the positions of their tokens, in one kernel.

    Args:
        query: [seq, batch, heads, head_dim].
        key: [seq, batch, groups, head_dim].
        cosines_and_sines: float32 [2, seq, 1 or batch, 1, dim] from `RotaryEmbedding`; the leading
            `dim` of each head turn, the others pass.
        is_interleaved: Whether dimensions 2i and 2i + 1 turn together, not i and i + dim / 2.

    Returns:
        Queries and keys in their shapes and dtypes.
    """
    cosines, sines = cosines_and_sines[0], cosines_and_sines[1]
    return (
        _turn(query, cosines, sines, is_interleaved),
        _turn(key, cosines, sines, is_interleaved),
    )


def _turn(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, is_interleaved: bool
) -> torch.Tensor:
    dim = cosines.shape[-1]
    leading = heads[..., :dim]
    if not heads.is_cuda and not is_interleaved and heads.dtype == torch.float32:
        rotated = Rotation.apply(leading, cosines, sines)
        return rotated if dim == heads.shape[-1] else torch.cat([rotated, heads[..., dim:]], dim=-1)
    if is_interleaved:
        turned = torch.stack([-leading[..., 1::2], leading[..., 0::2]], dim=-1).flatten(-2)
    else:
        first, second = leading.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    rotated = (leading * cosines + turned * sines).to(heads.dtype)
    if dim == heads.shape[-1]:
        return rotated
    return torch.cat([rotated, heads[..., dim:]], dim=-1)
