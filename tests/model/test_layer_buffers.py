"""Where recorded layers read a micro-batch; that they do is in tests/model/test_replay.py."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.documents import pack_documents
from mtrain.model.layer_buffers import LayerBuffers, LayerInputs, MicroBatchKind

CONFIG = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)


def inputs(lengths, *, seed=0, has_padding=False, needs_grad=True):
    torch.manual_seed(seed)
    total = sum(lengths)
    packed = pack_documents(
        torch.tensor([0, *lengths]).cumsum(0).int(),
        longest=max(lengths),
        num_tokens=total,
        packed_format="sbhd",
        config=CONFIG,
    )
    return LayerInputs(
        hidden=torch.randn(total, 1, 8, requires_grad=needs_grad),
        rotary=torch.randn(2, total, 1, 1, 4),
        padding=torch.rand(1, total) < 0.5 if has_padding else None,
        packed=packed,
    )


def kind(*args, knows_no_longest=False, **options):
    return MicroBatchKind.of(inputs(*args, **options), knows_no_longest=knows_no_longest)


def test_packs_of_a_length_are_of_one_kind() -> None:
    assert kind([30, 20, 50]) == kind([25, 45, 10, 20], seed=1)


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([30, 20, 51], {}),
        ([1] * 70 + [30], {}),
        ([80, 20], {}),
        ([30, 20, 50], {"has_padding": True}),
        ([30, 20, 50], {"needs_grad": False}),
    ],
)
def test_what_a_recording_cannot_serve_is_of_another(lengths, options) -> None:
    assert kind(lengths, **options) != kind([30, 20, 50])


def test_the_longest_document_matters_only_to_who_asks() -> None:
    assert kind([80, 20], knows_no_longest=True) == kind([50, 50], knows_no_longest=True)


def test_buffers_stay_where_they_are() -> None:
    first, second = inputs([30, 20, 50]), inputs([25, 45, 10, 20], seed=1)
    buffers = LayerBuffers(MicroBatchKind.of(first, knows_no_longest=False), first, CONFIG)
    places = None
    for batch in (first, second):
        buffers.fill(batch)
        ours = buffers.inputs
        tensors = (ours.hidden, ours.rotary, ours.packed.cu_seqlens_q)
        assert torch.equal(ours.hidden, batch.hidden)
        assert torch.equal(ours.rotary, batch.rotary)
        assert places in (None, [tensor.data_ptr() for tensor in tensors])
        places = [tensor.data_ptr() for tensor in tensors]
    assert ours.hidden.is_leaf
    assert ours.hidden.requires_grad
    assert ours.packed.cu_seqlens_q.tolist() == [0, 25, 70, 80, *[100] * 61]
    assert ours.packed.is_replayed
