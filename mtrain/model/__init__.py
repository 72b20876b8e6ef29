"""A Hugging Face config becomes a Megatron-Core GPT model."""
