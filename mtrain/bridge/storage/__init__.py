"""Checkpoints whose files do not hold the tensors of a model one by one."""
