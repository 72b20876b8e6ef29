"""The precision test of every family: it passes, and each wrong weight fails in its layer (T46).

Multi-token prediction too, whose faults no figure of the other layers shows.
"""

from functools import partial
from unittest import mock

import pytest
import torch

from mtrain.bridge.families import deepseek
from mtrain.bridge.families.next_tokens import NextTokens
from mtrain.parallel import ParallelLayout
from tests.megatron import load_model
from tests.next_tokens import make_checkpoint_with_next_tokens, names_left_out
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


def exchange_the_norms_of_what_is_joined(chunk):
    layer = chunk.mtp.layers[0]
    swap(layer.enorm.weight, layer.hnorm.weight)


def exchange_the_halves_of_the_projection(chunk):
    """So that it takes the hidden state first, as MiMo does."""
    weight = chunk.mtp.layers[0].eh_proj.weight
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))


def take_a_wrong_copy_of_the_embedding(chunk):
    weight = chunk.embedding.word_embeddings.weight
    weight.copy_(weight.roll(1, dims=0))


def change_a_weight_of_the_layer(chunk):
    exchange_gate_and_up_of_experts(chunk.mtp.layers[0].transformer_layer)


def forget_the_biases_in_the_layer(chunk):
    forget_the_biases_that_choose_experts(chunk.mtp.layers[0].transformer_layer)


def forget_the_last_norm(chunk):
    chunk.mtp.layers[0].final_layernorm.weight.fill_(1.0)


# The fault, and the row that it shows in first.
NEXT_TOKEN_FAULTS = {
    "deepseek_v3": {
        exchange_the_norms_of_what_is_joined: "layer 0",
        exchange_the_halves_of_the_projection: "layer 0",
        take_a_wrong_copy_of_the_embedding: "layer 0",
        change_a_weight_of_the_layer: "layer 0",
        forget_the_last_norm: "logits 0",
    },
    "glm4_moe": {
        exchange_the_halves_of_the_projection: "layer 0",
        forget_the_biases_in_the_layer: "layer 0",
    },
    "qwen3_next_moe": {exchange_the_norms_of_what_is_joined: "layer 0"},
}


def precision_with_next_tokens(state, chunks, folder):
    return precision(state, chunks, folder, torch.float32, left_out=names_left_out(folder))


def reports_with_next_tokens(state, folder, faults):
    """A report of the sound model, then one of each fault of its last stage."""
    found = []
    for fault in (None, *faults):
        chunks = load_model(state, folder, num_next_tokens=1)
        if fault is not None and state.is_last_stage:
            with torch.no_grad():
                fault(chunks[-1])
        found.append(precision_with_next_tokens(state, chunks, folder))
    return found


@pytest.mark.parametrize("name", NEXT_TOKEN_FAULTS)
def test_a_wrong_weight_of_multi_token_prediction_fails_there_alone(name, tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", name)
    faults, layout = NEXT_TOKEN_FAULTS[name], ParallelLayout(world_size=2, pp_size=2)
    (sound, *wrong), _ = run_ranks(layout, reports_with_next_tokens, folder, tuple(faults))
    assert sound.passed, "\n".join(sound.table())
    assert any("multi-token prediction" in row.name for row in sound.rows)
    for (fault, place), report in zip(faults.items(), wrong, strict=True):
        table = f"{fault.__name__}\n" + "\n".join(report.table())
        assert report.first_departure == f"multi-token prediction {place}", table
        others = [row for row in report.rows if "multi-token prediction" not in row.name]
        assert all(report.thresholds.passed(row) for row in others), table


# What a family file could say of DeepSeek-V3: bits would come back from a round trip all the same.
WRONG_TABLES = (
    {"embedding_norm": "hnorm", "hidden_norm": "enorm"},
    {"hidden_first": True},
    {"final_norm": "enorm", "embedding_norm": "shared_head.norm"},
)


def reports_of_wrong_tables(state, folder):
    found = []
    for facts in WRONG_TABLES:
        with mock.patch.object(deepseek, "NextTokens", partial(NextTokens, **facts)):
            chunks = load_model(state, folder, num_next_tokens=1)
        found.append(precision_with_next_tokens(state, chunks, folder))
    return found


def test_a_wrong_table_of_multi_token_prediction_is_found(tmp_path):
    """The judge has no names of ours."""
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "deepseek_v3")
    (reports,) = run_ranks(ParallelLayout(), reports_of_wrong_tables, folder)
    places = [report.first_departure for report in reports]
    assert places == ["multi-token prediction layer 0"] * len(WRONG_TABLES)
