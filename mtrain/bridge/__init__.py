"""Weights between Hugging Face files and Megatron-Core shards, from one table of rules."""
