import math

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.attention import PackedAttention

HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def attention():
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
    )
    return PackedAttention(config, 1, AttnMaskType.causal, "self")


def random_heads(seq, batch):
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, GROUPS, GROUPS)
    return [torch.randn(seq, batch, n, HEAD_DIM, generator=generator) for n in sizes]


def packed_params(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def plain_attention(query, key, value):
    """Softmax attention written out, for one document `[seq, 1, heads, head_dim]`."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / math.sqrt(HEAD_DIM)
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


@pytest.mark.parametrize("lengths", [[7], [1, 6], [3, 2, 2]])
def test_every_document_attends_to_itself_alone(lengths):
    query, key, value = random_heads(7, 1)
    output = attention()(query, key, value, None, packed_seq_params=packed_params(lengths))
    documents = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    expected = torch.cat([plain_attention(*document) for document in documents])
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_rows_of_a_batch_are_causal():
    query, key, value = random_heads(5, 3)
    output = attention()(query, key, value, None)
    torch.testing.assert_close(output, plain_attention(query, key, value), rtol=1e-5, atol=1e-6)
