"""The gated delta rule: linear attention whose state forgets, and corrects what it stored.

Token by token, every head holds a state `S` [key_dim, value_dim], at first zero, and does
`S = decay * S; S = S + key beta (value - key S); output = query S`. Done in chunks of 64 tokens it
is matrix products: inside chunks for all of them at once, and between chunks a linear recurrence
`S = transition S + contribution`, which is computed in groups of chunks side by side.

The one thing to know: chunks are cut from the packed sequence without regard to documents, so short
documents cost nothing. Masks keep documents apart, and a chunk in which a document begins has the
transition 0. All shapes follow from numbers that the host knows: nothing waits for the GPU.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.jit import jit_fuser

CHUNK_SIZE = 64
_NORM_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentChunks:
    """How the documents of a sequence lie in chunks of `CHUNK_SIZE` places.

    Attributes:
        positions: int64 [seq], of each token in its document.
        visible: bool [chunks, place, place], whether the first place sees the second: one of the
            same document that is not later.
        continues: bool [chunks, place], whether the document of the place began in an earlier
            chunk.
        lasts: bool [chunks, place], whether the place is of the document that the chunk ends in.
    """

    positions: torch.Tensor
    visible: torch.Tensor
    continues: torch.Tensor
    lasts: torch.Tensor


def cut_into_chunks(
    seq_len: int,
    *,
    cu_seqlens: torch.Tensor | None,
    device: torch.device,
) -> DocumentChunks:
    """Cuts a sequence, or all rows of a batch alike.

    Args:
        seq_len: Tokens of the sequence or of each row.
        cu_seqlens: int32 [num_documents + 1], where documents of a pack begin, and the end of the
            last. Tokens behind it are padding. None for rows of one document each.
        device: Where the result is to lie.
    """
    if cu_seqlens is None:
        cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device)
    num_chunks = -(-seq_len // CHUNK_SIZE)
    places = torch.arange(num_chunks * CHUNK_SIZE, device=device, dtype=cu_seqlens.dtype)
    # Counted from 1: 0 is the document before the first.
    document = torch.searchsorted(cu_seqlens, places, right=True)
    positions = (places - cu_seqlens[document - 1])[:seq_len]
    document = document.view(num_chunks, CHUNK_SIZE)
    last = document[:, -1]
    before = F.pad(last[:-1], (1, 0))
    not_later = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool, device=device).tril()
    return DocumentChunks(
        positions=positions.long(),
        visible=(document[:, :, None] == document[:, None, :]) & not_later,
        continues=document == before[:, None],
        lasts=document == last[:, None],
    )


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    chunks: DocumentChunks,
) -> torch.Tensor:
    """Outputs of all tokens; queries and keys are normalised first, queries also scaled.

    Args:
        query: [seq, batch, key_heads, key_dim].
        key: [seq, batch, key_heads, key_dim].
        value: [seq, batch, value_heads, value_dim]; each key head serves the same number of value
            heads, which follow each other.
        log_decay: [seq, batch, value_heads], at most 0: logarithm of what a token leaves of the
            state.
        beta: [seq, batch, value_heads], from 0 to 1: how much of the value under its key a token
            replaces.
        chunks: From `cut_into_chunks`.

    Returns:
        float32 [seq, batch, value_heads, value_dim].

    Source: Yang et al., "Gated Delta Networks", section 3.3; the result is that of transformers'
    `torch_chunk_gated_delta_rule` with `use_qk_l2norm_in_kernel`.
    """
    query, key, value, beta = _by_chunk(query, key, value, beta)
    summed = _sum_since_beginning(log_decay, chunks).view(beta.shape)
    decay, reading, writing = _decays(summed, chunks.visible, chunks.continues, chunks.lasts)
    solved = _unit_lower_inverse(_attenuated(key @ key.mT, decay) * beta[..., None])
    values_of, keys_of, written, read = _weighted(solved, beta, reading, writing, key, query)

    own_values = values_of @ value
    # A key serves several value heads and is not copied for them.
    corrections = (keys_of.flatten(3, 4) @ key).view(written.mT.shape)
    transition = _transition(reading, written @ corrections)
    states = _States.apply(transition, written @ own_values)
    scores = _attenuated(query @ key.mT, decay)
    outputs = scores @ (own_values - corrections @ states) + read @ states
    return outputs.flatten(2, 3).movedim(3, 1).flatten(0, 1)[: log_decay.shape[0]]


@jit_fuser
def _by_chunk(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `gated_delta_rule` by chunk, in float32; queries and keys normalised.

    Returns:
        query: [chunks, batch, key_heads, place, key_dim].
        key: [chunks, batch, key_heads, place, key_dim].
        value: [chunks, batch, key_heads, value heads of each, place, value_dim].
        beta: [chunks, batch, key_heads, value heads of each, place].
    """
    num_key_heads, key_dim = key.shape[2:]
    query, key = (
        heads * torch.rsqrt(heads.square().sum(dim=-1, keepdim=True) + _NORM_EPSILON)
        for heads in (query.float(), key.float())
    )
    query, key, value, beta = (
        _cut(heads).movedim(1, 3).contiguous()
        for heads in (query * key_dim**-0.5, key, value.float(), beta.float())
    )
    return (
        query,
        key,
        value.unflatten(2, (num_key_heads, -1)),
        beta.unflatten(2, (num_key_heads, -1)),
    )


def _cut(tokens: torch.Tensor) -> torch.Tensor:
    """[seq, ...] as [chunks, place, ...], filled up with zeros."""
    missing = -tokens.shape[0] % CHUNK_SIZE
    padded = F.pad(tokens, (*(0, 0) * (tokens.dim() - 1), 0, missing))
    return padded.unflatten(0, (-1, CHUNK_SIZE))


def _sum_since_beginning(log_decay: torch.Tensor, chunks: DocumentChunks) -> torch.Tensor:
    """Sums from where a document or the chunk begins to each place: [chunks, batch, heads, place].

    In float64: it is small differences of these sums that count, and one token with a strong decay
    would take their digits.
    """
    by_place = _cut(log_decay).double()
    sums = chunks.visible.double() @ by_place.flatten(2)
    return sums.unflatten(2, by_place.shape[2:]).movedim(1, 3)


@jit_fuser
def _decays(
    summed: torch.Tensor, visible: torch.Tensor, continues: torch.Tensor, lasts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is left between two places, of the state at a place, of a place at the chunk's end.

    Args:
        summed: float64 [chunks, batch, key_heads, value heads of each, place].
        visible: See `DocumentChunks`.
        continues: See `DocumentChunks`.
        lasts: See `DocumentChunks`.

    Returns:
        float32 [..., place, place], [..., place] and [..., place]; 0 where a mask is False.
    """
    between = summed[..., :, None] - summed[..., None, :]
    until_end = summed[..., -1:] - summed
    return tuple(
        # Masked before: the exponential may overflow there.
        logarithm.float().masked_fill(~mask[:, None, None, None], -torch.inf).exp()
        for logarithm, mask in ((between, visible), (summed, continues), (until_end, lasts))
    )


def _attenuated(similarity: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Similarities of places under each key head, for each value head that it serves."""
    return similarity[:, :, :, None] * decay


@jit_fuser
def _weighted(
    solved: torch.Tensor,
    beta: torch.Tensor,
    reading: torch.Tensor,
    writing: torch.Tensor,
    key: torch.Tensor,
    query: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of the matrix products.

    Returns:
        values_of: [..., place, place], by which values replace what is under their keys.
        keys_of: [..., place, place], by which keys find what the state has under them.
        written: [..., key_dim, place], keys as they are left at the end of the chunk.
        read: [..., place, key_dim], queries of the state from before the chunk.
    """
    values_of = solved * beta[..., None, :]
    return (
        values_of,
        values_of * reading[..., None, :],
        (key[:, :, :, None] * writing[..., None]).mT,
        query[:, :, :, None] * reading[..., None],
    )


@jit_fuser
def _transition(reading: torch.Tensor, corrected: torch.Tensor) -> torch.Tensor:
    """What a chunk leaves of the state: its last place reads all of it, or none of it."""
    identity = torch.eye(corrected.shape[-1], device=corrected.device)
    return identity * reading[..., -1:, None] - corrected


def _unit_lower_inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of the lower triangle of [..., n, n] with ones on its diagonal."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(
        matrix, identity.expand_as(matrix), upper=False, unitriangular=True
    )


class _States(torch.autograd.Function):
    """States before each chunk: `state[c + 1] = transition[c] @ state[c] + contribution[c]`.

    Not left to autograd, which would keep all steps and make a gradient of all chunks in each.
    """

    @staticmethod
    def forward(ctx: Any, transition: torch.Tensor, contribution: torch.Tensor) -> torch.Tensor:
        states = _after_a_zero(_scan(transition, contribution)[:-1])
        ctx.save_for_backward(transition, states)
        return states

    @staticmethod
    def backward(ctx: Any, grad_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        transition, states = ctx.saved_tensors
        # From the last chunk, after which no state is asked for, to the first.
        backwards = _after_a_zero(transition[1:].mT.flip(0))
        grad = _scan(backwards, _after_a_zero(grad_states[1:].flip(0))).flip(0)
        return grad @ states.mT, grad


def _after_a_zero(chunks: torch.Tensor) -> torch.Tensor:
    return F.pad(chunks, (*(0, 0) * (chunks.dim() - 1), 1, 0))


def _scan(transition: torch.Tensor, contribution: torch.Tensor) -> torch.Tensor:
    """`state[c] = transition[c] @ state[c - 1] + contribution[c]`, from 0.

    In about sqrt(chunks) groups side by side, first as if they began with 0, then from what the
    group before ended with: half again as much to compute, and a fifth of the steps or fewer.

    Args:
        transition: [chunks, ..., dim, dim].
        contribution: [chunks, ..., dim, columns].

    Returns:
        [chunks, ..., dim, columns].
    """
    group_size = math.isqrt(transition.shape[0] - 1) + 1
    # What the chunks of all groups up to a step add, and what they make of the state before them.
    added, made = [contribution[::group_size]], [transition[::group_size]]
    for step in range(1, group_size):
        matrix, column = (x[step::group_size] for x in (transition, contribution))
        # The last group may be shorter.
        added.append(matrix @ added[-1][: len(matrix)] + column)
        made.append(matrix @ made[-1][: len(matrix)])
    before = [torch.zeros_like(contribution[0])]
    for group in range(len(added[0]) - 1):
        before.append(made[-1][group] @ before[-1] + added[-1][group])
    states, starts = torch.empty_like(contribution), torch.stack(before)
    for step in range(group_size):
        matrix = made[step]
        torch.add(added[step], matrix @ starts[: len(matrix)], out=states[step::group_size])
    return states
