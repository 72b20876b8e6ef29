"""Writing torch_dist, with Megatron-Core; the rest of `torch_dist` works without it."""

from mtrain.platform.device import prepare_megatron_files

prepare_megatron_files()
