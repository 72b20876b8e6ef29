"""Which backend is used, and which modules its layers are made of."""

import pytest

from mtrain.bridge.family import LayerArguments
from mtrain.model import backends
from mtrain.model.attention import PackedAttention
from mtrain.model.backends import block_spec, choose_backend, spec_provider
from mtrain.model.experts import GroupedExperts
from mtrain.model.norm import RMSNorm
from mtrain.parallel import ParallelLayout
from tests.model.test_build import config_of
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("wanted", "is_usable", "expected"),
    [
        ("auto", True, "te"),
        ("auto", False, "torch"),
        ("torch", True, "torch"),
        ("torch", False, "torch"),
        ("te", True, "te"),
    ],
)
def test_transformer_engine_is_used_where_it_can_be(
    monkeypatch, wanted, is_usable, expected
) -> None:
    monkeypatch.setattr(backends, "has_transformer_engine", lambda: is_usable)
    assert choose_backend(wanted) == expected


@pytest.mark.parametrize(
    ("has_gpu", "reason"),
    [
        (False, "needs Transformer Engine, but there is no GPU; or use --transformer_impl torch"),
        (True, r"but it cannot be imported: pip install 'mtrain\[te\]'"),
    ],
)
def test_transformer_engine_that_cannot_be_used_is_refused(monkeypatch, has_gpu, reason) -> None:
    monkeypatch.setattr(backends, "has_transformer_engine", lambda: False)
    monkeypatch.setattr(backends, "has_gpu", lambda: has_gpu)
    with pytest.raises(RuntimeError, match=reason):
        choose_backend("te")


def layers_of(state, name, changes):
    """(norm before attention, attention, norm before MLP, MLP or experts) of every layer."""
    del state
    block = block_spec(
        config_of(name, **changes),
        spec_provider("torch"),
        layers=LayerArguments(),
        fuses_rope=False,
        vp_stage=None,
    )
    result = []
    for layer in block.layer_specs:
        parts = layer.submodules
        attention = parts.self_attention.submodules.core_attention
        mlp = parts.mlp.module.__name__
        result.append((parts.input_layernorm, attention, parts.pre_mlp_layernorm, mlp))
    return block.layer_norm, result


def test_the_torch_backend_needs_nothing_but_our_own_modules() -> None:
    ((norm, layers),) = run_ranks(ParallelLayout(), layers_of, "qwen3", {})
    assert norm is RMSNorm
    assert layers == [(RMSNorm, PackedAttention, RMSNorm, "GatedMLP")] * 4


def test_dense_layers_between_expert_layers_stay_dense() -> None:
    ((_, layers),) = run_ranks(ParallelLayout(), layers_of, "qwen3_moe_mixed", {})
    assert [mlp for *_, mlp in layers] == ["ExpertLayer", "GatedMLP", "ExpertLayer", "ExpertLayer"]


def test_backends_differ_in_attention_alone() -> None:
    torch_layers, te_layers = spec_provider("torch"), spec_provider("te")
    for part in ("column_parallel_linear", "row_parallel_linear"):
        assert getattr(torch_layers, part)() is getattr(te_layers, part)()
    # `te_layers.core_attention` has a test file of its own.
    assert torch_layers.core_attention() is PackedAttention
    assert (torch_layers.packed_format, te_layers.packed_format) == ("sbhd", "thd")
    for provider in (torch_layers, te_layers):
        module, _ = provider.grouped_mlp_modules(True, False)
        assert module is GroupedExperts


def test_attention_with_sinks_is_ours_on_both_backends() -> None:
    for backend in ("torch", "te"):
        provider = spec_provider(backend, has_sinks=True)
        assert provider.core_attention() is PackedAttention
        assert provider.packed_format == "sbhd"
