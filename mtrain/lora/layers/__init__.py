"""Adapters in a Megatron-Core model; the rest of `mtrain.lora` works before ranks, without it."""

from mtrain.platform.device import prepare_megatron

prepare_megatron()
