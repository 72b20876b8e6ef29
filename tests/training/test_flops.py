import dataclasses
import json
from math import prod
from pathlib import Path

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from mtrain.bridge.families import find_family
from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.config import ModelConfig, MoEConfig, ParallelConfig, TrainingConfig
from mtrain.model.build import transformer_config
from mtrain.parallel import ParallelLayout
from mtrain.training.flops import ModelShape, hardware_flops, training_flops

PUBLISHED = json.loads(
    (Path(__file__).parents[1] / "bridge" / "published.json").read_text(encoding="utf-8")
)

DENSE = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "kv_channels": 3,
    "num_query_groups": 2,
    "ffn_hidden_size": 10,
    "gated_linear_unit": True,
    "add_bias_linear": False,
}
# q 8 x 12, k and v 8 x 6, o 12 x 8
ATTENTION = 96 + 2 * 48 + 96
MLP = 3 * 8 * 10
MOE = {
    **DENSE,
    "num_layers": 3,
    "num_moe_experts": 16,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 5,
    "moe_shared_expert_intermediate_size": 7,
    "moe_layer_freq": [0, 1, 1],
    "moe_grouped_gemm": True,
}
SHARED = 3 * 8 * 7
# Two experts, those that all share, and the router.
EXPERTS = 3 * 8 * 2 * 5 + SHARED + 8 * 16
WORK = {"num_labels": 3, "num_attention_pairs": 20}


def recomputing(fields, **recompute) -> ModelShape:
    recompute = {f"recompute_{name}": value for name, value in recompute.items()}
    return ModelShape.from_config(TransformerConfig(**fields, **recompute), vocab_size=100)


def test_a_dense_model_is_counted_by_hand():
    shape = ModelShape.from_config(TransformerConfig(**DENSE), vocab_size=100)
    assert shape.num_matmul_weights == 2 * (ATTENTION + 3 * 8 * 10) + 8 * 100
    assert shape.attention_width == 12


def test_only_the_experts_of_a_token_count():
    config = TransformerConfig(
        **DENSE,
        num_moe_experts=16,
        moe_router_topk=2,
        moe_ffn_hidden_size=5,
        moe_shared_expert_intermediate_size=7,
        moe_layer_freq=[0, 1],
    )
    shape = ModelShape.from_config(config, vocab_size=100)
    moe_layer = ATTENTION + 3 * 8 * (2 * 5 + 7) + 8 * 16
    assert shape.num_matmul_weights == (ATTENTION + 3 * 8 * 10) + moe_layer + 8 * 100


def test_qwen3_0_6b_needs_the_flops_that_its_card_says():
    """Six operations a weight and token, and attention: 0.44 B non-embedding + 0.16 B head."""
    config = TransformerConfig(
        num_layers=28,
        hidden_size=1024,
        num_attention_heads=16,
        kv_channels=128,
        num_query_groups=8,
        ffn_hidden_size=3072,
        gated_linear_unit=True,
        add_bias_linear=False,
    )
    shape = ModelShape.from_config(config, vocab_size=151936)
    assert shape.num_matmul_weights == pytest.approx(0.44e9 + 151936 * 1024, rel=1e-2)
    pairs = 8192 * 8193 / 2
    flops = training_flops(shape, num_tokens=8192, num_labels=8192, num_attention_pairs=pairs)
    assert flops == 6 * shape.num_matmul_weights * 8192 + 12 * 28 * 2048 * pairs


def test_short_documents_need_less_attention_than_one_long_one():
    shape = ModelShape(num_attention_layers=1, num_matmul_weights=0, attention_width=1)
    # One token attends to itself alone: a product with k and one with v, 3 times 2 operations each.
    assert training_flops(shape, num_tokens=1, num_labels=1, num_attention_pairs=1) == 12


def test_frozen_weights_have_no_gradient_of_their_own():
    shape = ModelShape(
        num_attention_layers=1, num_matmul_weights=10, attention_width=1, is_frozen=True
    )
    assert training_flops(shape, num_tokens=3, num_labels=3, num_attention_pairs=0) == 4 * 10 * 3


def test_a_window_bounds_the_pairs_of_its_layers():
    shape = ModelShape(
        num_attention_layers=3,
        num_matmul_weights=0,
        attention_width=1,
        num_windowed_layers=2,
        window=4,
    )
    tokens = {"num_tokens": 10, "num_labels": 10}
    assert training_flops(shape, **tokens, num_attention_pairs=55) == 12 * (55 + 2 * 40)
    assert training_flops(shape, **tokens, num_attention_pairs=20) == 12 * 3 * 20


def test_only_labelled_tokens_go_through_the_head():
    shape = ModelShape(
        num_attention_layers=1, num_matmul_weights=10, attention_width=1, num_head_weights=4
    )
    flops = training_flops(shape, num_tokens=7, num_labels=2, num_attention_pairs=0)
    assert flops == 6 * (6 * 7 + 4 * 2)


def test_the_device_computes_padding_too():
    shape = ModelShape.from_config(TransformerConfig(**DENSE), vocab_size=100)
    flops = hardware_flops(shape, num_padded_tokens=10, **WORK)
    # Two layers of 528 weights for all tokens, a head of 800 for those with a label.
    assert flops == 6 * (2 * 528 * 10 + 800 * 3) + 12 * 12 * 2 * 20 == 71520 + 12000
    assert flops - training_flops(shape, num_tokens=7, **WORK) == 6 * 2 * 528 * (10 - 7)


def test_full_recomputation_is_one_more_forward_without_the_head():
    shape = recomputing(DENSE, granularity="full", method="uniform", num_layers=1)
    assert (shape.num_recomputed_weights, shape.recomputed_attention) == (2 * 528, 1)
    again = 2 * 2 * 528 * 10 + 4 * 12 * 2 * 20
    assert again == 23040
    assert hardware_flops(shape, num_padded_tokens=10, **WORK) == 83520 + again
    # What is useful stays what it was.
    useful = training_flops(shape, num_tokens=10, **WORK)
    assert useful == 83520
    frozen = dataclasses.replace(shape, is_frozen=True)
    flops = hardware_flops(frozen, num_padded_tokens=10, **WORK)
    assert flops == 4 * (2 * 528 * 10 + 800 * 3) + 12 * 12 * 2 * 20 + again


@pytest.mark.parametrize(
    ("pipeline", "num_layers", "share"),
    [
        ({}, 3, 3 / 8),
        ({}, 99, 1),
        ({"pipeline_model_parallel_size": 2}, 3, 6 / 8),
        # Stages of 1, 4 and 3.
        (
            {
                "pipeline_model_parallel_size": 3,
                "num_layers_in_first_pipeline_stage": 1,
                "num_layers_in_last_pipeline_stage": 3,
            },
            2,
            5 / 8,
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            1,
            4 / 8,
        ),
    ],
)
def test_blocks_are_the_first_layers_of_every_stage(pipeline, num_layers, share):
    fields = {**DENSE, "num_layers": 8, "pipeline_dtype": torch.float32, **pipeline}
    shape = recomputing(fields, granularity="full", method="block", num_layers=num_layers)
    assert shape.num_recomputed_weights == share * 8 * 528
    assert shape.recomputed_attention == share


@pytest.mark.parametrize(("method", "num_next"), [("uniform", 1), ("block", 0)])
def test_blocks_leave_multi_token_prediction_alone(method, num_next):
    fields = {**DENSE, "mtp_num_layers": 1}
    shape = recomputing(fields, granularity="full", method=method, num_layers=1)
    num_layers = 2 if method == "uniform" else 1
    # Hidden state and embedding are joined by a matrix of 16 x 8; the head is not made again.
    assert shape.num_recomputed_weights == num_layers * 528 + num_next * (528 + 16 * 8)
    assert shape.recomputed_attention == (num_layers + num_next) / 3


@pytest.mark.parametrize(
    ("modules", "weights", "attention"),
    [
        (["core_attn"], 0, 1),
        (["mlp"], MLP, 0),
        (["moe"], 2 * EXPERTS, 0),
        (["shared_experts"], 2 * SHARED, 0),
        (["moe", "shared_experts"], 2 * EXPERTS, 0),
        (["core_attn", "mlp", "moe"], MLP + 2 * EXPERTS, 1),
        (["moe_act", "layernorm"], 0, 0),
    ],
)
def test_selective_recomputation_is_that_of_its_modules(modules, weights, attention):
    shape = recomputing(MOE, granularity="selective", modules=modules)
    assert (shape.num_recomputed_weights, shape.recomputed_attention) == (weights, attention)


def test_the_layer_of_multi_token_prediction_has_modules_too():
    dense = recomputing({**DENSE, "mtp_num_layers": 1}, granularity="selective", modules=["mlp"])
    assert dense.num_recomputed_weights == 3 * MLP
    moe = recomputing({**MOE, "mtp_num_layers": 1}, granularity="selective", modules=["moe"])
    assert moe.num_recomputed_weights == 3 * EXPERTS


def test_recomputed_attention_has_its_window():
    shape = ModelShape(
        num_attention_layers=3,
        num_matmul_weights=0,
        attention_width=1,
        num_windowed_layers=2,
        window=4,
        recomputed_attention=0.5,
    )
    flops = hardware_flops(shape, num_padded_tokens=10, num_labels=0, num_attention_pairs=55)
    assert flops == (12 + 4 * 0.5) * (55 + 2 * 40)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weights_of_a_token_are_those_of_the_checkpoint(name):
    """All matrices but embeddings, and of experts the share that a token is routed to."""
    entry = PUBLISHED[name]
    config, num_next = entry["config"], entry["num_next_tokens"]
    described = find_family(config).megatron_config(config, num_next)
    built = transformer_config(
        described,
        ParallelLayout(),
        model=ModelConfig(),
        parallel=ParallelConfig(),
        training=TrainingConfig(),
        moe=MoEConfig(),
        dtype=torch.float32,
    )
    shape = ModelShape.from_config(
        built,
        vocab_size=described.gpt.vocab_size,
        num_delta_net_layers=len(described.layers.delta_net_layers),
    )
    expected = 0.0
    for tensor, size in hf_tensors(weight_table(config, num_next)).items():
        is_matrix = len(size) == 2 and "embed" not in tensor and "wpe" not in tensor
        share = built.moe_router_topk / built.num_moe_experts if ".experts." in tensor else 1
        expected += prod(size) * share * is_matrix
    head = described.gpt.vocab_size * built.hidden_size
    # A tied head is no tensor of its own, and multi-token prediction uses the head once more.
    expected += head * num_next
    if described.gpt.is_tied and config["model_type"] != "gpt2":
        expected += head
    assert shape.num_matmul_weights == pytest.approx(expected, rel=1e-3)
