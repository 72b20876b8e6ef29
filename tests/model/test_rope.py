import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

from mtrain.bridge.family import Llama3Rope
from mtrain.model.rope import llama3_frequencies
from tests.tiny import tiny_config


def test_llama3_frequencies_are_those_of_the_hugging_face_model():
    rope = Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )
    expected = LlamaRotaryEmbedding(LlamaConfig(**tiny_config("llama3_tied"))).inv_freq
    assert torch.equal(llama3_frequencies(rope, base=10000.0, head_dim=16), expected)
