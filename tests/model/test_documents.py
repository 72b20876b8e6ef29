import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.documents import has_blocks_everywhere, pack_documents

ENDS = torch.tensor([0, 3, 10], dtype=torch.int32)


class OnGPU(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


FIELDS = {
    "num_layers": 1,
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "attention_backend": AttnBackend.auto,
    "params_dtype": torch.bfloat16,
}


def pack(ends=None, **fields):
    return pack_documents(
        ENDS.as_subclass(OnGPU) if ends is None else ends,
        longest=7,
        num_tokens=10,
        packed_format="thd",
        config=TransformerConfig(**FIELDS | fields),
    )


@pytest.fixture
def kernels(monkeypatch):
    """The module of kernels, as Triton would let it be imported."""
    found = SimpleNamespace(
        attention_blocks=lambda _ends, _num_tokens, size: SimpleNamespace(group_size=size),
        has_kernels=lambda group_size, head_dim: (group_size, head_dim) == (2, 128),
        packed_kernels=lambda blocks: ("kernels", blocks),
        supports=lambda *_tensors: True,
    )
    monkeypatch.setitem(sys.modules, "mtrain.model.kernels.packed_attention", found)
    monkeypatch.setattr("mtrain.model.documents.has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return found


def test_layers_are_told_where_documents_begin_and_how_long_they_are_at_most():
    documents = pack(ENDS)
    assert documents.qkv_format == "thd"
    assert documents.cu_seqlens_q is documents.cu_seqlens_kv is ENDS
    # Rounded up, so that kernels are planned for few lengths.
    assert documents.max_seqlen_q == documents.max_seqlen_kv == 8
    assert documents.blocks is None


def test_on_a_gpu_kernels_of_ours_attend(kernels):
    documents = pack()
    assert documents.blocks.group_size == 2
    query, key = torch.empty(10, 4, 128), torch.empty(10, 2, 128)
    assert documents.kernels(query, key, key, None) == ("kernels", documents.blocks)
    # More ranks than key heads: groups are smaller there.
    assert documents.kernels(query[:, :2], key, key, None) is None
    with mock.patch.object(kernels, "supports", lambda *_tensors: False):
        assert documents.kernels(query, key, key, None) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_backend": AttnBackend.flash},
        {"params_dtype": torch.float32},
        {"num_query_groups": 4},
        {"kv_channels": 96},
        {"ends": ENDS},
    ],
)
def test_other_packs_are_not(kernels, fields):
    documents = pack(**fields)
    assert documents.blocks is None
    assert documents.kernels(*[torch.empty(10, 2, 128)] * 3, None) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, True), ({"window_size": (4, 0)}, False), ({"softmax_type": "learnable"}, False)],
)
def test_layers_with_windows_or_sinks_ask_others(fields, expected, kernels, monkeypatch):
    config = TransformerConfig(**FIELDS | fields)
    assert has_blocks_everywhere(config) is expected
    # As where there is no GPU.
    monkeypatch.setattr("mtrain.model.documents.has_triton", lambda: False)
    assert not has_blocks_everywhere(config)


def test_nothing_is_chosen_without_triton(kernels, monkeypatch):
    monkeypatch.setattr("mtrain.model.documents.has_triton", lambda: False)
    assert pack().blocks is None


def test_gpus_before_hopper_attend_with_kernels_of_others(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert pack().blocks is None
