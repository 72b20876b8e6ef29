"""The short forward pass of a layer gives the bits of Megatron-Core's, which it leaves out."""

from unittest import mock

import pytest
import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.transformer_layer import TransformerLayer

from mtrain.config import TrainingConfig
from mtrain.parallel import ParallelLayout
from tests.megatron import load_model, losses_and_gradients, packed_inputs
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint, without_spare_layers

VOCAB = 131


class FlatAttention(torch.nn.Module):
    """In the place of Transformer Engine's, which takes the tokens of a pack without a batch."""

    def forward(self, query, key, value, mask, *, attn_mask_type, packed_seq_params, **_others):
        tokens, heads, channels = query.shape
        assert (key.shape[0], value.shape[0], mask) == (tokens, tokens, None)
        assert packed_seq_params.qkv_format == "thd"
        repeated = [
            tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (key, value)
        ]
        return (query * repeated[0].cumsum(0) + repeated[1]).view(tokens, heads * channels)


def inputs_of(form):
    inputs = packed_inputs([7, 1, 12], VOCAB)
    if form != "rows":
        return inputs
    rows = {name: inputs[name].view(2, 10) for name in ("input_ids", "labels")}
    return rows | {"position_ids": torch.arange(10).expand(2, 10)}


def both_ways(state, folder, form):
    """Losses and gradients of the short pass, those of Megatron-Core's, and the calls of that."""
    results, calls = [], []
    for is_short in (True, False):
        (model,) = load_model(state, folder)
        model.packed_format = "thd" if form == "flat" else "sbhd"
        for layer in model.decoder.layers:
            layer.is_recomputed_in_part = not is_short
            layer.self_attention.is_recomputed_or_gated = not is_short
            if form == "flat":
                layer.self_attention.core_attention = FlatAttention()
        with (
            mock.patch.object(
                TransformerLayer, "forward", autospec=True, side_effect=TransformerLayer.forward
            ) as layers,
            mock.patch.object(
                Attention, "forward", autospec=True, side_effect=Attention.forward
            ) as attention,
        ):
            results.append(losses_and_gradients(model, inputs_of(form)))
        calls.append((layers.call_count, attention.call_count))
    return *results, calls


@pytest.mark.parametrize(
    ("name", "form", "tp_size"),
    [
        ("qwen3", "packed", 1),
        ("qwen3", "rows", 2),
        ("qwen3", "flat", 1),
        ("qwen3_moe", "packed", 2),
        ("gpt2", "rows", 1),
        # Norms behind sublayers, and two ropes.
        ("gemma3", "packed", 2),
    ],
)
def test_the_bits_are_those_of_megatron_core(name, form, tp_size, tmp_path):
    folder = make_checkpoint(tmp_path, name, **without_spare_layers(name, pp_size=1))
    layout = ParallelLayout(world_size=tp_size, tp_size=tp_size)
    for ours, theirs, calls in run_ranks(layout, both_ways, folder, form):
        num_layers = 4 if name == "gemma3" else 2
        assert calls == [(0, 0), (num_layers, num_layers)]
        assert torch.equal(ours[0], theirs[0])
        for parameter, gradient in theirs[1].items():
            assert torch.equal(ours[1][parameter], gradient), parameter


def which_way(state, folder, training):
    (model,) = load_model(state, folder, training=training)
    layer = model.decoder.layers[0]
    return layer.is_recomputed_in_part, layer.self_attention.is_recomputed_or_gated


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (("core_attn",), (False, True)),
        (("mlp",), (True, False)),
        (("layernorm",), (True, False)),
        (("layernorm", "core_attn"), (True, True)),
    ],
)
def test_what_is_recomputed_in_part_is_left_to_megatron_core(modules, expected, tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3")
    training = TrainingConfig(recompute_granularity="selective", recompute_modules=modules)
    assert run_ranks(ParallelLayout(), which_way, folder, training) == [expected]
    assert run_ranks(ParallelLayout(), which_way, folder, None) == [(False, False)]
