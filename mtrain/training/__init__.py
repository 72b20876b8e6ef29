"""The training loop on Megatron-Core's schedules."""
