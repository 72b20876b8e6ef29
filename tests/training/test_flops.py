import pytest
from megatron.core.transformer import TransformerConfig

from mtrain.training.flops import ModelShape, training_flops

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
    flops = training_flops(shape, num_tokens=8192, num_attention_pairs=pairs)
    assert flops == 6 * shape.num_matmul_weights * 8192 + 12 * 28 * 2048 * pairs


def test_short_documents_need_less_attention_than_one_long_one():
    shape = ModelShape(num_layers=1, num_matmul_weights=0, attention_width=1)
    # One token attends to itself alone: a product with k and one with v, 3 times 2 operations each.
    assert training_flops(shape, num_tokens=1, num_attention_pairs=1) == 12


def test_frozen_weights_have_no_gradient_of_their_own():
    shape = ModelShape(num_layers=1, num_matmul_weights=10, attention_width=1, is_frozen=True)
    assert training_flops(shape, num_tokens=3, num_attention_pairs=0) == 4 * 10 * 3
