import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mtrain.model.norm import RMSNorm


def test_norm_equals_hugging_face():
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    ours, theirs = RMSNorm(config, 16, eps=1e-6), Qwen3RMSNorm(16, eps=1e-6)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(16))
        theirs.weight.copy_(ours.weight)
    hidden = torch.randn(3, 2, 16)
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=1e-6, atol=1e-6)


def test_gradient_is_marked_for_reduction_under_sequence_parallelism():
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        sequence_parallel=True,
        tensor_model_parallel_size=2,
    )
    assert RMSNorm(config, 16).weight.sequence_parallel
