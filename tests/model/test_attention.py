import math
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, checkpoint
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import GptOssConfig, Qwen3NextConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextAttention,
    Qwen3NextRotaryEmbedding,
)

from mtrain.bridge.family import Rope
from mtrain.model.attention import PackedAttention, RotarySelfAttention
from mtrain.model.norm import RMSNorm
from mtrain.model.rope import RotaryEmbedding
from mtrain.parallel import ParallelLayout
from tests.model.test_flash import PLAIN
from tests.ranks import run_ranks

HEADS, GROUPS, HEAD_DIM = 4, 2, 8
SCALE = 1 / math.sqrt(HEAD_DIM)


def attention(*, layer_number=1, v_channels=None, softmax_scale=None, **fields):
    fields = {"num_query_groups": GROUPS, **fields}
    config = TransformerConfig(
        num_layers=4,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        attention_dropout=0.0,
        **fields,
    )
    channels = {} if v_channels is None else {"k_channels": HEAD_DIM, "v_channels": v_channels}
    return PackedAttention(
        config,
        layer_number,
        AttnMaskType.causal,
        "self",
        softmax_scale=softmax_scale,
        **channels,
    )


def random_heads(seq, batch, *, groups=GROUPS, v_channels=HEAD_DIM):
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, HEAD_DIM), (groups, HEAD_DIM), (groups, v_channels))
    return [torch.randn(seq, batch, *shape, generator=generator) for shape in shapes]


def packed_params(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def plain_attention(query, key, value, *, window=None, scale=SCALE):
    """Softmax attention written out, for one document `[seq, 1, heads, head_dim]`."""
    key, value = (x.repeat_interleave(HEADS // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
    if window is not None:
        places = torch.arange(len(query))
        hidden |= places[:, None] - places > window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


def by_documents(function, heads, lengths, **options):
    documents = zip(*(x.split(lengths) for x in heads), strict=True)
    return torch.cat([function(*document, **options) for document in documents])


@pytest.mark.parametrize("lengths", [[7], [1, 6], [3, 2, 2]])
def test_every_document_attends_to_itself_alone(lengths):
    heads = random_heads(7, 1)
    output = attention()(*heads, None, packed_seq_params=packed_params(lengths))
    expected = by_documents(plain_attention, heads, lengths)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_rows_of_a_batch_are_causal():
    query, key, value = random_heads(5, 3)
    output = attention()(query, key, value, None)
    torch.testing.assert_close(output, plain_attention(query, key, value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 4])
def test_heads_share_keys_and_values_of_their_group(groups):
    heads = random_heads(5, 2, groups=groups)
    output = attention(num_query_groups=groups)(*heads, None)
    torch.testing.assert_close(output, plain_attention(*heads), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [0, 1, 4, 5, 100])
def test_a_token_sees_itself_and_as_many_before_as_the_window_says(window):
    heads = random_heads(9, 1)
    windowed = attention(window_size=(window, 0))
    output = windowed(*heads, None, packed_seq_params=packed_params([6, 3]))
    expected = by_documents(plain_attention, heads, [6, 3], window=window)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    rows = random_heads(9, 2)
    expected_rows = plain_attention(*rows, window=window)
    torch.testing.assert_close(windowed(*rows, None), expected_rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("frequency", "windowed_layers"), [(None, [1, 2, 3, 4]), (2, [1, 3]), ([0, 1, 1, 0], [2, 3])]
)
def test_layers_have_windows_as_the_config_says(frequency, windowed_layers):
    fields = {"window_size": (2, 0), "window_attn_skip_freq": frequency}
    layers = [attention(layer_number=number, **fields) for number in range(1, 5)]
    assert [layer.window for layer in layers] == [
        2 if number in windowed_layers else None for number in range(1, 5)
    ]


@pytest.mark.parametrize("window", [None, 2])
def test_values_may_be_smaller_than_keys(window):
    """As in multi-head latent attention."""
    heads = random_heads(6, 1, groups=HEADS, v_channels=5)
    fields = {} if window is None else {"window_size": (window, 0)}
    latent = attention(v_channels=5, num_query_groups=HEADS, **fields)
    output = latent(*heads, None, packed_seq_params=packed_params([4, 2]))
    assert output.shape == (6, 1, HEADS * 5)
    expected = by_documents(plain_attention, heads, [4, 2], window=window)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_scores_have_the_scale_that_is_asked_for():
    heads = random_heads(6, 1)
    output = attention(softmax_scale=0.07)(*heads, None)
    torch.testing.assert_close(output, plain_attention(*heads, scale=0.07), rtol=1e-5, atol=1e-6)


def with_random_sinks(layer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.softmax_offset.copy_(torch.randn(HEADS, generator=generator) * 2)
    return layer


def gpt_oss_attention(query, key, value, sinks, *, sliding_window):
    """Of transformers, with the mask that its model makes for this layer."""
    config = GptOssConfig(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, sliding_window=sliding_window
    )
    config._attn_implementation = "eager"
    seq, batch = query.shape[:2]
    make = create_causal_mask if sliding_window is None else create_sliding_window_causal_mask
    mask = make(
        config=config,
        inputs_embeds=torch.zeros(batch, seq, HEADS * HEAD_DIM),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(seq)[None].expand(batch, -1),
    )
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, sinks=sinks, training=True)
    heads_second = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    output, _ = eager_attention_forward(module, *heads_second, mask, SCALE)
    return output.transpose(0, 1).flatten(2)


@pytest.mark.parametrize("lengths", [None, [4, 5]], ids=["rows", "packed"])
@pytest.mark.parametrize("sliding_window", [None, 1, 3])
def test_sinks_and_their_gradients_equal_hugging_face(sliding_window, lengths):
    fields = {} if sliding_window is None else {"window_size": (sliding_window - 1, 0)}
    layer = with_random_sinks(attention(softmax_type="learnable", **fields))
    heads = [x.requires_grad_() for x in random_heads(9, 2 if lengths is None else 1)]
    inputs = [*heads, layer.softmax_offset]
    packed = None if lengths is None else packed_params(lengths)
    output = layer(*heads, None, packed_seq_params=packed)
    grads = torch.autograd.grad(output.square().sum(), inputs)
    expected = by_documents(
        gpt_oss_attention,
        heads,
        lengths or [9],
        sinks=layer.softmax_offset,
        sliding_window=sliding_window,
    )
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def both_ways(state, window, lengths):
    """Flash attention with kernels written out, and what is done on a CPU."""
    fields = {} if window is None else {"window_size": (window, 0)}
    layer = with_random_sinks(attention(softmax_type="learnable", v_channels=5, **fields))
    heads = random_heads(9, 2 if lengths is None else 1, v_channels=5)
    packed = None if lengths is None else packed_params(lengths)
    with patch("mtrain.model.flash.TORCH_KERNELS", PLAIN):
        output = layer._flash(*heads, packed).flatten(2)
    return output.detach(), layer(*heads, None, packed_seq_params=packed).detach()


@pytest.mark.parametrize("lengths", [None, [4, 5]], ids=["rows", "packed"])
@pytest.mark.parametrize("window", [None, 2])
def test_the_way_of_a_gpu_equals_that_of_a_cpu(window, lengths):
    """But for the kernels: rows, packs, windows and small values reach them as they are."""
    [(output, expected)] = run_ranks(ParallelLayout(), both_ways, window, lengths)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_sinks_are_split_over_tensor_parallel_ranks_and_counted_by_each():
    layer = attention(
        softmax_type="learnable", tensor_model_parallel_size=2, params_dtype=torch.bfloat16
    )
    offset = layer.softmax_offset
    assert dict(layer.named_parameters()).keys() == {"softmax_offset"}
    assert offset.shape == (HEADS // 2,)
    assert offset.dtype == torch.bfloat16
    assert offset.tensor_model_parallel
    assert offset.partition_dim == 0
    assert not list(attention().parameters())


def self_attention(*, layer_number=1, **fields):
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        add_bias_linear=False,
        qk_layernorm=True,
        **fields,
    )
    submodules = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=RMSNorm,
        k_layernorm=RMSNorm,
    )
    torch.manual_seed(0)
    layer = RotarySelfAttention(config, submodules, layer_number, AttnMaskType.causal)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    return layer


def hidden_states():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 2, HEADS * HEAD_DIM, generator=generator).requires_grad_()


def cosines_and_sines(base, dim=HEAD_DIM):
    return RotaryEmbedding(Rope(base=base, dim=dim), torch.device("cpu"))(slice(None), longest=7)


def gated_by_both(state):
    """Ours and Qwen3-Next's layer with a gate and half of each head turning."""
    ours = self_attention(attention_output_gate=True, layernorm_zero_centered_gamma=True)
    config = Qwen3NextConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
        },
    )
    config._attn_implementation = "sdpa"
    theirs = Qwen3NextAttention(config, 0)
    # Ours: the queries of a group, their gates, a key, a value. Theirs: query and gate by heads.
    grouped = ours.linear_qkv.weight.detach().unflatten(0, (GROUPS, -1))
    query, gate, key, value = grouped.split([16, 16, HEAD_DIM, HEAD_DIM], dim=1)
    by_heads = [x.reshape(HEADS, HEAD_DIM, -1) for x in (query, gate)]
    theirs.q_proj.weight.data = torch.cat(by_heads, dim=1).flatten(0, 1)
    theirs.k_proj.weight.data = key.flatten(0, 1)
    theirs.v_proj.weight.data = value.flatten(0, 1)
    theirs.o_proj.weight.data = ours.linear_proj.weight.data
    theirs.q_norm.weight.data = ours.q_layernorm.weight.data
    theirs.k_norm.weight.data = ours.k_layernorm.weight.data

    hidden = hidden_states()
    output, _ = ours(hidden, None, rotary_pos_emb=cosines_and_sines(100.0, dim=4))
    batch_first = hidden.transpose(0, 1)
    embedding = Qwen3NextRotaryEmbedding(config)(batch_first, torch.arange(7)[None])
    expected, _ = theirs(batch_first, embedding, None)
    (grad,) = torch.autograd.grad(output.square().sum(), hidden)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), hidden)
    return (output.detach(), grad), (expected.transpose(0, 1).detach(), expected_grad)


def test_gate_and_partial_rotation_equal_hugging_face():
    [(ours, theirs)] = run_ranks(ParallelLayout(), gated_by_both)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert (ours[1] - theirs[1]).abs().max() <= 1e-5 * theirs[1].abs().max()


def outputs_with(state, layer_number, fields):
    """Output of a layer that gets: no rope, one or the other, and both in three ways."""
    layer = self_attention(layer_number=layer_number, **fields)
    full, window = cosines_and_sines(1e6), cosines_and_sines(100.0)

    def run(hidden, rotary):
        return layer(hidden, None, rotary_pos_emb=rotary)[0]

    both = torch.stack([full, window])
    outputs = {
        "none": run(hidden_states(), None),
        "full": run(hidden_states(), full),
        "window": run(hidden_states(), window),
        "tuple": run(hidden_states(), (full, window)),
        "tensor": run(hidden_states(), both),
        "recomputed": checkpoint(run, False, hidden_states(), both),
    }
    outputs["recomputed"].sum().backward()
    assert layer.linear_qkv.weight.grad is not None
    return {name: output.detach() for name, output in outputs.items()}


@pytest.mark.parametrize(("layer_number", "own"), [(1, "window"), (2, "full")])
def test_layers_with_a_window_rotate_with_the_second_rope(layer_number, own):
    fields = {"window_size": (2, 0), "window_attn_skip_freq": [1, 0]}
    [outputs] = run_ranks(ParallelLayout(), outputs_with, layer_number, fields)
    assert not torch.allclose(outputs["full"], outputs["window"])
    for way in ("tuple", "tensor", "recomputed"):
        assert torch.equal(outputs[way], outputs[own]), way


@pytest.mark.parametrize(("layer_number", "rotates"), [(1, False), (2, True)])
def test_layers_without_rope_do_not_rotate(layer_number, rotates):
    [outputs] = run_ranks(ParallelLayout(), outputs_with, layer_number, {"no_rope_freq": [1, 0]})
    assert torch.equal(outputs["full"], outputs["none"]) != rotates


def test_pairs_are_interleaved_where_the_config_says_so():
    [plain] = run_ranks(ParallelLayout(), outputs_with, 1, {})
    [interleaved] = run_ranks(ParallelLayout(), outputs_with, 1, {"rotary_interleaved": True})
    assert torch.equal(plain["none"], interleaved["none"])
    assert not torch.allclose(plain["full"], interleaved["full"])
