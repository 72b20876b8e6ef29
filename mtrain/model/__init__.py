"""A Hugging Face config becomes a Megatron-Core GPT model."""

from mtrain.platform.device import prepare_megatron

prepare_megatron()
