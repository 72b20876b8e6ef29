"""The precision test of every family: it passes, and each wrong weight fails in its layer (T46)."""

import pytest
import torch

from mtrain.parallel import ParallelLayout
from tests.megatron import load_model
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.verify.test_precision_run import layer_of, precision

LAYER = 1


def swap(first: torch.Tensor, second: torch.Tensor) -> None:
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def exchange_halves(weight: torch.Tensor) -> None:
    """Of the rows, as gate and up have them."""
    first, second = weight.chunk(2, dim=-2)
    swap(first, second)


def exchange_gate_and_up_of_experts(layer):
    exchange_halves(layer.mlp.experts.linear_fc1.weight)


def exchange_gate_and_up_of_shared_experts(layer):
    exchange_halves(layer.mlp.shared_experts.linear_fc1.weight)


def exchange_gate_and_up(layer):
    exchange_halves(layer.mlp.linear_fc1.weight)


def forget_the_gate_of_shared_experts(layer):
    layer.mlp.shared_experts.gate_weight.zero_()


def forget_the_biases_that_choose_experts(layer):
    layer.mlp.router.expert_bias.zero_()


def forget_the_biases_of_experts(layer):
    layer.mlp.experts.linear_fc2.bias.zero_()


def forget_the_sinks(layer):
    layer.self_attention.core_attention.softmax_offset.fill_(-torch.inf)


def move_the_rows_of_the_compressed_keys(layer):
    weight = layer.self_attention.linear_kv_down_proj.weight
    weight.copy_(weight.roll(8, dims=0))


def exchange_the_latent_norm_with_ones(layer):
    layer.self_attention.kv_layernorm.weight.fill_(1.0)


def exchange_the_norms_of_sublayers(layer):
    swap(layer.self_attn_bda.norm.weight, layer.mlp_bda.norm.weight)


def take_norms_as_they_are_stored(layer):
    layer.input_layernorm.weight.sub_(1)


def exchange_keys_and_values(layer):
    attention = layer.self_attention
    rows = attention.linear_qkv.weight.unflatten(0, (attention.num_query_groups_per_partition, -1))
    size = attention.hidden_size_per_attention_head
    swap(rows[:, -2 * size : -size], rows[:, -size:])


def exchange_queries_and_gates(layer):
    attention = layer.self_attention
    rows = attention.linear_qkv.weight.unflatten(0, (attention.num_query_groups_per_partition, -1))
    size = (rows.shape[1] - 2 * attention.hidden_size_per_attention_head) // 2
    swap(rows[:, :size], rows[:, size : 2 * size])


def exchange_decay_and_its_bias(layer):
    swap(layer.self_attention.A_log, layer.self_attention.dt_bias)


def move_the_channels_of_the_convolution(layer):
    weight = layer.self_attention.conv1d.weight
    weight.copy_(weight.roll(1, dims=0))


def forget_the_bias_of_the_output_projection(layer):
    layer.self_attention.linear_proj.bias.zero_()


FAULTS = {
    "mixtral": [exchange_gate_and_up_of_experts],
    "qwen2_moe": [forget_the_gate_of_shared_experts, exchange_gate_and_up_of_shared_experts],
    "qwen3_next_moe": [exchange_decay_and_its_bias, move_the_channels_of_the_convolution],
    "deepseek_v2": [exchange_the_latent_norm_with_ones, exchange_gate_and_up_of_shared_experts],
    "deepseek_v3_groups": [
        forget_the_biases_that_choose_experts,
        move_the_rows_of_the_compressed_keys,
    ],
    "glm4": [exchange_the_norms_of_sublayers, exchange_gate_and_up],
    "glm4_moe": [forget_the_biases_that_choose_experts, exchange_keys_and_values],
    "gpt_oss_moe": [
        forget_the_sinks,
        forget_the_biases_of_experts,
        forget_the_bias_of_the_output_projection,
    ],
    "gemma3": [exchange_the_norms_of_sublayers, take_norms_as_they_are_stored],
    "phi3": [exchange_keys_and_values, exchange_gate_and_up],
    "gpt2": [exchange_keys_and_values, forget_the_bias_of_the_output_projection],
}
# Layers with ordinary attention where LAYER has none.
OTHER_FAULTS = {"qwen3_next_moe": [(exchange_queries_and_gates, 3)]}


def reports(state, folder, faults):
    """A report of the sound model, then one of each fault."""
    found = []
    for fault, number in [(None, LAYER), *faults]:
        chunks = load_model(state, folder)
        if fault is not None:
            with torch.no_grad():
                fault(layer_of(chunks, number))
        found.append(precision(state, chunks, folder, torch.float32))
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_a_sound_model_passes_and_a_wrong_weight_fails_in_its_layer(name, tmp_path):
    folder = make_checkpoint(tmp_path, name)
    faults = [(fault, LAYER) for fault in FAULTS[name]] + OTHER_FAULTS.get(name, [])
    ((sound, *wrong),) = run_ranks(ParallelLayout(), reports, folder, faults)
    assert sound.passed, "\n".join(sound.table())
    for (fault, number), report in zip(faults, wrong, strict=True):
        assert not report.passed, fault.__name__
        table = "\n".join(report.table())
        assert report.first_departure == f"layer {number}", f"{fault.__name__}\n{table}"
