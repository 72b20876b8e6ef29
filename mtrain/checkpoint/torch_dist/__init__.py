"""Megatron-Core's own checkpoint format, torch_dist: written in a stream, read without pickle."""
