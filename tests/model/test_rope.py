import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

from mtrain.model.rope import rotary_frequencies
from tests.tiny import tiny_config


def test_llama3_frequencies_are_those_of_the_hugging_face_model():
    fields = tiny_config("llama3_tied")
    expected = LlamaRotaryEmbedding(LlamaConfig(**fields)).inv_freq
    assert torch.equal(rotary_frequencies(fields), expected)


def test_the_spelling_of_transformers_4_means_the_same():
    fields = tiny_config("llama3_tied")
    rope = dict(fields.pop("rope_parameters"))
    old = {**fields, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert torch.equal(rotary_frequencies(old), rotary_frequencies(tiny_config("llama3_tied")))


def test_plain_rotary_embedding_needs_no_frequencies():
    assert rotary_frequencies(tiny_config("qwen3")) is None
