"""The delta net against Hugging Face's, whose weights it gets with their rows in its own order."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from transformers.models.qwen3_next import modeling_qwen3_next

from mtrain.model.delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from mtrain.model.delta_rule import cut_into_chunks
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks

# In narrower heads some key is near zero, and normalising it multiplies all rounding.
HIDDEN, KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, KERNEL = 24, 2, 4, 32, 12, 4
INNER, CHANNELS = VALUE_HEADS * VALUE_DIM, 2 * KEY_HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM
SPEC = ModuleSpec(
    module=GatedDeltaNet,
    submodules=GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
)
NAMES = {
    "in_proj.weight",
    "conv1d.weight",
    "A_log",
    "dt_bias",
    "out_norm.weight",
    "out_proj.weight",
}
LAYOUT = ParallelLayout(world_size=2, tp_size=2)


def random_like(shape, seed, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def hugging_face_net(dtype=torch.float32):
    """Hugging Face's module with random weights of that dtype, in float32."""
    config = modeling_qwen3_next.Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_key_heads=KEY_HEADS,
        linear_num_value_heads=VALUE_HEADS,
        linear_key_head_dim=KEY_DIM,
        linear_value_head_dim=VALUE_DIM,
        linear_conv_kernel_dim=KERNEL,
        rms_norm_eps=1e-6,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    net = modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0)
    for seed, parameter in enumerate(net.parameters()):
        scale = 0.3 if parameter.dim() == 2 else 1.0
        parameter.data = random_like(parameter.shape, seed, scale).to(dtype).float()
    return net


def on_rank(net, get, tp_rank, tp_size):
    """What a rank holds of weights, or of gradients, of Hugging Face's module; by our names."""
    rows = net.fix_query_key_value_ordering(
        get(net.in_proj_qkvz.weight).t()[None], get(net.in_proj_ba.weight).t()[None]
    )
    heads = [block.chunk(tp_size, dim=2)[tp_rank].flatten(2)[0].t() for block in rows]
    channels = (KEY_HEADS * KEY_DIM, KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM)
    parts = [part.chunk(tp_size)[tp_rank] for part in get(net.conv1d.weight).split(channels)]
    return {
        "in_proj.weight": torch.cat(heads),
        "conv1d.weight": torch.cat(parts),
        "A_log": get(net.A_log).chunk(tp_size)[tp_rank],
        "dt_bias": get(net.dt_bias).chunk(tp_size)[tp_rank],
        "out_norm.weight": get(net.norm.weight),
        "out_proj.weight": get(net.out_proj.weight).chunk(tp_size, dim=1)[tp_rank],
    }


def transformer_config(tp_size, sequence_parallel, dtype=torch.float32, **fields):
    fields = {
        "linear_conv_kernel_dim": KERNEL,
        "linear_key_head_dim": KEY_DIM,
        "linear_value_head_dim": VALUE_DIM,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
    } | fields
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        layernorm_zero_centered_gamma=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        params_dtype=dtype,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tp_size,
        sequence_parallel=sequence_parallel,
        **fields,
    )


def load(net, state, dtype=torch.float32):
    tp_rank, tp_size = state.coordinates.tp_rank, state.layout.tp_size
    weights = on_rank(hugging_face_net(dtype), lambda weight: weight.detach(), tp_rank, tp_size)
    net.load_state_dict(weights, strict=False)
    return net


def build(state, *, sequence_parallel=False, dtype=torch.float32):
    config = transformer_config(state.layout.tp_size, sequence_parallel, dtype)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    net = build_module(SPEC, config=config, layer_number=1, pg_collection=groups)
    assert {name for name, _ in net.named_parameters()} == NAMES
    return load(net, state, dtype)


def packed_sequence(lengths, qkv_format):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSeqParams(
        qkv_format=qkv_format,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=256,
        max_seqlen_kv=256,
    )


def run(state, hidden, lengths=None, qkv_format="thd", sequence_parallel=False, dtype=None):
    """Output, gradient of the input and of the parameters, all of this rank."""
    dtype = dtype or torch.float32
    net = build(state, sequence_parallel=sequence_parallel, dtype=dtype)
    weighting = random_like(hidden.shape, 77)
    if sequence_parallel:
        tp_rank, tp_size = state.coordinates.tp_rank, state.layout.tp_size
        hidden, weighting = (x.chunk(tp_size)[tp_rank] for x in (hidden, weighting))
    hidden = hidden.to(dtype).clone().requires_grad_()
    packed = None if lengths is None else packed_sequence(lengths, qkv_format)
    output, bias = net(
        hidden, attention_mask=None, packed_seq_params=packed, rotary_pos_emb=torch.ones(1)
    )
    assert bias is None
    (output.float() * weighting).sum().backward()
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    return output.detach(), hidden.grad, grads


def judged(hidden, lengths=None, dtype=torch.float32, rule="torch_recurrent_gated_delta_rule"):
    """Hugging Face's output, the gradient of the input, and the module with its gradients.

    Token by token, as its own chunks lose the fifth digit of some gradients.
    """
    net = hugging_face_net(dtype)
    hidden = hidden.to(dtype).float().clone().requires_grad_()
    documents = hidden.split(lengths or [hidden.shape[0]])
    rule = getattr(modeling_qwen3_next, rule)
    with mock.patch.object(modeling_qwen3_next, "torch_chunk_gated_delta_rule", rule):
        outputs = [net(document.transpose(0, 1)).transpose(0, 1) for document in documents]
    output = torch.cat(outputs)
    (output * random_like(hidden.shape, 77)).sum().backward()
    return output.detach(), hidden.grad, net


def assert_near(result, expected, tolerance=1e-5):
    assert result.shape == expected.shape
    torch.testing.assert_close(
        result.float(), expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


def assert_gradients_near(grads, net, tp_rank=0, tp_size=1, tolerance=1e-5):
    expected = on_rank(net, lambda weight: weight.grad, tp_rank, tp_size)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_near(grad, expected[name], tolerance)


@pytest.mark.parametrize(("length", "batch"), [(1, 2), (3, 1), (63, 2), (64, 1), (65, 1), (150, 2)])
def test_rows_equal_hugging_face(length, batch):
    hidden = random_like((length, batch, HIDDEN), 50)
    ((output, grad, grads),) = run_ranks(ParallelLayout(), run, hidden)
    expected, expected_grad, net = judged(hidden)
    assert_near(output, expected)
    assert_near(grad, expected_grad)
    assert_gradients_near(grads, net)


def test_rows_equal_hugging_faces_chunks():
    hidden = random_like((150, 2, HIDDEN), 50)
    ((output, grad, _),) = run_ranks(ParallelLayout(), run, hidden)
    expected, expected_grad, _ = judged(hidden, rule="torch_chunk_gated_delta_rule")
    assert_near(output, expected)
    assert_near(grad, expected_grad)


@pytest.mark.parametrize("qkv_format", ["thd", "sbhd"])
@pytest.mark.parametrize("lengths", [[2, 1, 70, 3, 64, 1, 1, 20], [64, 128], [40] * 5])
def test_packed_documents_equal_each_document_alone(lengths, qkv_format):
    hidden = random_like((sum(lengths), 1, HIDDEN), 51)
    ((output, grad, grads),) = run_ranks(ParallelLayout(), run, hidden, lengths, qkv_format)
    expected, expected_grad, net = judged(hidden, lengths)
    assert_near(output, expected)
    assert_near(grad, expected_grad)
    assert_gradients_near(grads, net)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("lengths", [None, [70, 1, 5, 66]])
def test_two_ranks_equal_hugging_face(sequence_parallel, lengths):
    hidden = random_like((142, 1 if lengths else 2, HIDDEN), 52)
    results = run_ranks(LAYOUT, run, hidden, lengths, "sbhd", sequence_parallel)
    expected, expected_grad, net = judged(hidden, lengths)
    for tp_rank, (output, grad, grads) in enumerate(results):
        part = tp_rank if sequence_parallel else 0
        num_parts = 2 if sequence_parallel else 1
        assert_near(output, expected.chunk(num_parts)[part])
        assert_near(grad, expected_grad.chunk(num_parts)[part])
        assert_gradients_near(grads, net, tp_rank, 2)


def test_half_precision_stays_near_float32():
    lengths = [70, 1, 5, 66]
    hidden = random_like((142, 1, HIDDEN), 53)
    arguments = (hidden, lengths, "thd", False, torch.bfloat16)
    ((output, grad, grads),) = run_ranks(ParallelLayout(), run, *arguments)
    expected, expected_grad, net = judged(hidden, lengths, torch.bfloat16)
    assert output.dtype == grads["A_log"].dtype == torch.bfloat16
    for result, judge in ((output, expected), (grad, expected_grad)):
        assert F.cosine_similarity(result.float().flatten(), judge.flatten(), dim=0) > 0.9995
    for name, judge in on_rank(net, lambda weight: weight.grad, 0, 1).items():
        likeness = F.cosine_similarity(grads[name].float().flatten(), judge.flatten(), dim=0)
        assert likeness > 0.9995, name


def mixed_in_both_precisions(state, projected):
    """What is between the projections, in bfloat16, and in float32 with the same values."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        net = build(state, dtype=torch.bfloat16).to(dtype)
        chunks = cut_into_chunks(len(projected), cu_seqlens=None, device=projected.device)
        results.append(net._mix(projected.to(dtype), chunks).detach())
    return results


def test_half_precision_is_rounded_once_between_the_projections():
    shape = (100, 1, CHANNELS + INNER + 2 * VALUE_HEADS)
    projected = random_like(shape, 56).bfloat16()
    ((half, single),) = run_ranks(ParallelLayout(), mixed_in_both_precisions, projected)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, single.bfloat16())


def layer_and_net(state, hidden, lengths):
    """The output of a Megatron-Core layer without an MLP, and what it should be."""
    config = transformer_config(1, False)
    spec = TransformerLayerSubmodules(self_attention=SPEC, self_attn_bda=get_bias_dropout_add)
    layer = TransformerLayer(config, spec, layer_number=1)
    load(layer.self_attention, state)
    packed = packed_sequence(lengths, "sbhd")
    output, _ = layer(hidden, attention_mask=None, packed_seq_params=packed)
    net_output, _ = layer.self_attention(hidden, None, packed_seq_params=packed)
    return output.detach(), (hidden + net_output).detach()


def test_a_layer_of_megatron_core_takes_it_as_self_attention():
    hidden = random_like((90, 1, HIDDEN), 54)
    ((output, expected),) = run_ranks(ParallelLayout(), layer_and_net, hidden, [50, 40])
    assert torch.equal(output, expected)


def kept_for_backward(state, hidden):
    net = build(state)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(hidden.requires_grad_(), None)
    return sum(kept.values())


def test_little_is_kept_for_the_backward_pass():
    """The inputs of both projections and the output of the first; not a state for every chunk."""
    length = 1000
    hidden = random_like((length, 1, HIDDEN), 55)
    (num_bytes,) = run_ranks(ParallelLayout(), kept_for_backward, hidden)
    per_token = HIDDEN + CHANNELS + INNER + 2 * VALUE_HEADS + INNER
    weights = HIDDEN * (CHANNELS + INNER + 2 * VALUE_HEADS) + HIDDEN * INNER
    assert num_bytes <= 1.05 * 4 * (length * per_token + weights)


def marks(state):
    net = build(state, sequence_parallel=True)
    return {
        name: (
            parameter.tensor_model_parallel,
            parameter.partition_dim,
            parameter.partition_stride,
        )
        for name, parameter in net.named_parameters()
        if hasattr(parameter, "tensor_model_parallel")
    }, hasattr(net.out_norm.weight, "sequence_parallel")


def test_split_parameters_are_marked_and_the_norm_is_not_summed_twice():
    for split, is_summed_later in run_ranks(LAYOUT, marks):
        names = ("conv1d.weight", "A_log", "dt_bias")
        assert {name: split.get(name) for name in names} == dict.fromkeys(names, (True, 0, 1))
        assert "out_norm.weight" not in split
        assert not is_summed_later


def refusal(state, **heads):
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    config = transformer_config(2, False, linear_num_key_heads=3, linear_num_value_heads=6)
    with pytest.raises(ValueError, match="cannot share 3 key heads and 6 value heads"):
        build_module(SPEC, config=config, pg_collection=groups)
    return True


def test_heads_that_ranks_cannot_share_are_refused():
    assert run_ranks(LAYOUT, refusal) == [True, True]
