"""The training loop on Megatron-Core's schedules."""

from mtrain.platform.device import prepare_megatron

prepare_megatron()
