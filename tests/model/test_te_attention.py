"""Who computes attention on the `te` backend, with a class in place of Transformer Engine's."""

import sys
from unittest import mock

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.backends import spec_provider
from mtrain.model.documents import PackedDocuments
from tests.model.test_attention import PLAIN, by_documents, plain_attention
from tests.model.test_flash import HEAD_DIM, HEADS

ENDS = torch.tensor([0, 4, 9], dtype=torch.int32)


class TheirAttention(torch.nn.Module):
    """What Megatron-Core's class is told and asked."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **options):
        super().__init__()
        self.config, self.options = config, options

    def forward(self, query, key, value, mask, *, packed_seq_params=None, **options):
        return "theirs"


@pytest.fixture
def attention_class(monkeypatch):
    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", TheirAttention)
    monkeypatch.delitem(sys.modules, "mtrain.model.te_attention", raising=False)
    yield spec_provider("te").core_attention()
    sys.modules.pop("mtrain.model.te_attention", None)


def build(kind, **options):
    config = TransformerConfig(
        attention_backend=AttnBackend.auto,
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=2,
    )
    return kind(config, 1, AttnMaskType.causal, "self", **options)


def heads():
    torch.manual_seed(0)
    return [torch.randn(9, count, HEAD_DIM) for count in (HEADS, 2, 2)]


def packed(bound=8):
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=ENDS,
        cu_seqlens_kv=ENDS,
        max_seqlen_q=bound,
        max_seqlen_kv=bound,
    )


@pytest.mark.parametrize("scale", [None, 0.3])
def test_kernels_of_ours_attend_where_they_can(attention_class, scale) -> None:
    layer = build(attention_class, softmax_scale=scale)
    assert layer.options == {"softmax_scale": scale, "k_channels": None}
    with mock.patch.object(PackedDocuments, "kernels", lambda *_args: PLAIN):
        output = layer(*heads(), None, packed_seq_params=packed())
    expected = by_documents(
        plain_attention, [one[:, None] for one in heads()], [4, 5], scale=scale or HEAD_DIM**-0.5
    )
    torch.testing.assert_close(output, expected.flatten(1), rtol=1e-5, atol=1e-6)


def test_transformer_engine_attends_elsewhere(attention_class) -> None:
    layer = build(attention_class)
    assert layer(*heads(), None, packed_seq_params=packed()) == "theirs"
    assert layer(*heads(), None) == "theirs"
    with mock.patch.object(PackedDocuments, "kernels", lambda *_args: PLAIN):
        assert layer(*heads(), None, packed_seq_params=packed(8192)) == "theirs"


def wide_heads():
    return [torch.randn(9, count, 256) for count in (HEADS, 2, 2)]


def test_heads_whose_gradients_cudnn_gets_wrong_are_for_torch(attention_class, monkeypatch) -> None:
    monkeypatch.setattr("mtrain.model.te_attention.TORCH_KERNELS", PLAIN)
    layer = build(attention_class, k_channels=256)
    query, key, value = wide_heads()
    output = layer(query, key, value, None, packed_seq_params=packed())
    expected = by_documents(
        plain_attention, [one[:, None] for one in (query, key, value)], [4, 5], scale=256**-0.5
    )
    torch.testing.assert_close(output, expected.flatten(1), rtol=1e-5, atol=1e-6)
    # Who names a kernel gets it.
    layer.config.attention_backend = AttnBackend.fused
    assert layer(*wide_heads(), None, packed_seq_params=packed()) == "theirs"
