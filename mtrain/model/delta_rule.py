"""The gated delta rule: linear attention whose state forgets, and corrects what it stored.

Token by token, every head holds a state `S` [key_dim, value_dim], at first zero, and does
`S = decay * S; S = S + beta * key (value - key S); output = query S`. Done in chunks of 64 tokens
it is matrix products: inside chunks for all of them at once, and between chunks a linear recurrence
`S = transition S + contribution`, the one loop there is.

The one thing to know: chunks are cut from the packed sequence without regard to documents, so short
documents cost nothing. Masks keep documents apart, and a chunk in which a document begins passes on
a state that owes nothing to earlier chunks; between such chunks the loop runs side by side. All
shapes follow from numbers that the host knows: nothing waits for the GPU.
"""

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
        levels: int64 [at most chunks / n] for n = 2, 3, ...: chunks with no document's beginning
            that are the first such, the second and so on in a row. Filled up with chunk 0, which
            is none.
    """

    positions: torch.Tensor
    visible: torch.Tensor
    continues: torch.Tensor
    lasts: torch.Tensor
    levels: tuple[torch.Tensor, ...]


def cut_into_chunks(
    seq_len: int,
    *,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    device: torch.device,
) -> DocumentChunks:
    """Cuts a sequence, or all rows of a batch alike.

    Args:
        seq_len: Tokens of the sequence or of each row.
        cu_seqlens: int32 [num_documents + 1], where documents of a pack begin, and the end of the
            last. Tokens behind it are padding. None for rows of one document each.
        max_seqlen: Tokens of the longest document, or more; None if it is not known.
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
        levels=_levels(
            last == before,
            num_levels=(min(seq_len, max_seqlen or seq_len) - 1) // CHUNK_SIZE,
            # Padding counts as one more document.
            num_documents=cu_seqlens.shape[0],
        ),
    )


def _levels(
    goes_on: torch.Tensor, *, num_levels: int, num_documents: int
) -> tuple[torch.Tensor, ...]:
    """Chunks by how many of them in a row, ending with them, had no document's beginning.

    Args:
        goes_on: bool [chunks], whether a chunk lies in one document that began before it.
        num_levels: Longest such row there can be.
        num_documents: As many rows as there can be.
    """
    num_chunks = goes_on.shape[0]
    chunks = torch.arange(num_chunks, device=goes_on.device)
    distance = chunks - torch.where(goes_on, 0, chunks).cummax(0).values
    distance, by_distance = distance.sort(stable=True)
    levels = torch.arange(1, num_levels + 2, device=goes_on.device)
    bounds = torch.searchsorted(distance, levels)
    picked = bounds[:-1, None] + chunks[:num_documents]
    picked_chunks = by_distance[picked.clamp(max=num_chunks - 1)]
    table = torch.where(picked < bounds[1:, None], picked_chunks, 0)
    # Each chunk of level n has n others before it that no other of its level has.
    return tuple(row[: num_chunks // (level + 2)] for level, row in enumerate(table.unbind()))


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
    seq_len, num_key_heads = key.shape[0], key.shape[2]
    query = _by_chunk(_normalised(query) * query.shape[-1] ** -0.5)
    key = _by_chunk(_normalised(key))
    # Value heads as [key_heads, value heads of each].
    value = _by_chunk(value.float()).unflatten(2, (num_key_heads, -1))
    beta = _by_chunk(beta.float()[..., None]).squeeze(-1).unflatten(2, (num_key_heads, -1))
    summed = _sum_since_beginning(log_decay, chunks).unflatten(2, (num_key_heads, -1))

    visible, continues, lasts = (
        mask[:, None, None, None] for mask in (chunks.visible, chunks.continues, chunks.lasts)
    )
    decay = _decay(summed[..., :, None], summed[..., None, :], visible)
    solved = _unit_lower_inverse((key @ key.mT)[:, :, :, None] * decay * beta[..., None])
    solved = solved * beta[..., None, :]
    # Of the state from before the chunk, and of tokens at the end of it.
    reading = _decay(summed, 0.0, continues)
    writing = _decay(summed[..., -1:], summed, lasts)

    own_values = solved @ value
    corrections = _shared_product(solved * reading[..., None, :], key)
    written = (key[:, :, :, None] * writing[..., None]).mT
    # The last place goes on from earlier chunks only if all do; then what it reads is all of it.
    transition = torch.diag_embed(reading[..., -1:].expand(*reading.shape[:-1], key.shape[-1]))
    states = _States.apply(transition - written @ corrections, written @ own_values, chunks.levels)
    new_values = own_values - corrections @ states
    scores = (query @ key.mT)[:, :, :, None] * decay
    outputs = scores @ new_values + (query[:, :, :, None] * reading[..., None]) @ states
    return outputs.flatten(2, 3).movedim(3, 1).flatten(0, 1)[:seq_len]


def _normalised(heads: torch.Tensor) -> torch.Tensor:
    heads = heads.float()
    return heads * torch.rsqrt(heads.square().sum(dim=-1, keepdim=True) + _NORM_EPSILON)


def _by_chunk(heads: torch.Tensor) -> torch.Tensor:
    """[seq, batch, heads, dim] as [chunks, batch, heads, place, dim], filled up with zeros."""
    return _cut(heads).movedim(1, 3).contiguous()


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
def _decay(until: torch.Tensor, since: torch.Tensor | float, mask: torch.Tensor) -> torch.Tensor:
    """What is left between two sums of logarithms, and 0 outside of the mask."""
    return (until - since).float().masked_fill(~mask, -torch.inf).exp()


def _unit_lower_inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of the lower triangle of [..., n, n] with ones on its diagonal."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(
        matrix, identity.expand_as(matrix), upper=False, unitriangular=True
    )


def _shared_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[..., repeat, m, n] times [..., n, k], which is not copied for each: [..., repeat, m, k]."""
    return (left.flatten(-3, -2) @ right).unflatten(-2, left.shape[-3:-1])


class _States(torch.autograd.Function):
    """States before each chunk: `state[c + 1] = transition[c] @ state[c] + contribution[c]`.

    Transitions of chunks in which a document begins must be 0. Not left to autograd, which would
    make a gradient of all chunks in every step of the loop.
    """

    @staticmethod
    def forward(
        ctx: Any,
        transition: torch.Tensor,
        contribution: torch.Tensor,
        levels: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        states = torch.cat([torch.zeros_like(contribution[:1]), contribution])
        for level in levels:
            passed_on = transition[level] @ states[level]
            states[level + 1] = passed_on + contribution[level]
        ctx.save_for_backward(transition, states, *levels)
        return states[:-1]

    @staticmethod
    def backward(ctx: Any, grad_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        transition, states, *levels = ctx.saved_tensors
        grads = torch.cat([grad_states, torch.zeros_like(grad_states[:1])])
        for level in reversed(levels):
            # Added, as chunk 0 may come several times; its transition is 0.
            grads.index_add_(0, level, transition[level].mT @ grads[level + 1])
        return grads[1:] @ states[:-1].mT, grads[1:], None
